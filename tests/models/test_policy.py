"""The policy against each family's own logits on the unpadded row, whatever the padding, chunking and temperature."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from slow_sampling import log_softmax, own_logits, policy_of
from tiny_models import FAMILIES, tiny_model
from tropism.errors import ModelError
from tropism.models.heads import ValueHead
from tropism.models.layout import Padding, join
from tropism.models.lora import LoRA, add_lora
from tropism.models.output import PolicyOutput
from tropism.models.policy import Policy
from tropism.ops import vocabulary
from tropism.types import Tokens, pad_rows

PADDINGS: tuple[Padding, ...] = ("right", "left", "both")
ROWS = (
    ((5, 9, 30, 8, 11, 7, 14), (8, 2)),
    ((6,), (3, 20, 31, 9, 4, 4, 10, 36)),
    ((12, 13, 14), ()),
    ((0, 2, 1, 17), (2, 0, 1)),
)
"""Prompts and completions: a row without completion, and one of pad, eos and bos tokens, which are tokens like any."""


@contextmanager
def projected(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many hidden states each product with the vocabulary was given, on either way to the log-probs."""
    seen: list[int] = []
    straight = vocabulary._logits
    head = policy.language_model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "_logits", lambda hidden, *rest: seen.append(len(hidden)) or straight(hidden, *rest))
        yield seen
    hook.remove()


def tokens(rows: Any = ROWS) -> Tokens:
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    return Tokens(
        prompt_ids=pad_rows(prompts, left=True),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        completion_ids=pad_rows(completions),
        completion_lengths=torch.tensor([len(c) for c in completions]),
    )


def ask(policy: Policy, padding: Padding, rows: Any = ROWS, **arguments: Any) -> PolicyOutput:
    before = policy.padding
    try:
        policy.padding = padding
        output = policy(**tokens(rows).inputs, **arguments)
        assert isinstance(output, PolicyOutput)
        return output
    finally:
        policy.padding = before


