from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tropism.errors import DataError
from tropism.evaluation.number_texts import change_text, interval_text
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.evaluation.statistics import Interval
from tropism.evaluation.summary import sample_pairs, summarise, summary_rows

COUNT = 40


def evaluation(
    step: int, rewards: list[float] | float, *, kl: float = 0.0, texts: list[str] | None = None
) -> Evaluation:
    values = np.full(COUNT, rewards) if isinstance(rewards, float) else np.array(rewards)
    plain = [f"text {index} with own words{index} and end{index}" for index in range(len(values))]
    return Evaluation(
        step=step,
        prompts=[f"prompt {index}" for index in range(len(values))],
        completions=texts or plain,
        rewards=values,
        lengths=np.full(len(values), 10.0),
        sequence_kl=np.full(len(values), kl),
        finish_reasons=["eos"] * len(values),
        terms={"vader": values},
    )


def run(*evaluations: Evaluation, best: int | None = None) -> RunData:
    metrics = [] if best is None else [{"best/step": best}]
    return RunData(folder=Path("runs/test"), evaluations=list(evaluations), metrics=metrics)


def test_numbers_of_a_small_run() -> None:
    before, after = evaluation(0, [0.0] * 20 + [1.0] * 20), evaluation(5, [1.0] * 20 + [1.5] * 20, kl=4.0)
    summary = summarise(run(before, after))
    assert summary.after is not None
    assert summary.before.reward is not None
    assert summary.change is not None
    assert (summary.before.step, summary.after.step) == (0, 5)
    assert summary.before.reward.mean == pytest.approx(0.5)
    assert summary.change.mean == pytest.approx(0.75)
    assert 0.6 < summary.change.low < summary.change.high < 0.9
    assert summary.after.kl_per_token == pytest.approx(0.4)
    assert summary.after.finish_reasons == {"eos": 1.0}
    assert summary.term_changes["vader"] == summary.change
    assert summary.kl_level == "low"
    assert summary.cautions == ()


def test_an_honest_and_a_hacked_run_look_different(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    warm = summarise(RunData.read(write_run(tmp_path / "warm")))
    hacked = summarise(RunData.read(write_run(tmp_path / "hacked", hacked=True, prompts=80)))
    assert (warm.kl_level, hacked.kl_level) == ("low", "extreme")
    assert warm.cautions == ()
    said = " ".join(hacked.cautions)
    assert "nats, far above 10 nats" in hacked.cautions[0]
    assert "do not trust the reward" in hacked.cautions[0]
    assert "Diversity fell by more than half" in said
    assert "reciting" in said


@pytest.mark.parametrize(
    ("after", "caution"),
    [
        (evaluation(5, 1.0, kl=12.0), "Sequence KL is 12.0 nats, above 10 nats: read the samples"),
        (evaluation(5, 1.0, kl=-2.0), "below 0 (-2.00 nats), which no KL can be"),
        (evaluation(5, [0.4, 0.6] * 20), "includes 0"),
        (evaluation(5, 0.2), "The held-out reward fell: -0.300"),
        (evaluation(5, 1.0, texts=["same words every time"] * COUNT), "share of distinct completions fell"),
        (evaluation(5, 1.0, texts=[f"go on {i} " * 5 for i in range(COUNT)]), "Completions repeat themselves: 77%"),
        (evaluation(5, [math.nan] + [1.0] * (COUNT - 1)), "1 of 40 completions got no reward"),
        (evaluation(5, math.nan), "No prompt was scored both before and after"),
        (dataclasses.replace(evaluation(5, 1.0), lengths=np.full(COUNT, 25.0)), "from 10 to 25 tokens"),
    ],
)
def test_cautions(after: Evaluation, caution: str) -> None:
    cautions = summarise(run(evaluation(0, 0.5), after)).cautions
    assert any(caution in one for one in cautions), cautions


def test_few_prompts_are_said() -> None:
    summary = summarise(run(evaluation(0, [0.1, 0.2, 0.3]), evaluation(1, [0.5, 0.6, 0.9])))
    assert any("only 3 held-out prompts" in one for one in summary.cautions)


def test_the_best_step_is_preferred_and_said() -> None:
    evaluations = [evaluation(0, 0.1), evaluation(5, 0.9), evaluation(10, 0.5)]
    summary = summarise(run(*evaluations, best=5))
    assert summary.after is not None
    assert summary.after.step == 5
    assert summary.cautions == ("The best step, 5, is shown; training went on to step 10.",)
    absent = summarise(run(*evaluations, best=7))
    assert absent.after is not None
    assert absent.after.step == 10
    assert "has no evaluation file" in absent.cautions[0]


def test_the_best_may_be_the_start() -> None:
    summary = summarise(run(evaluation(0, 0.9), evaluation(5, 0.1), best=0))
    assert summary.after is not None
    assert summary.after.step == 5
    assert any("No evaluation was better than the model before training" in one for one in summary.cautions)


def test_one_evaluation_is_a_start() -> None:
    summary = summarise(run(evaluation(0, 0.1)))
    assert (summary.after, summary.change, summary.kl_level) == (None, None, "unknown")
    assert sample_pairs(run(evaluation(0, 0.1))) == []
    assert summary_rows(summary)[0] == ("reward (held-out)", "0.100", "", "")


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="no evaluation yet"):
        summarise(run())
    with pytest.raises(DataError, match=r"steps 0 and 5 .* hold different prompts"):
        summarise(run(evaluation(0, 0.1), evaluation(5, [0.1] * 3)))
    with pytest.raises(DataError, match="step 0 has no rows"):
        summarise(run(evaluation(0, []), evaluation(5, [])))


