"""Reward models, their scale, and PPO on one of them: two processes on two machines do what one does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distributed.reward_models import CASES, STEPS, run_all
from tiny_runs import assert_same, logged
from two_started import start_two

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("reward_models.py")
REWARD_MODELS = ("choice", "rating-lora")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of one process, and of two."""
    folder = tmp_path_factory.mktemp("reward-models")
    (folder / "two").mkdir()
    start_two(SCRIPT, folder / "two")
    (folder / "one").mkdir()
    run_all(folder / "one")
    return folder / "one", folder / "two"


def noted(folder: Path, case: str, rank: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / f"{case}-rank-{rank}.json").read_text())
    return facts


@pytest.mark.parametrize("case", CASES)
def test_every_metric_is_that_of_one_process(case: str, runs: tuple[Path, Path]) -> None:
    for kind in ("update", "collect", "evaluation"):
        one, two = (logged(folder / case, kind) for folder in runs)
        assert len(one) == len(two) and (one or kind != "update")
        for single, double in zip(one, two, strict=True):
            assert single.keys() == double.keys()
            assert single.pop("kind") == double["kind"]
            for name, value in single.items():
                # Losses of advantages that cancel are differences of numbers around one.
                tolerance = 2e-5 if name.startswith("loss/") else 1e-5
                if case == "choice" and name == "score/mean":
                    tolerance = STEPS * 1e-4  # choices say nothing of a constant, which Adam moves by rounding
                if value is None:  # no number, such as the diversity of one word
                    assert double[name] is None
                else:
                    assert double[name] == pytest.approx(value, rel=1e-4, abs=tolerance), (kind, name)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_one_process(case: str, runs: tuple[Path, Path]) -> None:
    """Gain and bias are among them."""
    one, two = (load_file(folder / f"{case}-rank-0.safetensors") for folder in runs)
    assert case == "ppo" or {"gain", "bias"} <= one.keys()
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) < 1e-5 * max(1.0, float(value.abs().max())), name
    assert_same(two, load_file(runs[1] / f"{case}-rank-1.safetensors"))


def test_pitfall_39_every_process_has_the_coefficient_of_the_whole_collect(runs: tuple[Path, Path]) -> None:
    """Processes that are not the first never moved it in seed 5's code, so that each optimised another reward."""
    alone, first, second = noted(runs[0], "ppo", 0), noted(runs[1], "ppo", 0), noted(runs[1], "ppo", 1)
    assert first["coefficients"] == second["coefficients"] and len(first["coefficients"]) == STEPS
    assert first["state"] == second["state"]
    coefficients = [state["kl_coef"] for state in alone["coefficients"]]
    assert len(set(coefficients)) == STEPS
    assert [state["kl_coef"] for state in first["coefficients"]] == pytest.approx(coefficients, rel=1e-5)


@pytest.mark.parametrize("case", REWARD_MODELS)
def test_pitfall_42_processes_share_one_permutation(case: str, runs: tuple[Path, Path]) -> None:
    """Each judgement of a step is computed by one process, by its rank among all; the local rank of both is 0."""
    alone, first, second = noted(runs[0], case, 0), noted(runs[1], case, 0), noted(runs[1], case, 1)
    steps = list(zip(alone["texts"], first["texts"], second["texts"], strict=True))[:STEPS]
    assert len(steps) == STEPS
    for whole, some, others in steps:
        assert len(whole) == 5 and some and others
        assert sorted(map(texts, some + others)) == sorted(map(texts, whole))
    drawn = Counter(texts(item) for whole, _, _ in steps for item in whole)
    assert len(drawn) == (6 if case == "choice" else 18)
    assert max(drawn.values()) - min(drawn.values()) == 1  # none comes again before all others have


def texts(item: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """The rows of ids of a judgement without pads, of which batches have different numbers."""
    return tuple(tuple(i for i in row if i) for row in item)


@pytest.mark.parametrize("case", REWARD_MODELS)
def test_pitfall_43_gain_bias_and_the_scale_are_those_of_all_processes(case: str, runs: tuple[Path, Path]) -> None:
    """Their gradients are added up, and so is what the scale is measured on."""
    alone, first, second = noted(runs[0], case, 0), noted(runs[1], case, 0), noted(runs[1], case, 1)
    for name in ("gain", "bias"):
        assert first[name] == second[name] and len(first[name]) == STEPS
        assert first[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6)
    assert max(map(abs, alone["gain"])) > 1e-3
    environments = [json.loads((folder / case / "environment.json").read_text()) for folder in runs]
    for when in ("normalised_before", "normalised_after"):
        one, two = (environment[when] for environment in environments)
        assert one["gain"] != 1.0
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
