"""The exact KL of a policy from its reference: the sum over the vocabulary, though no row of logits is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from slow_sampling import own_logits
from tiny_models import FAMILIES, tiny_model
from tropism.errors import ModelError
from tropism.models.freezing import train_last_layers
from tropism.models.layout import Padding
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.types import Tokens, pad_rows

PADDINGS: tuple[Padding, ...] = ("right", "left", "both")
ROWS = (((5, 9, 30, 8, 11), (8, 2)), ((6,), (3, 20, 31, 9, 4, 4)), ((12, 13, 14), ()), ((0, 2, 1, 17), (2, 0, 1)))
"""Prompts and completions, eleven completion tokens in all."""
BATCH = Tokens(
    prompt_ids=pad_rows([prompt for prompt, _ in ROWS], left=True),
    prompt_lengths=torch.tensor([len(prompt) for prompt, _ in ROWS]),
    completion_ids=pad_rows([completion for _, completion in ROWS]),
    completion_lengths=torch.tensor([len(completion) for _, completion in ROWS]),
)
WEIGHTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def kl_by_hand(model: Any, reference: Any) -> Tensor:
    """[B, T] with a gradient: sum of p (log p - log q) over the vocabulary, from both models' own logits."""
    kls = torch.zeros(4, 6, dtype=torch.float64)
    for row, (prompt, completion) in enumerate(ROWS):
        ids = torch.tensor([[*prompt, *completion]])
        p, q = (one(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1) for one in (model, reference))
        for t in range(len(completion)):
            at = len(prompt) + t - 1
            kls[row, t] = (p[at].exp() * (p[at] - q[at].detach())).sum()
    return kls


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@torch.no_grad()
def hidden_of(policy: Policy) -> Tensor:
    hidden: Tensor = policy(**BATCH.inputs, want={"hidden"}).need("hidden")
    return hidden.float()  # as scorers keep it


@contextmanager
def projected(policy: Policy) -> Iterator[list[int]]:
    """How many hidden states each product with the vocabulary was given."""
    seen: list[int] = []
    head = policy.language_model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    yield seen
    hook.remove()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_value_and_gradient_are_those_of_the_full_formula_chunk_by_chunk(family: str, chunk_size: int) -> None:
    reference = Policy(tiny_model(family, seed=1)).requires_grad_(False)
    policy = Policy(FAMILIES[family](), chunk_size=chunk_size)
    policy.reference_logits = reference.logits
    wanted = kl_by_hand(policy.model, reference.model)
    assert bool((wanted > 0.5).any())
    expected = gradients(policy, (wanted * WEIGHTS).sum())
    for padding in PADDINGS:
        policy.padding = reference.padding = padding
        with projected(policy) as seen, projected(reference) as seen_there:
            states = hidden_of(reference)
            # The temperature is that of the log-probs alone.
            output = policy(**BATCH.inputs, want={"reference_kl"}, reference_hidden=states, temperature=0.5)
        assert seen == seen_there == ([11] if chunk_size == 1000 else [3, 3, 3, 2])
        torch.testing.assert_close(output.reference_kl.double(), wanted, rtol=0, atol=1e-5)
        assert output.entropy is None and output.values is None
        found = gradients(policy, (output.reference_kl * WEIGHTS).sum())
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_have_none(dtype: torch.dtype) -> None:
    model, same = FAMILIES["llama"](), FAMILIES["llama"]()
    for one in (model, same):
        torch.nn.Module.to(one, dtype)
    policy = Policy(model)
    policy.reference_logits = Policy(same).logits
    output = policy(**BATCH.inputs, want={"reference_kl"}, reference_hidden=hidden_of(policy))
    assert float(output.reference_kl.detach().abs().max()) < 1e-6
    assert all(float(g.abs().max()) < 1e-5 for g in gradients(policy, output.reference_kl.sum()).values())


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_hidden_states_are_what_the_vocabulary_projection_reads_before_each_token(family: str) -> None:
    policy = Policy(FAMILIES[family]())
    for padding in PADDINGS:
        policy.padding = padding
        hidden = hidden_of(policy)
        assert hidden.shape == (4, 6, policy.hidden_size)
        for row, (prompt, completion) in enumerate(ROWS):
            own = own_logits(policy.model, [*prompt, *completion])[len(prompt) - 1 : -1]
            with torch.no_grad():
                logits = policy.logits(hidden[row, : len(completion)]).double()
            torch.testing.assert_close(logits, own, rtol=0, atol=1e-5)
            assert not hidden[row, len(completion) :].any()


def test_what_is_missing_is_named() -> None:
    policy = Policy(FAMILIES["llama"]())
    with pytest.raises(ModelError, match="needs reference_hidden"):
        policy(**BATCH.inputs, want={"reference_kl"})
    with pytest.raises(ModelError, match=r"policy\.reference_logits"):
        policy(**BATCH.inputs, want={"reference_kl"}, reference_hidden=torch.zeros(4, 6, 32))


@pytest.mark.parametrize("start", ["all weights", "last layer", "adapter"])
def test_the_reference_keeps_its_own_projection(start: str) -> None:
    model: Any = FAMILIES["gpt2"]()
    if start == "adapter":
        model = add_lora(model, LoRA(rank=2), seed=0)
    policy = Policy(model)
    if start == "last layer":
        train_last_layers(model, 1)
    reference = Reference(policy)
    policy.reference_logits = reference.projection()
    with reference.active() as before:
        states = hidden_of(before)
    logits = policy.reference_logits(states).detach()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * parameter.requires_grad)
    assert torch.equal(policy.reference_logits(states), logits)
    with reference.active() as after:
        assert torch.equal(hidden_of(after), states)
    moved = policy(**BATCH.inputs, want={"reference_kl"}, reference_hidden=states).reference_kl.detach()
    expected = kl_by_hand(policy.model, FAMILIES["gpt2"]()).detach()
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=1e-5)
    assert float(moved.max()) > 0.1


def test_an_adapter_on_the_output_embedding_is_refused() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    adapted: Any = get_peft_model(FAMILIES["llama"](), config)
    with pytest.raises(ModelError, match="leave it out of the LoRA targets"):
        Reference(Policy(adapted)).projection()