def expected(model: Any, rows: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, T], row by row and token by token."""
    width = max(len(c) for _, c in rows)
    logprobs, entropies = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    for index, (prompt, completion) in enumerate(rows):
        logits = own_logits(model, [*prompt, *completion])
        for t, token in enumerate(completion):
            row = log_softmax(logits[len(prompt) + t - 1].tolist(), temperature)
            logprobs[index, t] = row[token]
            entropies[index, t] = -math.fsum(math.exp(x) * x for x in row)
    return logprobs, entropies


def close(value: Tensor | None, wanted: Tensor) -> None:
    assert value is not None
    torch.testing.assert_close(value, wanted.to(value), rtol=0, atol=1e-5)


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_the_model_itself_under_any_padding(
    family: str, temperature: float
) -> None:
    policy = policy_of(family)
    logprobs, entropies = expected(policy.model, ROWS, temperature)
    arguments = {"want": {"logprobs", "entropy"}, "temperature": temperature}
    for padding in PADDINGS:
        output = ask(policy, padding, **arguments)
        close(output.logprobs, logprobs)
        close(output.entropy, entropies)
    for index, row in enumerate(ROWS):
        single = ask(policy, "right", [row], **arguments)
        width = len(row[1])
        close(single.logprobs, logprobs[index : index + 1, :width])
        close(single.entropy, entropies[index : index + 1, :width])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3", "opt"])
def test_the_fused_attention_agrees_too_and_its_gradients_stay_finite_beside_rows_of_pads(family: str) -> None:
    model = tiny_model(family)
    logprobs, _ = expected(model, ROWS)
    fused: Any = copy.deepcopy(model)
    fused.set_attn_implementation("sdpa")
    policy = Policy(fused)
    found = []
    for padding in PADDINGS:
        output = ask(policy, padding)
        close(output.logprobs, logprobs)
        found.append(gradients(policy, output.need("logprobs").sum()))
    for name, gradient in found[0].items():
        scale = max(1.0, float(gradient.abs().max()))
        for other in found[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_head_on_the_last_hidden_state_before_each_token(family: str) -> None:
    model = FAMILIES[family]()
    head = ValueHead(int(model.get_output_embeddings().in_features))
    assert not head.linear.weight.any() and not head.linear.bias.any()
    nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(head.linear.bias, 0.25)
    policy = Policy(model, value_head=head)
    caught: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    wanted, after = torch.zeros(4, 8), torch.zeros(4)
    for index, (prompt, completion) in enumerate(ROWS):
        caught.clear()
        own_logits(model, [*prompt, *completion])
        weight, bias = head.linear.weight[0].detach().double(), 0.25
        state_values = [float(state.double() @ weight) + bias for state in caught[0]]
        wanted[index, : len(completion)] = torch.tensor(state_values[len(prompt) - 1 : -1])
        after[index] = state_values[-1]
    hook.remove()
    for padding in PADDINGS:
        output = ask(policy, padding, want={"values", "bootstrap_values"})
        close(output.values, wanted)
        close(output.bootstrap_values, after)
        assert output.logprobs is None and output.entropy is None


def test_values_alone_never_touch_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(FAMILIES["llama"](), value_head=ValueHead(32))
    monkeypatch.setattr(Policy, "logits", lambda *_: pytest.fail("the vocabulary projection ran"))
    assert ask(policy, "right", want={"values", "bootstrap_values"}).values is not None


def test_values_without_a_head_name_the_mend() -> None:
    with pytest.raises(ModelError, match="value_head=ValueHead"):
        ask(policy_of("llama"), "right", want={"values"})


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_chunks_change_neither_values_nor_gradients_and_bound_the_logits(
    family: str, entropy_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "KEPT_BYTES", 0)
    weights = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for chunk_size in (1000, 3):
        policy = Policy(FAMILIES[family](), chunk_size=chunk_size)
        with projected(policy, monkeypatch) as seen:
            output = ask(policy, "right", want={"logprobs", "entropy"}, entropy_gradient=entropy_gradient)
        assert seen == ([13] if chunk_size == 1000 else [3, 3, 3, 3, 1])
        loss = (output.need("logprobs") * weights).sum()
        if entropy_gradient:
            loss = loss + (output.need("entropy") * weights.flip(0)).sum()
        with torch.no_grad():
            ungraded = ask(policy, "right", want={"logprobs", "entropy"})
        torch.testing.assert_close(ungraded.need("entropy"), output.need("entropy").detach(), rtol=0, atol=1e-5)
        found.append((output.need("logprobs"), output.need("entropy"), gradients(policy, loss)))
    (one, one_entropy, one_gradients), (many, many_entropy, many_gradients) = found
    torch.testing.assert_close(many, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(many_entropy, one_entropy, rtol=0, atol=1e-5)
    assert one_gradients.keys() == many_gradients.keys()
    for name, gradient in one_gradients.items():
        torch.testing.assert_close(many_gradients[name], gradient, rtol=1e-4, atol=1e-4)


def test_only_tokens_in_the_mask_reach_the_vocabulary_and_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama")
    logprobs, _ = expected(policy.model, ROWS)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = mask[1, 7] = True
    mask[2] = True  # beyond the end of its row: never computed
    with projected(policy, monkeypatch) as seen:
        output = ask(policy, "left", mask=mask)
    assert seen == [3]
    mask[2] = False
    close(output.logprobs, logprobs * mask)


def test_rows_without_any_completion_give_zeros_and_no_gradient() -> None:
    policy = Policy(FAMILIES["gpt2"](), value_head=ValueHead(32))
    rows = [((5, 6), ()), ((7,), ())]
    policy.reference_logits = policy.logits
    everything: Any = {"logprobs", "entropy", "values", "bootstrap_values", "reference_kl"}
    for padding in PADDINGS:
        output = ask(policy, padding, rows, want=everything, reference_hidden=torch.zeros(2, 0, 32))
        assert output.need("logprobs").shape == output.need("values").shape == (2, 0)
        assert output.need("bootstrap_values").shape == (2,)
    wide = tokens(rows)
    wide = Tokens(**{**wide.inputs, "completion_ids": torch.full((2, 3), 9)})
    output = policy(**wide.inputs, want=everything, reference_hidden=torch.zeros(2, 3, 32))
    for name in ("logprobs", "entropy", "values", "reference_kl"):
        assert torch.equal(output.need(name), torch.zeros(2, 3))
    assert all(not gradient.any() for gradient in gradients(policy, output.need("logprobs").sum()).values())


def test_the_gradient_reaches_only_what_comes_before_the_trained_token() -> None:
    policy = Policy(FAMILIES["llama"]())
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> Tensor:
        out.retain_grad()
        embedded.append(out)
        return out

    hook = policy.language_model.get_input_embeddings().register_forward_hook(keep)
    output = ask(policy, "both")
    output.need("logprobs")[1, 2].backward()
    hook.remove()
    assert embedded[0].grad is not None
    reached = embedded[0].grad.abs().sum(-1) > 0
    # Row 1 has one prompt token; token 2 is predicted from the prompt and tokens 0 and 1.
    wide = max(len(prompt) for prompt, _ in ROWS)
    assert reached[1].tolist() == [False] * (wide - 1) + [True] * 3 + [False] * (reached.shape[1] - wide - 2)
    assert not reached[[0, 2, 3]].any()


def test_the_entropy_has_a_gradient_only_when_asked() -> None:
    policy = Policy(FAMILIES["qwen3"]())
    with_gradient = ask(policy, "right", want={"entropy"}, entropy_gradient=True).need("entropy")
    without = ask(policy, "right", want={"entropy"}).need("entropy")
    torch.testing.assert_close(with_gradient, without, rtol=0, atol=1e-5)
    assert with_gradient.requires_grad and not without.requires_grad
    found = gradients(policy, with_gradient.sum())
    # By finite differences along one direction of one weight.
    weight = policy.language_model.get_output_embeddings().weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-3
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            sides.append(float(ask(policy, "right", want={"entropy"}).need("entropy").double().sum()))
            weight.sub_(sign * step * direction)
    name = next(n for n, p in policy.named_parameters() if p is weight)
    slope = float((found[name] * direction).sum())
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)


def test_soft_capped_logits_are_capped_and_the_cap_matters() -> None:
    policy = policy_of("gemma2")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 10
    raw = policy.language_model.lm_head(hidden)
    assert raw.abs().max() > 6
    torch.testing.assert_close(policy.logits(hidden), 5.0 * torch.tanh(raw / 5.0))


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "bloom"])
def test_with_an_adapter_the_logprobs_are_those_of_the_adapted_model(family: str) -> None:
    adapted = add_lora(FAMILIES[family](), LoRA(rank=2), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    policy = Policy(adapted, value_head=ValueHead(32))
    logprobs, entropies = expected(adapted, ROWS)
    plain, _ = expected(FAMILIES[family](), ROWS)
    assert (logprobs - plain).abs().max() > 0.1
    for padding in PADDINGS:
        output = ask(policy, padding, want={"logprobs", "entropy"})
        close(output.logprobs, logprobs)
        close(output.entropy, entropies)
    found = gradients(policy, ask(policy, "right", want={"logprobs"}).need("logprobs").sum())
    assert found and all("lora_" in name for name in found)


class RescaledLM(nn.Module):
    """A made-up family: a Llama whose logits are rescaled in a way that its configuration does not tell."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner: Any = FAMILIES["llama"]()
        self.factor = factor
        self.config = self.inner.config
        self.base_model = self.inner.base_model

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.inner.get_output_embeddings()
        return head

    def forward(self, **arguments: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.factor * self.inner(**arguments).logits)


