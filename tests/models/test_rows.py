"""Rows without padding compute what padded rows compute, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny_models import FAMILIES, tiny_model
from tropism.models.heads import ValueHead
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.models.rows import RowsForward, lay_out
from tropism.types import first_with_same_prompt, pad_rows

PADDED = ("gemma2", "bloom", "falcon", "falcon_alibi")
PACKED = [name for name in FAMILIES if name not in PADDED]
"""Gemma 2 caps its attention scores and BLOOM takes no positions: they stay padded."""
WANT = frozenset({"logprobs", "entropy", "values", "bootstrap_values"})


def tokens() -> dict[str, Tensor]:
    """Six completions; rows 0, 2 and 3 share a prompt, 1 and 4 another, longer than the sliding window of 4."""
    long, short = [3, 9, 4, 11, 6, 2, 8], [5, 7]
    prompts = [long, short, long, long, short, [8]]
    completions = [[4, 6, 9, 2, 7], [2], [11, 3, 5, 5], [], [9, 9, 1, 1, 1, 4, 12], [6, 2]]
    return {
        "prompt_ids": pad_rows(prompts, left=True),
        "prompt_lengths": torch.tensor([len(p) for p in prompts]),
        "completion_ids": pad_rows(completions),
        "completion_lengths": torch.tensor([len(c) for c in completions]),
    }


def test_layout_by_hand() -> None:
    ids = torch.tensor([[5, 6, 8, 2], [7, 9, 9, 0], [5, 6, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    rows = lay_out(ids, mask, torch.tensor([2, 1, 2]), torch.tensor([0, 1, 0]))
    assert rows.ids.tolist() == [[5, 6, 8, 2, 7, 9, 9, 3]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 2]]
    assert rows.place.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0], [0, 1, 7, 0]]
    assert rows.source.tolist() == [0, 1, 2, 3, 4, 5, 6, 10]
    assert not rows.aligned


def test_rows_of_one_length_are_the_flat_sequence_already() -> None:
    ids = torch.tensor([[5, 6, 8], [7, 9, 9]])
    rows = lay_out(ids, torch.ones(2, 3).bool(), torch.tensor([1, 1]), torch.tensor([0, 1]))
    assert rows.aligned
    assert rows.ids.tolist() == [[5, 6, 8, 7, 9, 9]]


def test_equal_prompts_are_found_whatever_their_pads() -> None:
    ids = torch.tensor([[0, 5, 6], [9, 5, 6], [0, 0, 6], [4, 5, 6]])
    assert first_with_same_prompt(ids, torch.tensor([2, 2, 1, 3])).tolist() == [0, 0, 2, 3]


def head_for(policy: Policy) -> Policy:
    head = ValueHead(policy.language_model.get_output_embeddings().weight.shape[1])
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(2))
    policy.value_head = head
    return policy


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("family", PACKED)
def test_outputs_and_gradients_are_those_of_padded_rows(family: str, lora: bool) -> None:
    model = tiny_model(family)
    policy = head_for(Policy(add_lora(model, LoRA(rank=2), seed=0) if lora else model))
    assert policy.without_padding
    results = []
    for padding in ("right", "both"):  # "both" keeps the padded forward
        policy.padding = padding  # type: ignore[assignment]
        policy.zero_grad()
        output = policy(**tokens(), temperature=0.7, want=WANT)
        values = [output.need(name) for name in sorted(WANT)]  # type: ignore[type-var]
        weights = [torch.linspace(-1, 2, value.numel()).view(value.shape) for value in values]
        sum((value * weight).sum() for value, weight in zip(values, weights, strict=True)).backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append((values, gradients))
    for ours, own in zip(*(values for values, _ in results), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    assert len(results[0][1]) == len(results[1][1])
    largest = max(float(own.abs().max()) for own in results[1][1])
    for ours, own in zip(*(gradients for _, gradients in results), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("family", PADDED)
def test_families_that_need_padding_keep_it(family: str) -> None:
    policy = Policy(tiny_model(family))
    assert not policy.without_padding
    policy(**tokens())


def test_layers_see_every_prompt_once() -> None:
    policy = Policy(tiny_model("llama"))
    seen = []
    policy.body.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    policy(**tokens())
    assert seen == [(1, 7 + 2 + 1 + 5 + 1 + 4 + 0 + 7 + 2)]


def test_the_models_own_attention_is_left_as_it_was() -> None:
    policy = Policy(tiny_model("llama"))
    before = policy.config._attn_implementation
    policy(**tokens())
    assert policy.config._attn_implementation == before
    with pytest.raises(IndexError):
        policy(**{**tokens(), "completion_ids": tokens()["completion_ids"] + 10_000})
    assert policy.config._attn_implementation == before


def test_a_chosen_attention_stays() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flex_attention"
    policy = Policy.__new__(Policy)
    torch.nn.Module.__init__(policy)
    policy.model, policy.takes_positions = model, True
    assert not RowsForward(policy).works


def test_with_recomputed_activations_rows_stay_padded() -> None:
    model = tiny_model("llama")
    policy = Policy(model)
    model.gradient_checkpointing_enable()
    assert not policy.without_padding
