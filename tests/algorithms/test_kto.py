"""KTO: its loss and metrics by hand, its fields, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import tensor

from tiny_models import tiny_model
from tiny_runs import LIKED, Setting, assemble, execute, logged
from tropism.algorithms import ALGORITHMS, KTO
from tropism.algorithms.base import RunFacts
from tropism.algorithms.kto import KTOAlgorithm
from tropism.errors import ConfigError, DataError
from tropism.models.policy import Policy
from tropism.preferences import Opinion, OpinionBatch, collate_opinions

FACTS = RunFacts(total_steps=1, max_new_tokens=1)
LOGPROBS, REFERENCE = tensor([-3.0, -6.0, -2.0]), tensor([-5.0, -5.0, -5.0])


def built(**fields: Any) -> KTOAlgorithm:
    return KTO(**fields).build(FACTS)


def batch() -> OpinionBatch:
    made = collate_opinions(
        [
            Opinion(prompt_ids=(5,), completion_ids=(6, 2), liked=True),
            Opinion(prompt_ids=(5, 6), completion_ids=(7, 7, 2), liked=False),
            Opinion(prompt_ids=(4,), completion_ids=(2,), liked=False),
        ]
    )
    return replace(made, ref_logprobs=REFERENCE, reference_points=torch.full((3,), 1.0))


@torch.no_grad()
def logits_of(network: Any, ids: list[int]) -> torch.Tensor:
    """[L, V] log-probs of what follows each token."""
    found: torch.Tensor = network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Log-ratios 2, -1 and 3, against a reference point of 1.
LOSSES = [2 * (1 - sigmoid(0.5)), 3 * (1 - sigmoid(1.0)), 3 * (1 - sigmoid(-1.0))]
FIELDS = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}


def test_loss_by_hand() -> None:
    algorithm = built(**FIELDS)
    sums, _ = algorithm.judge(LOGPROBS, batch())
    assert float(sums["opinion"]) == pytest.approx(sum(LOSSES), rel=1e-5)
    # The number of opinions, whatever they weigh, as in the paper.
    assert algorithm.weight(batch()) == {"opinion": 3.0}


def test_implicit_rewards_by_hand() -> None:
    _, ratios = built(**FIELDS).judge(LOGPROBS, batch())
    found = {name: (float(top), float(below)) for name, (top, below) in ratios.items()}
    assert found == {
        "implicit/liked": (1.0, 1.0),
        "implicit/disliked": (1.0, 2.0),
        "implicit/margin": (0.5, 3.0),  # 0.5 + 1 - 1
        "implicit/accuracy": (2.0, 3.0),
        "implicit/reference_point": (1.5, 3.0),
    }


def test_loss_takes_every_token_from_the_policy() -> None:
    """Against a loop over the model's own logits, one completion at a time."""
    network, made = tiny_model("gpt2", seed=2), batch()
    total = 0.0
    for place, liked in enumerate((True, False, False)):
        prompt = made.prompt_ids[place, 2 - int(made.prompt_lengths[place]) :].tolist()
        completion = made.completion_ids[place, : int(made.completion_lengths[place])].tolist()
        logits = logits_of(network, [*prompt, *completion])
        own = sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(completion))
        ahead = 0.1 * (own - float(REFERENCE[place]) - 1.0)
        total += 1 - sigmoid(ahead if liked else -ahead)
    sums, _ = built().loss(Policy(network), made)
    assert float(sums["opinion"].detach()) == pytest.approx(total, rel=1e-5)


def test_emptied_opinions_count_nothing() -> None:
    policy = Policy(tiny_model("llama", seed=2))
    emptied = batch().emptied()
    sums, ratios = built().loss(policy, emptied)
    assert float(sums["opinion"].detach()) == 0.0 and built().weight(emptied) == {"opinion": 0.0}
    assert all(float(below) == 0.0 for _, below in ratios.values())


def test_what_it_reads_and_needs() -> None:
    assert ALGORITHMS["kto"] is KTO
    assert KTO().reads == "opinions" and not KTO().on_policy and KTO().needs_reference


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": 0.0}, "desirable_weight must be positive"),
        ({"undesirable_weight": -1.0}, "undesirable_weight must be positive"),
        ({"max_length": 1}, "max_length must be at least 2"),
    ],
)
def test_refused_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTO(**fields)


def test_before_the_first_update_everything_is_at_the_reference_point(tmp_path: Path) -> None:
    execute(assemble(Setting("kto", True, "llama"), tmp_path / "run", algorithm=KTO(), eval_data=LIKED))
    first, last = logged(tmp_path / "run", "evaluation")
    assert first["eval/loss"] == 0.5  # 1 - sigmoid(0)
    assert first["eval/liked"] == first["eval/disliked"] == first["eval/reference_point"] == 0.0
    assert last["eval/loss"] < 0.5 and last["eval/liked"] > last["eval/disliked"]


def test_one_opinion_per_step_has_no_reference_point(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts_per_step is 1.*set it to 2 or more"):
        assemble(Setting("kto", False, "llama"), tmp_path / "run", prompts_per_step=1)


def test_opinions_that_are_all_alike_are_refused(tmp_path: Path) -> None:
    liked = [{**item, "label": True} for item in LIKED]
    with pytest.raises(DataError, match="all 6 labels to train on are true"):
        assemble(Setting("kto", False, "llama"), tmp_path / "run", data=liked)
