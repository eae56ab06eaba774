"""``tropism sweep`` as a user meets it, with runs that are not trained; and the pages and files that describe it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stub_sweeps import RATES, Runs
from tropism.cli import main
from tropism.commands.recipe_arguments import own_options, take_apart, with_overrides
from tropism.commands.sweep import FLAGS, OWN
from tropism.config import Recipe
from tropism.safe_yaml import parse_yaml, read_yaml
from tropism.sweeps.config import RayConfig, SweepConfig, sweep_from_file, sweep_from_mapping
from tropism.sweeps.outcome import Row, cautions, ranked
from tropism.sweeps.space import check_space
from tropism.sweeps.sweep import Sweep

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def files(base: dict[str, Any], tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(Sweep.__init__.__kwdefaults__, "execute", runs)  # type: ignore[arg-type]
    Path("recipe.yaml").write_text(yaml.safe_dump(base))
    parameters = {"trainer.learning_rate": RATES, "algorithm.kl_coef": {"strategy": "choice", "values": [0, 0.5]}}
    Path("rates.yaml").write_text(yaml.safe_dump({"metric": "eval/reward", "trials": 3, "parameters": parameters}))
    return tmp_path


def test_a_sweep_from_end_to_end(files: Path, runs: Runs, capsys: Captured) -> None:
    assert main(["sweep", "--total_steps", "9", "recipe.yaml", "rates.yaml", "--sampling.temperature=0.5"]) == 0
    shown = capsys.readouterr().out
    assert [(recipe["total_steps"], recipe["sampling"]["temperature"]) for recipe in runs.recipes] == [(9, 0.5)] * 3
    assert len(re.findall(r"^trial 00\d \(\d of 3\) eval/reward ", shown, flags=re.M)) == 3
    folder = Path("runs/sweep-rates")
    assert f"next:  tropism train {folder}/best.yaml" in shown and "owes something to luck" in shown
    assert Recipe.from_file(folder / "best.yaml").total_steps == 9
    again = ["sweep", "recipe.yaml", "rates.yaml", "--total_steps", "9", "--sampling.temperature", "0.5"]
    assert main(again) == 0
    assert "is finished: all 3 trials are done. Raise --trials" in capsys.readouterr().out and len(runs.jobs) == 3
    assert main([*again, "--trials", "4"]) == 0
    assert "is finished" not in capsys.readouterr().out and len(runs.jobs) == 4


def test_an_interruption_is_told_with_what_goes_on(files: Path, runs: Runs, capsys: Captured) -> None:
    def interrupt(count: int) -> None:
        if count == 1:
            raise KeyboardInterrupt

    runs.before = interrupt
    assert main(["sweep", "recipe.yaml", "rates.yaml", "--out", "out"]) == 130
    assert "1 of 3 trials are done; the same command goes on" in capsys.readouterr().err
    runs.before = lambda count: None
    assert main(["sweep", "recipe.yaml", "rates.yaml", "--out", "out"]) == 0
    assert json.loads(Path("out/summary.json").read_text())["complete"] == 3


def test_a_dry_run_writes_nothing(files: Path, runs: Runs, capsys: Captured) -> None:
    assert main(["sweep", "recipe.yaml", "rates.yaml", "--dry-run", "--trials", "7"]) == 0
    shown = capsys.readouterr().out
    assert "7 trials in runs/sweep-rates" in shown and "loguniform" in shown
    assert not runs.jobs and not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml"], "expected a recipe and a sweep's file, got 1"),
        (["recipe.yaml", "rates.yaml", "more.yaml"], "got 3"),
        (["recipe.yaml", "rate.yaml"], "did you mean 'rates.yaml'?"),
        (["recipe.yaml", "rates.yaml", "--trials", "many"], "--trials: expected a whole number, not 'many'"),
        (["recipe.yaml", "rates.yaml", "--trials", "0"], "trials must be at least 1"),
        (["recipe.yaml", "rates.yaml", "--trials"], "--trials: needs a value"),
        (["recipe.yaml", "rates.yaml", "--out", "--trials", "3"], "--out: needs a value"),
        (["recipe.yaml", "rates.yaml", "--algorithm.kl_coef", "1"], "the sweep chooses this field"),
        (["recipe.yaml", "rates.yaml", "--total_step", "3"], "did you mean 'total_steps'?"),
        (["recipe.yaml", "rates.yaml", "--reward", "mine.py:fn"], "--allow-code"),
        (["recipe.yaml", "rates.yaml", "--eval_data", "none"], "holds out none"),
        (["recipe.yaml", "rates.yaml", "-x"], "there is no option -x"),
        (["recipe.yaml", "recipe.yaml"], "recipe.yaml: "),
        (["rates.yaml", "recipe.yaml"], "recipe.yaml: "),
        (["recipe.yaml", "rates.yaml", "--out", "recipe.yaml"], "is a file"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_written(
    files: Path, runs: Runs, arguments: list[str], message: str, capsys: Captured
) -> None:
    assert main(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not runs.jobs and {path.name for path in files.iterdir()} == {"recipe.yaml", "rates.yaml"}


def test_without_optuna_the_error_says_how_to_get_it(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("tropism.commands.sweep.find_spec", lambda name: None)
    assert main(["sweep", "recipe.yaml", "rates.yaml"]) == 2
    assert 'pip install "tropism[sweep]"' in capsys.readouterr().err


def test_trust_and_code_reach_the_runs(files: Path, runs: Runs) -> None:
    more = ["--allow-code", "--model.trust_remote_code", "true"]
    assert main(["sweep", "recipe.yaml", "rates.yaml", *more]) == 0
    assert runs.jobs[0].options == ("--allow-code", "--model.trust_remote_code", "true")
    assert all(recipe["model"]["trust_remote_code"] for recipe in runs.recipes)


# ---- the table -------------------------------------------------------------------------------------------------------


def row(number: int, value: float | None, **changes: Any) -> Row:
    fields: dict[str, Any] = {"state": "complete", "by_seed": (), "interval": None, "values": {}, "reason": None}
    return Row(**{**fields, "number": number, "value": value, "seconds": 1.0, "folder": "", **changes})


def test_order_of_the_table() -> None:
    rows = [row(0, 1.0), row(1, None, state="failed"), row(2, 3.0), row(3, 9.0, state="pruned"), row(4, 3.0)]
    assert [one.number for one in ranked(rows, "max")] == [2, 4, 0, 3, 1]
    assert [one.number for one in ranked(rows, "min")] == [0, 2, 4, 3, 1]


def test_trials_that_the_prompts_do_not_tell_apart_are_counted() -> None:
    config = sweep_from_mapping({"metric": "eval/reward", "parameters": {"seed": RATES}}, "s")
    rows = [row(0, 1.0, interval=(0.8, 1.2)), row(1, 0.7, interval=(0.5, 0.9)), row(2, 0.1, interval=(0.0, 0.2))]
    assert "The intervals of 1 other trial overlap" in cautions(rows, config)[0]
    assert "overlap" not in " ".join(cautions([rows[0], rows[2]], config))
    assert cautions([], config) == [] and cautions(rows[:1], config) == []


def test_uncertainty_in_words() -> None:
    assert row(0, 0.5, interval=(0.25, 0.75)).measured == "0.5 [0.25, 0.75]"
    assert row(0, 2.0, by_seed=(1.0, 2.0, 3.0)).measured == "2 ± 1"
    assert row(0, 0.5).measured == "0.5"


# ---- pages and examples ----------------------------------------------------------------------------------------------


def test_the_page_holds_every_setting_with_its_default() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, re.MULTILINE))
    from dataclasses import MISSING, fields

    for cls in (SweepConfig, RayConfig):
        for one in fields(cls):
            default = "required" if one.default is MISSING else f"`{json.dumps(one.default)}`"
            if one.default_factory is not MISSING:
                default = "`RayConfig()`"
            assert (one.name, default) in rows


def test_the_sweeps_and_commands_of_the_page_are_understood(base: dict[str, Any]) -> None:
    blocks = re.findall(r"^```yaml sweep\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        config = sweep_from_mapping(parse_yaml(block, "page"), "page")
        evaluated = base | {"trainer": {"evaluation": {"every": 1}}}
        check_space(evaluated, config, where="page", allow_code=False)
    commands = re.findall(r"^tropism sweep (.*)$", PAGE, re.MULTILINE)
    assert commands
    for line in commands:
        words = take_apart(shlex.split(line), FLAGS)
        _, overrides = own_options(words.overrides, OWN)
        assert len(words.sources) == 2
        if (ROOT / words.sources[1]).is_file():
            recipe = with_overrides(read_yaml(ROOT / words.sources[0]), overrides)
            check_space(recipe, sweep_from_file(ROOT / words.sources[1]), where=line, allow_code=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_fit_the_recipe_that_they_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    line = next(line for line in path.read_text().splitlines() if "tropism sweep" in line)
    recipe, named = re.findall(r"recipes/\S+\.yaml", line)
    assert named == f"recipes/sweeps/{path.name}"
    check_space(read_yaml(recipe), sweep_from_file(path), where=path.name, allow_code=False)
