"""Which values trials get: whatever happens in between, those of an uninterrupted sweep."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from stub_sweeps import RATES, make_config
from tropism.errors import StorageError
from tropism.sweeps.study import JOURNAL, SweepStudy, values_of

SQUARE = {
    "trainer.learning_rate": RATES,
    "algorithm.kl_coef": {"strategy": "uniform", "values": [0, 1]},
    "lora.rank": {"strategy": "int", "values": [1, 32]},
}


def height(values: dict[str, Any]) -> float:
    """Highest, 0, at a rate of 1e-3 and a coefficient of 0.5."""
    rate = (math.log10(values.get("trainer.learning_rate", 1e-3)) + 3) / 4
    return -(rate**2) - (values.get("algorithm.kl_coef", 0.5) - 0.5) ** 2


def go(folder: Path, count: int | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Run a study to its end, or so many trials of it; the height is sought, or with mode: min its opposite."""
    study = SweepStudy(folder, make_config(**settings))
    sign = 1 if study.config.mode == "max" else -1
    for _ in itertools.count() if count is None else range(count):
        given = study.next()
        if given is None:
            break
        study.complete(given[0].number, sign * height(given[1]))
    return [values_of(trial, study.config) for trial in study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_an_interrupted_study_chooses_what_an_uninterrupted_one_does(tmp_path: Path, sampler: str) -> None:
    """Samplers of a library that are made anew begin their random numbers anew, and try the same values again."""
    settings = {"sampler": sampler, "trials": 14, "parameters": SQUARE}
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
    whole = go(tmp_path / "one", **settings)
    go(tmp_path / "two", 3, **settings)
    interrupted = SweepStudy(tmp_path / "two", make_config(**settings))
    given = interrupted.next()
    assert given is not None and given[0].number == 3  # and is never told of
    assert go(tmp_path / "two", **settings) == whole
    assert len({values["trainer.learning_rate"] for values in whole}) == 14
    assert go(tmp_path / "other", **settings, seed=1) != whole


def test_a_trial_under_way_is_given_out_first_and_once(tmp_path: Path) -> None:
    first = SweepStudy(tmp_path, make_config(trials=3))
    values = [given[1] for _ in range(2) if (given := first.next())]
    again = SweepStudy(tmp_path, make_config(trials=3))
    given = [again.next() for _ in range(4)]
    assert [one and one[0].number for one in given] == [0, 1, 2, None]
    assert [one[1] for one in given[:2] if one] == values
    assert again.left == 3


def test_a_grid_is_gone_through_in_order_also_after_an_interruption(tmp_path: Path) -> None:
    parameters = {
        "algorithm": {"strategy": "grid", "values": ["grpo", {"name": "ppo"}]},
        "lora.rank": {"strategy": "int", "values": [1, 3]},
    }
    go(tmp_path, 2, sampler="grid", trials=None, parameters=parameters)
    values = go(tmp_path, sampler="grid", trials=None, parameters=parameters)
    expected = [(method, rank) for method in ("grpo", {"name": "ppo"}) for rank in (1, 2, 3)]
    assert [(one["algorithm"], one["lora.rank"]) for one in values] == expected


def test_a_grid_beside_ranges_is_repeated(tmp_path: Path) -> None:
    parameters = {"algorithm.kl_coef": {"strategy": "grid", "values": [0.1, 0.9]}, "trainer.learning_rate": RATES}
    values = go(tmp_path, trials=6, parameters=parameters)
    assert [one["algorithm.kl_coef"] for one in values] == [0.1, 0.9] * 3
    assert len({one["trainer.learning_rate"] for one in values}) == 6


def test_values_stay_within_their_ranges(tmp_path: Path) -> None:
    parameters = {
        "a": {"strategy": "quniform", "values": [0.1, 0.7, 0.2]},
        "b": {"strategy": "randint", "values": [2, 4]},
        "trainer.learning_rate": RATES,
    }
    for sampler in ("random", "cmaes", "tpe"):
        (tmp_path / sampler).mkdir()
        for values in go(tmp_path / sampler, sampler=sampler, trials=25, parameters=parameters):
            assert values["a"] in (0.1, 0.3, 0.5, 0.7) and values["b"] in (2, 3)
            assert 1e-5 <= values["trainer.learning_rate"] <= 1e-1


@pytest.mark.parametrize("mode", ["max", "min"])
def test_cmaes_closes_in_on_the_optimum(tmp_path: Path, mode: str) -> None:
    """Uniform draws lie at a height of -1/6 on average: the mean of two squares within half a unit."""
    parameters = {key: SQUARE[key] for key in ("trainer.learning_rate", "algorithm.kl_coef")}
    values = go(tmp_path, sampler="cmaes", mode=mode, trials=48, parameters=parameters)
    assert sum(map(height, values[-12:])) / 12 > -0.02


def test_half_a_line_and_a_lock_of_a_killed_process_are_taken_away(tmp_path: Path) -> None:
    before = go(tmp_path, 3)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"wor')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)
    assert go(tmp_path)[:3] == before


def test_a_damaged_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    go(tmp_path, 3)
    journal = tmp_path / JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], lines[3][: len(lines[3]) // 2], *lines[4:]]) + "\n")
    with pytest.raises(StorageError, match=f"{JOURNAL} cannot be read"):
        SweepStudy(tmp_path, make_config())


def test_nothing_in_a_study_is_a_pickle(tmp_path: Path) -> None:
    """Reading a sweep that others made runs nothing of theirs: Optuna's own CMA-ES keeps pickles in the journal."""
    go(tmp_path, sampler="cmaes", trials=14, parameters=SQUARE)
    text = (tmp_path / JOURNAL).read_text()
    assert "cma" not in text and '"system_attr"' not in text
