"""The loss of Quark: hand numbers, and slow sums over the vocabulary with their gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from given_numbers import MASK, ratio_of
from slots_by_hand import logits_by_hand, policy_with, slot_vectors
from slow_sampling import own_logits
from tiny_models import tiny_model
from tropism.algorithms import Quark
from tropism.algorithms.base import RunFacts
from tropism.algorithms.quark import QuarkAlgorithm, QuarkBatch
from tropism.models.policy import Policy
from tropism.ops.slots import slot_id
from tropism.targets.conditioner import Conditioner
from tropism.types import ScoredText, Tokens

TEXTS = [
    ScoredText(prompt_ids=(5, 6), completion_ids=(8, 9, 2), rewards=(0.25,)),
    ScoredText(prompt_ids=(7,), completion_ids=(20, 31), rewards=(0.75,)),
    ScoredText(prompt_ids=(12, 13, 14), completion_ids=(3,), rewards=(0.5,)),
]
TOKENS_OF_TEXTS = [0.0, 2.0, 1.0]
"""What the slots before them hold: 2 is that of the best of three quantiles."""


def built(**changes: Any) -> QuarkAlgorithm:
    config = Quark(quantiles=3, **changes)
    conditioner = Conditioner(config.conditioning)
    return config.build(RunFacts(total_steps=10, max_new_tokens=4, conditioner=conditioner))


class Scoring:
    """A policy as a scorer."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def hidden_states(self, tokens: Tokens) -> Tensor:
        return self.policy(**tokens.inputs, want={"hidden"}).need("hidden")  # type: ignore[no-any-return]


LOGPROBS = torch.tensor([[-1.0, -0.5, -2.0], [-0.25, -1.5, 0.0]])
ENTROPY = torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.25, 9.0]])
KL = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 9.0]])


def given(**columns: Any) -> QuarkBatch:
    return QuarkBatch(
        prompt_ids=torch.tensor([[slot_id(0, 2.0), 5], [slot_id(0, 0.0), 7]]),
        prompt_lengths=torch.tensor([2, 2]),
        completion_ids=torch.tensor([[8, 9, 8], [9, 2, 0]]),
        completion_lengths=torch.tensor([3, 2]),
        loss_mask=MASK,
        **columns,
    )


def answering(asked: dict[str, Any]) -> Any:
    def policy(**arguments: Any) -> SimpleNamespace:
        asked.update(arguments)
        return SimpleNamespace(logprobs=LOGPROBS, entropy=ENTROPY, reference_kl=KL)

    return policy


def test_the_loss_by_hand_numbers() -> None:
    asked: dict[str, Any] = {}
    method, batch = built(), given(reference_hidden=torch.zeros(2, 3, 4))
    sums, ratios = method.loss(answering(asked), batch)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {"nll": 5.25, "kl": 0.05 * 1.0, "entropy": -0.06 * 5.25}
    )
    assert method.weight(batch) == {"nll": 5.0, "kl": 5.0, "entropy": 5.0}
    assert ratio_of(ratios, "policy/ref_kl") == pytest.approx(0.2)
    assert ratio_of(ratios, "policy/entropy") == pytest.approx(1.05)
    assert asked["want"] == {"logprobs", "entropy", "reference_kl"} and asked["entropy_gradient"] is True
    assert asked["reference_hidden"] is batch.reference_hidden and asked["mask"] is batch.loss_mask
    assert "temperature" not in asked


def test_parts_without_weight_are_no_part_of_the_loss() -> None:
    asked: dict[str, Any] = {}
    sums, ratios = built(kl_coef=0.0, entropy_coef=0.0).loss(answering(asked), given())
    assert sums.keys() == {"nll"} and ratios.keys() == {"policy/entropy"}
    assert asked["want"] == {"logprobs", "entropy"} and asked["entropy_gradient"] is False


def slow_parts(policy: Policy, reference: Any) -> dict[str, Tensor]:
    """The three sums over the completion tokens of ``TEXTS``, text by text, token by token, word by word."""
    assert policy.conditioning is not None
    parts = {name: torch.zeros((), dtype=torch.float64) for name in ("nll", "kl", "entropy")}
    for text, token in zip(TEXTS, TOKENS_OF_TEXTS, strict=True):
        ids = [*text.prompt_ids, *text.completion_ids]
        vectors = slot_vectors(policy.conditioning, policy.model, [token])
        p = logits_by_hand(policy.model, vectors, ids).log_softmax(-1)
        q = own_logits(reference, ids).log_softmax(-1)
        for t, chosen in enumerate(text.completion_ids):
            at = len(text.prompt_ids) + t - 1
            after_slot = p[at + 1]
            parts["nll"] = parts["nll"] - after_slot[chosen]
            for word in range(37):
                parts["kl"] = parts["kl"] + after_slot[word].exp() * (after_slot[word] - q[at, word])
                parts["entropy"] = parts["entropy"] - after_slot[word].exp() * after_slot[word]
    return parts


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_loss_and_its_gradient_are_those_of_slow_sums_over_the_vocabulary(family: str) -> None:
    policy = policy_with(family, mechanism="token", bins=3)
    reference = Policy(tiny_model(family, seed=1)).requires_grad_(False)
    policy.reference_logits = reference.logits

    method = built(kl_coef=0.7, entropy_coef=0.3)
    method.take_scores([text.rewards for text in TEXTS])
    scorer: Any = Scoring(reference)
    batch = method.make_batch(TEXTS, range(3), torch.zeros(3, 1), scorer)
    sums, ratios = method.loss(policy, batch)
    slow = slow_parts(policy, reference.model)
    expected = {"nll": slow["nll"], "kl": 0.7 * slow["kl"], "entropy": -0.3 * slow["entropy"]}
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert float(sums[name].detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    assert float(slow["kl"].detach()) > 1
    assert ratio_of(ratios, "policy/ref_kl") == pytest.approx(float(slow["kl"].detach()) / 6, rel=1e-5)
    found = gradients(policy, sums["nll"] + sums["kl"] + sums["entropy"])
    wanted = gradients(policy, expected["nll"] + expected["kl"] + expected["entropy"])
    assert wanted["conditioning.table"].any() and not found.pop("conditioning.open").any()
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=5e-4)
