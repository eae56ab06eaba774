"""The course of a sweep, with runs whose metric is a known function of the learning rate."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stub_sweeps import Runs
from tropism.config import Recipe
from tropism.errors import ConfigError, StorageError, TropismError
from tropism.sweeps.sweep import Sweep
from tropism.sweeps.work import Ended
from tropism.training.run_lock import RunLock

MakeSweep = Callable[..., Sweep]
RATES = "trainer.learning_rate"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_trial_is_a_run_of_its_own_and_the_best_comes_first(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep()
    rows = made.run()
    assert [row.state for row in rows] == ["complete"] * 5
    assert [Path(job.run).name for job in runs.jobs] == ["000", "001", "002", "003", "004"]
    assert [recipe["run"] for recipe in runs.recipes] == [job.run for job in runs.jobs]
    values = [row.value or 0 for row in rows]
    lines = table(made.folder)
    assert [float(line["eval/reward"]) for line in lines] == sorted(values, reverse=True)
    rates = {line["trial"]: float(line[RATES]) for line in lines}
    assert [rates[str(n)] for n in range(5)] == [recipe["trainer"]["learning_rate"] for recipe in runs.recipes]
    summary = json.loads((made.folder / "summary.json").read_text())
    assert summary["best"] == values.index(max(values)) and summary["complete"] == 5
    assert {path.name for path in (made.folder / "plots").iterdir()} == {"parameters.png", "history.png"}


def test_the_best_recipe_is_whole_and_that_of_the_best_trial(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep()
    rows = made.run()
    best = max(rows, key=lambda row: row.value or 0)
    recipe = Recipe.from_file(made.folder / "best.yaml")
    assert recipe.run is None
    whole = {**runs.recipes[best.number], "run": None}
    assert Recipe.from_mapping(whole).to_yaml() == recipe.to_yaml()
    assert f"trial {best.number:03d}" in (made.folder / "best.yaml").read_text().splitlines()[0]


def test_less_is_better_where_mode_is_min(sweep: MakeSweep) -> None:
    made = sweep(mode="min")
    values = [row.value or 0 for row in made.run()]
    assert json.loads((made.folder / "summary.json").read_text())["best"] == values.index(min(values))
    assert float(table(made.folder)[0]["eval/reward"]) == min(values)


def test_an_interrupted_sweep_goes_on_with_the_same_trials(sweep: MakeSweep, runs: Runs, tmp_path: Path) -> None:
    sweep().run()
    whole = list(runs.recipes)
    sweep().folder.rename(tmp_path / "before")
    runs.jobs.clear()
    runs.recipes.clear()

    def interrupt(count: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    runs.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        sweep().run()
    partial = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert partial["complete"] == 3 and (tmp_path / "sweep" / "best.yaml").is_file()
    assert [row["state"] for row in partial["rows"]] == ["complete"] * 3 + ["unfinished"]
    runs.before = lambda count: None
    rows = sweep().run()
    assert runs.recipes == whole and len(rows) == 5
    rows = sweep().run()  # a finished sweep trains nothing
    assert len(runs.jobs) == 5 and len(rows) == 5


def test_more_trials_go_on_and_earlier_ones_stay(sweep: MakeSweep, runs: Runs) -> None:
    sweep(trials=2).run()
    rows = sweep(trials=4).run()
    assert len(runs.jobs) == 4 and [row.state for row in rows] == ["complete"] * 4


def test_a_failing_trial_is_recorded_and_the_sweep_goes_on(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep()
    train = runs.__call__

    def sometimes(job: Any, watch: Any) -> Ended:
        ended = train(job, watch)
        return (
            Ended(reason="the loss is not finite: =HYPERLINK, key sk-a1b2c3d4e5f6g7h8i9") if "002" in job.run else ended
        )

    made.execute = sometimes
    rows = made.run()
    assert [row.state for row in rows] == ["complete", "complete", "failed", "complete", "complete"]
    last = table(made.folder)[-1]
    assert (last["trial"], last["state"], last["eval/reward"]) == ("2", "failed", "")
    assert last["reason"].startswith("the loss is not finite") and "[redacted]" in last["reason"]
    for path in made.folder.rglob("*"):
        assert not path.is_file() or b"a1b2c3d4e5" not in path.read_bytes(), path


def test_trials_that_cannot_be_built_fail_without_a_run(sweep: MakeSweep, runs: Runs) -> None:
    parameters = {
        "lora": {"strategy": "grid", "values": [None, {"rank": 4}]},
        "train_layers": {"strategy": "grid", "values": [None, 2]},
        RATES: {"strategy": "choice", "values": [1e-3]},
    }
    rows = sweep(trials=None, parameters=parameters).run()
    assert [row.state for row in rows] == ["complete"] * 3 + ["failed"]
    assert "lora and train_layers cannot go together" in str(rows[3].reason) and len(runs.jobs) == 3


def test_the_same_failure_three_times_ends_the_sweep(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep(trials=9)
    made.execute = lambda job, watch: Ended(reason="there is no file prompts.txt")
    with pytest.raises(TropismError, match=r"3 trials have failed.*no file prompts.txt"):
        made.run()
    assert len(made.study.trials) == 3
    rows = sweep(trials=9).run()  # mended: the others are trained
    assert [row.state for row in rows] == ["failed"] * 3 + ["complete"] * 6


def test_an_unknown_metric_is_told_after_the_first_run_with_those_there_are(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep(metric="eval/rewrd")
    made.execute = lambda job, watch: Ended(there_are=("eval/length_mean", "eval/reward"), reason="no metric")
    with pytest.raises(ConfigError, match=r"has no eval/rewrd\. It has: eval/length_mean, eval/reward"):
        made.run()
    rows = sweep(metric="eval/reward").run()  # may be mended, as nothing was measured by it
    assert [row.state for row in rows] == ["complete"] * 5 and runs.jobs[0].run.endswith("000")
    with pytest.raises(ConfigError, match="metric was"):
        sweep(metric="eval/loss").run()


def test_a_metric_that_a_later_run_lacks_is_a_failure_of_that_trial(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep()
    made.execute = lambda job, watch: (
        Ended(there_are=("loss/value",), reason="the run has no metric") if "003" in job.run else runs(job, watch)
    )
    assert [row.state for row in made.run()] == ["complete"] * 3 + ["failed", "complete"]


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_several_seeds_count_by_their_mean(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep(seeds=3, trials=2)
    rows = made.run()
    assert [recipe["seed"] for recipe in runs.recipes] == [10, 11, 12] * 2
    assert [Path(job.run).relative_to(made.folder).as_posix() for job in runs.jobs[:3]] == [
        f"trials/000/seed-{seed}" for seed in range(3)
    ]
    first = rows[0].by_seed  # v, v + 0.001 and v + 0.002: the mean is the middle one, the deviation 0.001
    assert rows[0].value == pytest.approx(first[1]) and rows[0].spread == pytest.approx(0.001)
    line = next(line for line in table(made.folder) if line["trial"] == "0")
    assert [float(line[f"seed {seed}"]) for seed in range(3)] == pytest.approx(first)
    assert Recipe.from_file(made.folder / "best.yaml").seed == 10
    assert "mean over 3 seeds" in (made.folder / "best.yaml").read_text()


def test_seeds_that_were_measured_are_not_run_again(sweep: MakeSweep, runs: Runs) -> None:
    def interrupt(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    runs.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        sweep(seeds=3, trials=1).run()
    runs.before = lambda count: None
    (row,) = sweep(seeds=3, trials=1).run()
    assert [recipe["seed"] for recipe in runs.recipes] == [10, 11, 12] and len(row.by_seed) == 3
    assert row.seconds == 3.0


def test_one_failing_seed_fails_the_trial(sweep: MakeSweep, runs: Runs) -> None:
    made = sweep(seeds=2, trials=2)
    made.execute = lambda job, watch: Ended(reason="boom") if job.run.endswith("000/seed-1") else runs(job, watch)
    assert [row.state for row in made.run()] == ["failed", "complete"]


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_runs_below_the_median_are_stopped(sweep: MakeSweep, runs: Runs) -> None:
    """Each run is at its final value from the first step on: one below the median of the whole runs is stopped there.

    The first five runs are never stopped.
    """
    runs.course = lambda value: [value, value, value]
    rows = sweep(trials=16, sampler="random", pruner="median").run()
    whole: list[float] = []
    for row in rows:
        assert row.value is not None
        behind = len(whole) >= 5 and row.value < statistics.median(whole)
        assert row.state == ("pruned" if behind else "complete"), row.number
        whole += [] if behind else [row.value]
    assert {row.state for row in rows} == {"pruned", "complete"}


def test_nothing_is_stopped_before_prune_after(sweep: MakeSweep, runs: Runs) -> None:
    runs.course = lambda value: [value, value, value]
    rows = sweep(trials=16, sampler="random", pruner="median", prune_after=4).run()
    assert {row.state for row in rows} == {"complete"}


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_other_settings_or_another_recipe_are_refused_by_name(
    sweep: MakeSweep, base: dict[str, Any], runs: Runs
) -> None:
    sweep().run()
    with pytest.raises(ConfigError, match='sampler was "tpe" and is "random"'):
        sweep(sampler="random").run()
    base["algorithm"]["group_size"] = 8
    with pytest.raises(ConfigError, match=r"recipe: algorithm\.group_size was 4 and is 8"):
        sweep().run()
    assert len(runs.jobs) == 5


def test_a_folder_of_something_else_is_left_alone(sweep: MakeSweep, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is no sweep"):
        sweep().run()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["notes.txt"]


def test_two_sweeps_do_not_share_a_folder(sweep: MakeSweep, tmp_path: Path, runs: Runs) -> None:
    sweep(trials=1).run()
    lock = RunLock(tmp_path / "sweep")
    lock.acquire()
    try:
        with pytest.raises(StorageError, match="in use by"):
            sweep(trials=2).run()
    finally:
        lock.release()
    assert len(sweep(trials=2).run()) == 2


def test_secrets_in_a_recipe_are_refused_before_anything_is_written(
    base: dict[str, Any], sweep: MakeSweep, tmp_path: Path
) -> None:
    base["data"] = "https://me:geheim77@example.org/prompts.txt"
    with pytest.raises(ConfigError, match="data looks like credentials in a URL"):
        sweep()
    assert not (tmp_path / "sweep").exists()


def test_a_launcher_of_processes_is_refused(sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        sweep()
