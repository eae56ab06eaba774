"""Where training and gold reward part: hand-made runs, and how often a parting is claimed where there is none."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tropism.commands.comparison import show_parting
from tropism.errors import DataError
from tropism.evaluation.over_optimisation import (
    OverOptimisation,
    StopAdvice,
    over_optimisation,
    parting,
    planned_by,
)
from tropism.evaluation.over_optimisation_section import gold_chart, over_optimisation_section
from tropism.evaluation.report import write_report
from tropism.evaluation.run_folder import Evaluation, RunData

Floats = NDArray[np.float64]


def run_of(proxy: Floats, gold: Floats, *, steps: list[int] | None = None) -> RunData:
    """A run of evaluations [K, N]."""
    count = proxy.shape[1]
    evaluations = [
        Evaluation(
            step=steps[row] if steps else 10 * row,
            prompts=[f"prompt {index}" for index in range(count)],
            completions=["text"] * count,
            rewards=proxy[row],
            lengths=np.ones(count),
            sequence_kl=np.zeros(count),
            finish_reasons=["eos"] * count,
            metrics={"gold": gold[row]},
        )
        for row in range(len(proxy))
    ]
    return RunData(folder=Path("runs/made"), evaluations=evaluations)


def found_in(proxy: Floats, gold: Floats, **options: Any) -> OverOptimisation:
    found = over_optimisation(run_of(proxy, gold), **options)
    assert found is not None
    return found


def curves(proxy: list[float], gold: list[float], *, prompts: int = 40, noise: float = 0.05) -> tuple[Floats, Floats]:
    """Means along the evaluations, and noise of prompts and completions around them."""
    rng = np.random.default_rng(3)
    easy = rng.normal(0, 0.5, prompts)
    made = [np.array([mean + easy + rng.normal(0, noise, prompts) for mean in means]) for means in (proxy, gold)]
    return made[0], made[1]


def test_rewards_that_part() -> None:
    """Gold rises to step 20, holds at 30, and falls from 40 on; the proxy rises all along."""
    found = found_in(*curves([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.3, 0.5, 0.48, 0.2, -0.1]))
    assert (found.verdict, found.best, found.parted) == ("parted", 20, 30)
    assert found.comparisons == 15
    assert found.fall is not None and found.fall.mean == pytest.approx(-0.6, abs=0.05)
    assert found.rise is not None and found.rise.mean == pytest.approx(0.6, abs=0.05)
    assert "part after step 30" in found.sentence


def test_both_rise() -> None:
    found = found_in(*curves([0.0, 0.2, 0.4, 0.6], [0.0, 0.1, 0.2, 0.3]))
    assert (found.verdict, found.parted, found.best) == ("not parted", None, 30)
    assert "No parting" in found.sentence


def test_a_fall_that_is_made_good_is_no_parting() -> None:
    found = found_in(*curves([0.0, 0.2, 0.4, 0.6], [0.5, 0.5, 0.0, 0.5]))
    assert found.verdict == "not parted"


def test_a_run_that_breaks_loses_both() -> None:
    found = found_in(*curves([0.0, 0.5, 0.2, -0.5], [0.0, 0.5, 0.2, -0.5]))
    assert (found.verdict, found.parted) == ("fell", None)
    assert "did not rise" in found.sentence


def test_a_dip_within_the_noise_is_no_parting() -> None:
    """0.02 less with a deviation of differences of 0.07 over 40 prompts: t is about 1.8."""
    found = found_in(*curves([0.0, 0.5, 1.0], [0.0, 0.5, 0.48]))
    assert found.verdict == "not parted"


def test_the_bound_by_hand() -> None:
    """Ten differences of mean -1 and deviation d are below 0 for d up to sqrt(10) / q.

    Two evaluations are one comparison, so q is the 95 % quantile of Student's distribution with 9 degrees of freedom,
    1.833 in any table; three are three comparisons, so that it is the quantile at 1 - 0.05 / 3, 2.510.
    """

    def gold(deviation: float) -> Floats:
        sample = np.array([-1.0, 1.0] * 5)
        return np.array([np.zeros(10), -1 + deviation * sample / sample.std(ddof=1)])

    proxy = np.array([np.zeros(10), np.ones(10)])
    for planned, quantile in ((2, 1.833), (3, 2.510)):
        limit = math.sqrt(10) / quantile
        assert found_in(proxy, gold(0.99 * limit), planned=planned).verdict == "parted"
        assert found_in(proxy, gold(1.01 * limit), planned=planned).verdict == "not parted"


def test_too_few_prompts_or_evaluations() -> None:
    proxy, gold = curves([0.0, 1.0], [1.0, 0.0], prompts=9)
    assert found_in(proxy, gold).verdict == "too few"
    proxy, gold = curves([0.0], [1.0])
    assert found_in(proxy, gold).verdict == "too few"
    assert "cannot be said" in found_in(proxy, gold).sentence


def test_without_two_rewards_there_is_nothing_to_compare() -> None:
    proxy, gold = curves([0.0, 1.0], [0.0, 1.0])
    assert over_optimisation(run_of(np.full_like(proxy, math.nan), gold)) is None
    assert over_optimisation(run_of(proxy, np.full_like(gold, math.nan))) is None


def test_prompts_that_are_unscored_are_left_out() -> None:
    proxy, gold = curves([0.0, 0.5, 1.0], [0.5, 0.5, 0.0])
    gold[1, :5], gold[2, 3:8], proxy[0, 0] = math.nan, math.inf, -math.inf
    assert found_in(proxy, gold).verdict == "parted"


def test_an_evaluation_of_few_scored_prompts_is_not_the_best() -> None:
    """Three prompts that score 9 at step 20 hide neither the parting after step 10, nor that nothing falls."""
    proxy, gold = curves([0.0, 0.5, 0.7, 1.0], [0.0, 0.5, 0.2, -0.2])
    gold[2], gold[2, :3] = math.nan, 9.0
    found = found_in(proxy, gold)
    assert (found.verdict, found.best) == ("parted", 10)
    proxy, gold = curves([0.0, 0.5, 0.7, 1.0], [0.0, 0.1, 0.2, 0.3])
    gold[2], gold[2, :3] = math.nan, 9.0
    assert (found_in(proxy, gold).verdict, found_in(proxy, gold).best) == ("not parted", 30)


def test_evaluations_of_different_prompts_are_refused() -> None:
    run = run_of(*curves([0.0, 1.0], [0.0, 1.0]))
    run.evaluations[1].prompts[0] = "another"
    with pytest.raises(DataError, match="steps 0 and 10"):
        over_optimisation(run)


@pytest.mark.parametrize("gold_rises", [False, True])
def test_no_parting_is_claimed_where_there_is_none(gold_rises: bool) -> None:
    """In at most 5 % of runs, looking after every evaluation; 400 runs of 10 evaluations on 30 prompts.

    The worst case is a gold reward that stays where it is; one that rises makes a claim rarer still.
    """
    rng = np.random.default_rng(11)
    claimed = 0
    for _ in range(400):
        easy = rng.exponential(1.0, 30)
        drift = np.linspace(0, 0.2 if gold_rises else 0.0, 10)
        gold = easy + drift[:, None] + rng.normal(0, 0.5, (10, 30))
        proxy = easy + np.linspace(0, 2, 10)[:, None] + rng.normal(0, 0.5, (10, 30))
        looks = (parting(list(proxy[: k + 1]), list(gold[: k + 1]), planned=10) for k in range(1, 10))
        claimed += any(look.verdict == "parted" for look in looks)
    assert claimed / 400 <= 0.05


def test_a_parting_is_found_where_there_is_one() -> None:
    """The same noise; gold falls by one deviation of a completion over the last five evaluations."""
    rng = np.random.default_rng(12)
    right = 0
    for _ in range(60):
        easy = rng.exponential(1.0, 30)
        course = np.concatenate([np.linspace(0, 0.5, 5), np.linspace(0.4, -0.5, 5)])
        gold = easy + course[:, None] + rng.normal(0, 0.5, (10, 30))
        proxy = easy + np.linspace(0, 2, 10)[:, None] + rng.normal(0, 0.5, (10, 30))
        found = parting(list(proxy), list(gold))
        right += found.verdict == "parted" and found.last_before in (4, 5, 6, 7, 8)
    assert right >= 54


# Files ---------------------------------------------------------------------------------------------------------------


def write(folder: Path, proxy: Floats, gold: Floats) -> Path:
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("algorithm: grpo\n")
    for row in range(len(proxy)):
        count = proxy.shape[1]
        columns = {
            "prompt": [f"prompt {index}" for index in range(count)],
            "completion": ["text"] * count,
            "length": [1] * count,
            "sequence_kl": [0.0] * count,
            "finish_reason": ["eos"] * count,
            "reward": proxy[row],
            "metric/gold": gold[row],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "evaluations" / f"step-{10 * row:06d}.parquet")
    return folder


def test_the_advice_to_stop_comes_once(tmp_path: Path) -> None:
    proxy, gold = curves([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.3, 0.5, 0.48, 0.2, -0.1])
    folder = write(tmp_path / "run", proxy, gold)
    advice_of = StopAdvice(folder, planned=6)
    advice = {step: advice_of(step) for step in range(0, 60, 10)}
    assert [step for step, said in advice.items() if said] == [40]
    assert str(advice[40]).startswith("stop advice: Training and gold reward part after step 30")
    assert "weights of step 20" in str(advice[40])


def test_advice_that_cannot_be_given_is_said_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", *curves([0.0, 0.2, 0.4], [0.0, 0.3, 0.5]))
    path = folder / "evaluations" / "step-000010.parquet"
    table = pyarrow.parquet.read_table(path)
    others = pyarrow.array([f"another {index}" for index in range(len(table))])
    pyarrow.parquet.write_table(table.set_column(0, "prompt", others), path)
    advice_of = StopAdvice(folder, planned=3)
    said = advice_of(10)
    assert said is not None and "cannot be said" in said and "steps 0 and 10" in said
    assert advice_of(20) is None
    page = write_report(folder).read_text()
    assert "Is the reward being gamed?" in page and "hold different prompts" in page and "Recipe as resolved" in page


@pytest.mark.parametrize(
    ("recipe", "planned"),
    [
        ("total_steps: 40\ntrainer: {evaluation: {every: 15}}", 4),  # after 0, 15, 30 and 40
        ("total_steps: 40", 2),
        ("algorithm: grpo", None),
        ("total_steps: [1]", None),
        ("total_steps: 40\ntrainer: {evaluation: {every: 0}}", None),
        ("- a: [", None),
        ("", None),
    ],
)
def test_the_evaluations_that_a_folder_plans(recipe: str, planned: int | None) -> None:
    assert planned_by(RunData(folder=Path("runs/made"), recipe=recipe)) == planned


def test_an_unfinished_run_is_reported_by_the_bound_of_its_end(tmp_path: Path) -> None:
    """Three evaluations of 21 that are planned are 210 pairs, not 3."""
    folder = write(tmp_path / "run", *curves([0.0, 0.2, 0.4], [0.0, 0.3, 0.1]))
    (folder / "recipe.yaml").write_text("total_steps: 200\ntrainer:\n  evaluation: {every: 10}\n")
    (section,) = over_optimisation_section(RunData.read(folder))
    assert "accounts for all 210 pairs" in section.body
    out = Console(file=io.StringIO(), width=300)
    show_parting(out, folder)
    assert "part" in out.file.getvalue()  # type: ignore[attr-defined]


# The section of the report --------------------------------------------------------------------------------------------


def test_the_section_marks_the_step(tmp_path: Path) -> None:
    """Both curves are changes since the start, in standard deviations."""
    folder = write(tmp_path / "run", *curves([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.3, 0.5, 0.48, 0.2, -0.1]))
    run = RunData.read(folder)
    (section,) = over_optimisation_section(run)
    assert list(section.pictures) == ["gold-reward.png"]
    body = str(section.body)
    assert "they part after step 30" in body and body.count("<svg") >= 1 and "accounts for all 15 pairs" in body
    found = over_optimisation(run)
    assert found is not None
    proxy, gold, mark = gold_chart(found).series
    assert proxy.y[0] == gold.y[0] == 0 and list(mark.x) == [30, 30] and mark.kind == "rule"
    assert proxy.y[-1] * found.spread[0] == pytest.approx(1.0, abs=0.05)
    assert gold.y[-1] * found.spread[1] == pytest.approx(-0.1, abs=0.05)


def test_a_run_without_a_gold_reward_has_no_section(tmp_path: Path) -> None:
    proxy, gold = curves([0.0, 1.0], [0.0, 1.0])
    folder = write(tmp_path / "run", proxy, np.full_like(gold, math.nan))
    assert over_optimisation_section(RunData.read(folder)) == []
