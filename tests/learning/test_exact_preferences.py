"""DPO and IPO reach the known optimum of their objective on a policy over four completions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import tropism.algorithms.dpo
from enumerable_task import model, tokenizer
from tropism.algorithms import DPO
from tropism.build import Assembly
from tropism.config import Recipe
from tropism.training.config import TrainerConfig

pytestmark = pytest.mark.learning

ARMS = "abc$"
REWARD = {"a": 0.4, "b": -0.5, "c": 1.0, "$": 0.1}
BETA = 0.5
STEPS, RATE = 80, 2e-2


def preference(first: str, second: str) -> float:
    """The share of people who prefer the first, by Bradley and Terry."""
    return 1 / (1 + math.exp(REWARD[second] - REWARD[first]))


def records(share: Callable[[str, str], float]) -> list[dict[str, Any]]:
    """Every ordered pair, weighted by how often it comes out that way."""
    return [
        {"prompt": "a", "chosen": first, "rejected": second, "weight": share(first, second)}
        for first, second in permutations(ARMS, 2)
    ]


def assembled(algorithm: DPO, data: list[dict[str, Any]], folder: Path) -> Assembly:
    """The real trainer, source and method; only the run folder's books are left out."""
    recipe = Recipe(
        model=(model(), tokenizer()),
        algorithm=algorithm,
        data=data,
        run=str(folder / "run"),
        total_steps=STEPS,
        prompts_per_step=len(data),
        trainer=TrainerConfig(learning_rate=RATE, schedule="linear", progress=False),
    )
    assembly = Assembly(recipe)
    assembly.trainer.after_update = lambda metrics, ended: False
    return assembly


@torch.no_grad()
def logprobs(network: Any) -> list[float]:
    """log pi of every completion of the prompt "a", from the model's own logits."""
    result: list[float] = network(input_ids=torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1).tolist()
    return result


def tilted(by: dict[str, float]) -> list[float]:
    """log of pi_ref(y) exp(by[y]), normalised."""
    raised = [logprob + by[arm] for logprob, arm in zip(logprobs(model()), ARMS, strict=True)]
    total = math.log(sum(map(math.exp, raised)))
    return [value - total for value in raised]


def trained(algorithm: DPO, folder: Path, data: list[dict[str, Any]] | None = None) -> list[float]:
    assembly = assembled(algorithm, records(preference) if data is None else data, folder)
    assembly.trainer.fit(STEPS)
    return logprobs(assembly.policy.model)


# Cut to two tokens, a completion is one of the four tokens of the vocabulary, with no eos behind it.
SIGMOID = DPO(beta=BETA, max_length=2)
IPO = DPO(beta=BETA, variant="ipo", max_length=2)


def distance(found: list[float], wanted: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, wanted, strict=True))


def optimum() -> list[float]:
    return tilted({arm: reward / BETA for arm, reward in REWARD.items()})


def test_dpo_reaches_the_optimum_of_the_reward_that_the_preferences_come_from(tmp_path: Path) -> None:
    """pi* proportional to pi_ref exp(r / beta), without ever seeing r."""
    assert distance(logprobs(model()), optimum()) > 0.5
    assert distance(trained(SIGMOID, tmp_path), optimum()) < 0.01


def test_smoothing_stops_where_labels_would_be_flipped_so_often(tmp_path: Path) -> None:
    """So labels that all say the same lead it only to where one in five would be flipped: sigmoid(beta h) = 0.8."""
    certain = [{"prompt": "a", "chosen": "c", "rejected": "b"}]
    found = trained(DPO(beta=BETA, max_length=2, label_smoothing=0.2), tmp_path, certain)
    start = logprobs(model())
    h = (found[2] - start[2]) - (found[1] - start[1])
    assert h == pytest.approx(math.log(0.8 / 0.2) / BETA, rel=0.01)


def test_ipo_reaches_its_optimum(tmp_path: Path) -> None:
    """pi* proportional to pi_ref exp(E over y' of p(y preferred to y') / beta), y' uniform (theorem 1 of the paper)."""
    mean = {arm: sum(preference(arm, other) for other in ARMS) / len(ARMS) for arm in ARMS}
    wanted = tilted({arm: value / BETA for arm, value in mean.items()})
    assert distance(trained(IPO, tmp_path), wanted) < 0.01
    assert distance(wanted, optimum()) > 0.1


def test_ipo_stops_where_certain_labels_would_lead_dpo_on_for_ever(tmp_path: Path) -> None:
    certain = [{"prompt": "a", "chosen": "c", "rejected": "b"}]
    start = logprobs(model())
    leads = {}
    for name, algorithm in (("ipo", IPO), ("sigmoid", SIGMOID)):
        found = trained(algorithm, tmp_path / name, certain)
        leads[name] = (found[2] - start[2]) - (found[1] - start[1])
    assert leads["ipo"] == pytest.approx(1 / (2 * BETA), rel=0.01)
    assert leads["sigmoid"] > 3 * leads["ipo"]


def test_without_a_reference_it_goes_elsewhere(tmp_path: Path) -> None:
    """Log-probs in place of log-ratios: the reference counts as uniform."""
    found = trained(DPO(beta=BETA, max_length=2, reference_free=True), tmp_path)
    raised = [REWARD[arm] / BETA for arm in ARMS]
    total = math.log(sum(map(math.exp, raised)))
    assert distance(found, [value - total for value in raised]) < 0.01


def test_fails_with_the_reference_left_out(tmp_path: Path) -> None:
    assembly = assembled(SIGMOID, records(preference), tmp_path)
    assembly.trainer.source.reference.scorer = None  # type: ignore[attr-defined]
    assembly.trainer.fit(STEPS)
    assert distance(logprobs(assembly.policy.model), optimum()) > 0.1


def test_fails_with_the_weights_left_out(tmp_path: Path) -> None:
    data = [{**record, "weight": 1.0} for record in records(preference)]
    assert distance(trained(SIGMOID, tmp_path, data), optimum()) > 0.5


def test_fails_with_chosen_and_rejected_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tropism.algorithms.dpo.dpo_loss

    def exchanged(chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, **others: Any) -> Any:
        return right(rejected, chosen, ref_rejected, ref_chosen, **others)

    monkeypatch.setattr(tropism.algorithms.dpo, "dpo_loss", exchanged)
    assert distance(trained(SIGMOID, tmp_path), optimum()) > 0.5