def test_a_family_with_unknown_treatment_of_its_logits_is_refused() -> None:
    Policy(RescaledLM(1.0))
    with pytest.raises(ModelError, match=r"RescaledLM computes logits .* does not know"):
        Policy(RescaledLM(0.9))


def test_a_model_that_fails_on_two_tokens_is_refused_with_the_cause() -> None:
    broken = RescaledLM(1.0)
    broken.inner = None
    with pytest.raises(ModelError, match="RescaledLM cannot be used"):
        Policy(broken)


def test_the_joined_rows_by_hand() -> None:
    batch = tokens([((5, 6), (8, 2)), ((7,), (9, 8, 9))])
    by_hand: dict[Padding, tuple[list[list[int]], list[int]]] = {
        "right": ([[5, 6, 8, 2], [7, 9, 8, 9]], [2, 1]),
        "both": ([[5, 6, 8, 2, -1], [-1, 7, 9, 8, 9]], [2, 2]),
    }
    for padding, (rows, first) in by_hand.items():
        ids, mask, positions, begin = join(**batch.inputs, padding=padding)
        assert torch.where(mask, ids, -1).tolist() == rows
        assert begin.tolist() == first
        for row_mask, row in zip(mask, positions, strict=True):
            assert row[row_mask].tolist() == [0, 1, 2, 3] and not row[~row_mask].any()
    ids, mask, positions, begin = join(**tokens([((5, 6), (8,)), ((7,), (9, 8, 9))]).inputs, padding="left")
    assert torch.where(mask, ids, -1).tolist() == [[-1, 5, 6, 8], [7, 9, 8, 9]]
    assert positions.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]] and begin.tolist() == [3, 1]


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 64), ("llama", 64), ("opt", 64), ("bloom", None)])
def test_the_context_length_is_the_models(family: str, limit: int | None) -> None:
    assert policy_of(family).context_length == limit
