"""A real, if very small, language model is asked for rewards, and gives more where more is asked for.

One file of scored samples, an offline run per mechanism and seed, and the numbers of ``tropism evaluate
--steerability``, which are printed as rows of a table (``-s``). What must hold of slope, calibration and KL was chosen
before the runs that count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tropism
from openings import HELD_OUT, TRAIN
from tiny_runs import logged
from tropism.algorithms import AlgorithmConfig
from tropism.cli import main
from tropism.scoring import score

pytestmark = [pytest.mark.slow, pytest.mark.learning]

SAMPLING = tropism.Sampling(max_new_tokens=20, batch_size=256)


@pytest.fixture(scope="module")
def scored(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65,536 completions of the model itself, and how warm VADER finds them."""
    path = tmp_path_factory.mktemp("scored") / "stories.jsonl"
    score(TRAIN, "vader", out=path, model=str(stories), n=2048, sampling=SAMPLING, batch_size=16384)
    return path


def run_offline(mechanism: Any, seed: int, scored: Path, stories: Path, folder: Path) -> tropism.Result:
    return tropism.train(
        str(stories),
        tropism.RewardConditioned(mechanism=mechanism, bins=20),
        data=str(scored),
        eval_data=HELD_OUT * 4,
        reward="vader",
        run=folder / "run",
        total_steps=2500,
        prompts_per_step=64,
        seed=seed,
        sampling=SAMPLING,
        trainer=tropism.TrainerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=50, progress=False),
    )


def numbers_of(folder: Path) -> dict[str, Any]:
    """What the command finds on held-out prompts."""
    (folder / "held_out.txt").write_text("\n".join(HELD_OUT))
    asked = ["evaluate", str(folder / "run"), "--data", str(folder / "held_out.txt")]
    assert main([*asked, "--steerability", "--samples-per-prompt", "32"]) == 0
    numbers: dict[str, Any] = json.loads((folder / "run" / "steerability" / "statistics.json").read_text())
    return numbers


def row(mechanism: str, seed: int, numbers: dict[str, Any], seconds: float) -> str:
    def shown(name: str) -> str:
        one = numbers[name]
        return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"

    names = ("spearman", "gap_share", "slope", "calibration_error", "control_mean", "sequence_kl")
    return f"| {mechanism} | {seed} | {' | '.join(map(shown, names))} | {seconds:.0f} |"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mechanism", ["linear", "token", "add"])
def test_more_is_given_where_more_is_asked_for(
    mechanism: str, seed: int, scored: Path, stories: Path, tmp_path: Path
) -> None:
    """``add`` is reported, whatever it does."""
    began = time.monotonic()
    run_offline(mechanism, seed, scored, stories, tmp_path)
    numbers = numbers_of(tmp_path)
    sys.stdout.write("\n" + row(mechanism, seed, numbers, time.monotonic() - began) + "\n")
    if mechanism == "add":
        return
    assert numbers["spearman"]["value"] >= 0.95
    assert numbers["gap_share"]["value"] >= 0.5
    assert 0.4 <= numbers["slope"]["value"] <= 1.2
    assert numbers["calibration_error"]["value"] <= 0.3
    assert numbers["sequence_kl"]["value"] <= 12


def test_quark_goes_further_than_one_offline_round(scored: Path, stories: Path, tmp_path: Path) -> None:
    run_offline("token", 0, scored, stories, tmp_path)
    quark: AlgorithmConfig = tropism.Quark(group_size=16, updates=16, batch_size=64)
    tropism.train(
        str(stories),
        quark,
        data=TRAIN,
        eval_data=HELD_OUT * 4,
        reward="vader",
        run=tmp_path / "quark",
        total_steps=80,  # of 256 completions: a third of those of the offline round
        prompts_per_step=16,
        sampling=SAMPLING,
        trainer=tropism.TrainerConfig(learning_rate=1e-3, progress=False),
    )
    before, offline = (line["eval/reward"] for line in logged(tmp_path / "run", "evaluation"))
    last = logged(tmp_path / "quark", "evaluation")[-1]
    sys.stdout.write(
        f"\nbefore {before:.3f}, one offline round {offline:.3f}, Quark {last['eval/reward']:.3f} "
        f"at {last['eval/sequence_kl']:.2f} nats\n"
    )
    assert last["eval/reward"] > offline
