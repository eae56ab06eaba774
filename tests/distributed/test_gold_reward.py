"""A gold reward is the same on every process, and the same as of one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distributed.gold_reward import HELD_OUT, brief, run_all, vowels
from tiny_runs import logged
from two_started import start_two

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of one process, and of two."""
    folder = tmp_path_factory.mktemp("gold")
    for name in ("one", "two"):
        (folder / name).mkdir()
    start_two(Path(__file__).with_name("gold_reward.py"), folder / "two")
    run_all(folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.parametrize("case", HELD_OUT)
def test_two_processes_measure_what_one_does(case: str, runs: tuple[Path, Path]) -> None:
    one, two = (logged(folder / case, "evaluation") for folder in runs)
    assert [line["step"] for line in one] == [0, 1, 2, 3]
    for single, double in zip(one, two, strict=True):
        for name in ("eval/gold", "eval/gold/brief", "eval/gold/vowels"):
            expected = single[name]
            assert double[name] == (None if expected is None else pytest.approx(expected, rel=1e-9))
        table = pq.read_table(runs[1] / case / "evaluations" / f"step-{single['step']:06d}.parquet").to_pydict()
        texts = table["completion"]
        expected = [0.5 * short + 2 * (said or 0.0) for short, said in zip(brief(texts), vowels(texts), strict=True)]
        assert table["metric/gold"] == pytest.approx(expected)


@pytest.mark.parametrize("case", HELD_OUT)
def test_all_processes_agree_on_the_best(case: str, runs: tuple[Path, Path]) -> None:
    alone, first, second = (
        json.loads((folder / f"{case}-{rank}.json").read_text())
        for folder, rank in ((runs[0], 0), (runs[1], 0), (runs[1], 1))
    )
    assert alone == first == second
