"""Frozen blocks whose output is kept change nothing but the time that a pass takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import FAMILIES, tiny_model
from tropism.errors import ModelError
from tropism.models.conditioning import RewardSlots
from tropism.models.freezing import train_last_layers, transformer_blocks
from tropism.models.heads import ValueHead
from tropism.models.policy import Padding, Policy
from tropism.models.reference import Reference
from tropism.models.trunk import FrozenTrunk
from tropism.types import Tokens

ROWS = Tokens(
    prompt_ids=torch.tensor([[0, 5, 9], [12, 13, 30], [12, 13, 30], [0, 0, 7]]),
    prompt_lengths=torch.tensor([2, 3, 3, 1]),
    completion_ids=torch.tensor([[8, 2, 0], [3, 20, 31], [3, 21, 0], [0, 0, 0]]),
    completion_lengths=torch.tensor([2, 3, 2, 0]),
)
"""Ragged rows, two of one prompt, and one without a completion."""
PARTS = [torch.tensor([0, 1]), torch.tensor([3, 2])]


def policy_of(family: str, layers: int = 1, **config: Any) -> Policy:
    policy = Policy(tiny_model(family, **config), value_head=ValueHead(16 if family == "opt" else 32))
    train_last_layers(policy.model, layers)  # type: ignore[arg-type]
    FrozenTrunk.attach(policy, layers)
    return policy


def trunk_of(policy: Policy) -> FrozenTrunk:
    assert policy.trunk is not None
    return policy.trunk


def computed(policy: Policy, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs and values of some rows, and the gradients of a loss on both."""
    policy.zero_grad()
    output = policy(**ROWS.select(rows).inputs, want={"logprobs", "values", "bootstrap_values"}, temperature=0.7)
    (output.need("logprobs").sum() + output.need("values").square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return output.need("logprobs").detach(), output.need("bootstrap_values").detach(), gradients


def forbid(policy: Policy) -> None:
    """Let the frozen blocks of a policy fail if anything in them computes."""
    for block in trunk_of(policy).blocks:
        for part in block.children():
            part.register_forward_pre_hook(_fail)


def _fail(*_: Any) -> None:
    raise AssertionError("a frozen block computes")


@pytest.mark.parametrize("padding", ["right", "left", "both"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [0, 1])
def test_log_probs_and_gradients_are_those_of_the_ordinary_pass(family: str, padding: Padding, layers: int) -> None:
    policy = policy_of(family, layers)
    policy.padding = padding
    trunk = trunk_of(policy)
    assert trunk.reason is None and len(trunk.blocks) == 2 - layers
    every = [torch.tensor([2, 0]), torch.tensor([1, 3, 2])]
    expected = [computed(policy, rows) for rows in every]
    trunk.keep(ROWS, PARTS)
    forbid(policy)
    for rows, (logprobs, after, gradients) in zip(every, expected, strict=True):
        found = computed(policy, rows)
        assert torch.allclose(found[0], logprobs, rtol=0, atol=1e-5)
        assert torch.allclose(found[1], after, rtol=0, atol=1e-5)
        assert found[2].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(found[2][name], gradient, rtol=1e-5, atol=1e-5), name
    assert not any("forward" in vars(block) for block in trunk.blocks)


def test_what_is_kept_holds_shared_prompts_once_and_is_forgotten() -> None:
    policy = policy_of("gpt2")
    trunk = trunk_of(policy)
    trunk.keep(ROWS, PARTS)
    assert trunk.features.states is not None
    # Pads, three different prompts, and the completions of four rows.
    assert trunk.features.states.shape == (1 + (2 + 3 + 1) + (2 + 3 + 2 + 0), 32)
    assert trunk.needed(ROWS) == 14 * 32 * 4
    trunk.keep(ROWS, PARTS)
    trunk.drop()
    assert trunk.features.states is None
    forbid(policy)
    with pytest.raises(AssertionError, match="a frozen block computes"):
        computed(policy, torch.tensor([0]))


def test_a_row_that_is_not_known_takes_the_ordinary_pass() -> None:
    policy = policy_of("llama")
    rows = torch.tensor([0, 3])
    expected = computed(policy, rows)
    trunk_of(policy).keep(ROWS.select(torch.tensor([0, 1])), [torch.arange(2)])
    found = computed(policy, rows)
    assert torch.equal(found[0], expected[0])
    forbid(policy)
    with pytest.raises(AssertionError, match="a frozen block computes"):
        computed(policy, rows)
    computed(policy, torch.tensor([0, 1]))


def test_the_reference_uses_the_same_after_the_policy_has_moved() -> None:
    policy = policy_of("gpt2")
    reference = Reference(policy)
    expected = computed(policy, torch.arange(3))[0]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trunk_of(policy).keep(ROWS, PARTS)
    with reference.active() as frozen, torch.no_grad():
        forbid(frozen)
        found = frozen(**ROWS.select(torch.arange(3)).inputs, temperature=0.7).need("logprobs")
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(computed(policy, torch.arange(3))[0], expected, atol=1e-2)


def test_pitfall_18_blocks_that_are_trained_after_all_are_not_kept() -> None:
    policy = policy_of("llama")
    train_last_layers(policy.model, 2)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="blocks that were frozen when the policy was made are trained now"):
        trunk_of(policy).keep(ROWS, PARTS)


def test_where_it_cannot_work_the_reason_is_said() -> None:
    assert trunk_of(policy_of("llama", 2)).reason == "no block is frozen"
    slots = Policy(tiny_model("llama"), conditioning=RewardSlots("linear", rewards=1, bins=1, base_id=0, size=32))
    train_last_layers(slots.model, 1)  # type: ignore[arg-type]
    FrozenTrunk.attach(slots, 1)
    assert trunk_of(slots).reason == "prompts hold reward slots, whose embeddings are trained"
    odd = Policy(tiny_model("llama"))
    train_last_layers(odd.model, 1)  # type: ignore[arg-type]
    first = transformer_blocks(odd.model)[0]  # type: ignore[arg-type]
    compute = first.forward
    first.forward = lambda *given, **named: Odd({"hidden": compute(*given, **named)})
    transformer_blocks(odd.model)[1].register_forward_pre_hook(  # type: ignore[arg-type]
        lambda _, given: (given[0]["hidden"] if isinstance(given[0], dict) else given[0], *given[1:])
    )
    FrozenTrunk.attach(odd, 1)
    assert trunk_of(odd).reason == "LlamaForCausalLM does not allow it: its blocks return values of the type Odd"


class Odd(dict[str, Tensor]):
    """What no block of the library's families returns."""


def test_recomputed_activations_take_the_ordinary_pass() -> None:
    policy = policy_of("llama")
    expected = computed(policy, torch.arange(3))
    trunk_of(policy).keep(ROWS, PARTS)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    train_last_layers(policy.model, 1)  # type: ignore[arg-type]
    policy.train()
    found = computed(policy, torch.arange(3))
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)
    forbid(policy)
    with pytest.raises(AssertionError, match="a frozen block computes"):
        computed(policy, torch.arange(3))
