"""DPO: its loss and metrics by hand, its fields, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import tensor

from tiny_models import tiny_model
from tiny_runs import PAIRED, Setting, assemble, execute, logged
from tropism.algorithms import ALGORITHMS, DPO
from tropism.algorithms.base import RunFacts
from tropism.algorithms.dpo import DPOAlgorithm
from tropism.models.policy import Policy
from tropism.preferences import Pair, PairBatch, collate_pairs

FACTS = RunFacts(total_steps=1, max_new_tokens=1)
LOGPROBS = tensor([[-3.0, -8.0], [-6.0, -4.0]])
REFERENCE = tensor([[-4.0, -6.0], [-5.0, -5.0]])


def built(**fields: Any) -> DPOAlgorithm:
    return DPO(**fields).build(FACTS)


def batch(weights: tuple[float, float] = (1.0, 1.0)) -> PairBatch:
    """Two pairs of 2 and 4, and of 3 and 1 tokens."""
    made = collate_pairs(
        [
            Pair(prompt_ids=(5,), chosen_ids=(6, 2), rejected_ids=(7, 8, 9, 2), weight=weights[0]),
            Pair(prompt_ids=(5, 6), chosen_ids=(7, 7, 2), rejected_ids=(2,), weight=weights[1]),
        ]
    )
    return replace(made, ref_logprobs=REFERENCE)


@torch.no_grad()
def logits_of(network: Any, ids: list[int]) -> torch.Tensor:
    """[L, V] log-probs of what follows each token."""
    found: torch.Tensor = network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return found


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# Log-ratios: 1 and -2, and -1 and 1; the chosen one leads by 3 and by -2.
BY_HAND: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "sigmoid": ({"beta": 0.5}, (softplus(-1.5), softplus(1.0))),
    "smoothed": (
        {"beta": 0.5, "label_smoothing": 0.25},
        (0.75 * softplus(-1.5) + 0.25 * softplus(1.5), 0.75 * softplus(1.0) + 0.25 * softplus(-1.0)),
    ),
    "hinge": ({"beta": 0.5, "variant": "hinge"}, (0.0, 2.0)),
    # Per token: 1/2 + 2/4, and -1/3 - 1; each less 1 / (2 beta) = 1.
    "ipo": ({"beta": 0.5, "variant": "ipo"}, (0.0, (-4 / 3 - 1) ** 2)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_by_hand(name: str) -> None:
    fields, (first, second) = BY_HAND[name]
    algorithm = built(**fields)
    sums, _ = algorithm.judge(LOGPROBS, batch())
    assert float(sums["preference"]) == pytest.approx(first + second, rel=1e-5)
    sums, _ = algorithm.judge(LOGPROBS, batch((2.0, 0.5)))
    assert float(sums["preference"]) == pytest.approx(2 * first + 0.5 * second, rel=1e-5)
    assert algorithm.weight(batch((2.0, 0.5))) == {"preference": 2.5}


def test_implicit_rewards_by_hand() -> None:
    _, ratios = built(beta=0.5).judge(LOGPROBS, batch((2.0, 0.5)))
    found = {name: (float(top), float(below)) for name, (top, below) in ratios.items()}
    assert found == {
        "implicit/chosen": (0.0, 2.0),
        "implicit/rejected": (-0.5, 2.0),
        "implicit/margin": (0.5, 2.0),
        "implicit/accuracy": (1.0, 2.0),
    }
    _, ratios = built(beta=0.5).judge(LOGPROBS, batch((1.0, 0.0)))  # what does not count is left out
    assert [float(below) for _, below in ratios.values()] == [1.0] * 4
    assert float(ratios["implicit/margin"][0]) == 1.5


def test_loss_takes_every_token_of_both_completions_from_the_policy() -> None:
    """Against a loop over the model's own logits, one completion at a time."""
    network = tiny_model("gpt2", seed=2)
    made = batch()
    total = 0.0
    for place in range(2):
        prompt = made.prompt_ids[place, 2 - int(made.prompt_lengths[place]) :].tolist()
        leads = []
        for side in range(2):
            completion = made.completion_ids[place, side, : int(made.lengths[place, side])].tolist()
            logits = (
                network(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].detach().double().log_softmax(-1)
            )
            own = sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(completion))
            leads.append(own - float(REFERENCE[place, side]))
        total += softplus(-0.1 * (leads[0] - leads[1]))
    sums, _ = built().loss(Policy(network), made)
    assert float(sums["preference"].detach()) == pytest.approx(total, rel=1e-5)


def test_emptied_pairs_have_no_gradient() -> None:
    policy = Policy(tiny_model("llama", seed=2))
    sums, ratios = built().loss(policy, batch().emptied())
    sums["preference"].backward()
    assert float(sums["preference"].detach()) == 0.0
    assert all(p.grad is None or not bool(p.grad.any()) for p in policy.parameters())
    assert all(float(below) == 0.0 for _, below in ratios.values())


def test_what_it_reads_and_needs() -> None:
    assert ALGORITHMS["dpo"] is DPO
    assert DPO().reads == "pairs" and not DPO().on_policy and DPO().needs_reference
    assert not DPO(reference_free=True).needs_reference
    assert DPO.preset("paper/summaries").beta == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("inf")}, "beta must be positive"),
        ({"variant": "simpo"}, "variant must be sigmoid, ipo or hinge"),
        ({"label_smoothing": 0.6}, "between 0 and 0.5"),
        ({"label_smoothing": 0.1, "variant": "ipo"}, "label_smoothing means nothing for ipo"),
        ({"max_length": 1}, "max_length must be at least 2"),
    ],
)
def test_refused_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**fields)


@pytest.mark.parametrize("adapter", [False, True])
def test_before_the_first_update_the_implicit_rewards_are_zero(adapter: bool, tmp_path: Path) -> None:
    """With an adapter the reference is the same weights with the adapter off, without it a frozen copy."""
    assembly = execute(assemble(Setting("dpo", adapter, "llama"), tmp_path / "run", eval_data=PAIRED))
    assert assembly.reference is not None and assembly.reference.kind == ("disabled" if adapter else "copy")
    first, last = logged(tmp_path / "run", "evaluation")
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    # Both come from the same path, so that nothing is left of rounding.
    assert first["eval/chosen"] == first["eval/rejected"] == first["eval/margin"] == first["eval/accuracy"] == 0.0
    assert last["eval/margin"] > 0 and last["eval/accuracy"] > 0.5 and last["eval/loss"] < first["eval/loss"]
    update = logged(tmp_path / "run", "update")[0]
    assert update["implicit/margin"] == pytest.approx(0.0, abs=1e-5)
    assert update["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)


def test_without_a_reference_none_is_made(tmp_path: Path) -> None:
    setting = Setting("dpo", False, "llama")
    assembly = execute(assemble(setting, tmp_path / "run", algorithm=DPO(reference_free=True)))
    assert assembly.reference is None
    assert assembly.trainer.source.state_dict()[1] == {}  # type: ignore[attr-defined]
    with_adapter = assemble(Setting("dpo", True, "llama"), tmp_path / "adapter", algorithm=DPO(reference_free=True))
    batches = with_adapter.trainer.source.collect(with_adapter.policy)
    assert next(iter(batches)).ref_logprobs.abs().sum() == 0.0