def test_an_infinite_kl_is_extreme() -> None:
    summary = summarise(run(evaluation(0, 0.1), evaluation(5, 0.9, kl=math.inf)))
    assert summary.kl_level == "extreme"
    assert ("sequence KL (nats)", "0.000", "inf", "") in summary_rows(summary)


def test_rows_hold_before_after_and_change() -> None:
    summary = summarise(run(evaluation(0, 0.25), evaluation(5, 0.75, kl=3.0)))
    rows = {row[0]: row[1:] for row in summary_rows(summary)}
    assert rows["reward (held-out)"] == ("0.250", "0.750", "+0.500 [+0.500, +0.500]")
    assert rows["sequence KL (nats)"] == ("0.000", "3.00", "")
    assert rows["length (tokens)"] == ("10.0", "10.0", "")
    assert rows["ended by eos"] == ("100.0%", "100.0%", "")
    assert not any(name.startswith("reward term") for name in rows)  # a single term is the reward itself


def test_pairs_run_from_the_largest_gain_to_the_smallest() -> None:
    before, after = evaluation(0, [0.0, 0.0, 0.0, math.nan, 0.0, 0.0]), evaluation(5, [0.3, -0.5, 0.9, 1.0, 0.1, 0.4])
    chosen = sample_pairs(run(before, after), count=3)
    assert [pair.prompt for pair in chosen] == ["prompt 2", "prompt 0", "prompt 1"]
    assert chosen[0].change == pytest.approx(0.9)
    every = sample_pairs(run(before, after), count=100)
    assert [pair.prompt[-1] for pair in every] == ["2", "5", "0", "4", "1", "3"]
    with pytest.raises(ValueError, match="at least 1"):
        sample_pairs(run(before, after), count=0)


def test_texts_of_intervals() -> None:
    nan = math.nan
    assert interval_text(Interval(4.5, 3.62, 5.591)) == "4.50 [3.62, 5.59]"
    assert interval_text(Interval(49.0, 48.7, 49.3)) == "49.0 [48.7, 49.3]"
    assert interval_text(Interval(0.5, nan, nan)) == "0.500"
    assert change_text(Interval(0.5, -0.1, 0.75)) == "+0.500 [-0.100, +0.750]"
    assert (interval_text(None), change_text(None)) == ("", "")
