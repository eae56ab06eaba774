from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from comparing.made_up import write_cell, write_comparison, write_plan
from tropism.comparing.results import Comparison, family, is_comparison, is_trained
from tropism.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "compare-small", ["ppo", "sft"], [0, 1])


def test_cells_come_in_the_order_of_the_plan(folder: Path) -> None:
    for method, seed in (("sft", 1), ("sft", 0), ("base", 0), ("ppo", 1), ("base", 1)):
        write_cell(folder, method, seed)
    found = Comparison.read(folder)
    order = [("base", 0), ("base", 1), ("ppo", 1), ("sft", 0), ("sft", 1)]
    assert [(cell.method, cell.seed) for cell in found.cells] == order
    assert list(found.methods) == ["base", "ppo", "sft"]
    assert found.missing == ("ppo-seed0",)
    assert found.name == "small"
    assert found.prompts == [f"prompt {index}" for index in range(6)]


def test_means_of_the_samples_of_each_prompt(folder: Path) -> None:
    write_cell(folder, "ppo", 0, [[1.0, 3.0], [math.nan, 5.0], [math.nan, math.nan]])
    write_cell(folder, "ppo", 1, [[0.0, 0.0], [1.0, 1.0], [2.0, 4.0]])
    values = Comparison.read(folder).values("ppo")
    assert np.array_equal(values, [[2.0, 5.0, math.nan], [0.0, 1.0, 3.0]], equal_nan=True)


def test_a_failed_cell_is_kept_apart(folder: Path) -> None:
    write_cell(folder, "ppo", 0, failure="the loss was not finite")
    write_cell(folder, "ppo", 1)
    found = Comparison.read(folder)
    assert [cell.failure for cell in found.failed] == ["the loss was not finite"]
    assert [cell.seed for cell in found.methods["ppo"]] == [1]
    assert found.failed[0].samples is None


def test_a_comparison_that_has_not_begun_can_be_read(folder: Path) -> None:
    found = Comparison.read(folder)
    assert (list(found.cells), found.prompts, len(found.missing)) == ([], [], 6)
    assert "No method is finished yet" in found.text()


def test_what_the_others_are_tested_against(folder: Path) -> None:
    write_cell(folder, "ppo", 0)
    assert Comparison.read(folder).against == "sft"
    assert Comparison.read(folder, against="ppo").against == "ppo"
    write_plan(folder, ["ppo"], [0])
    assert Comparison.read(folder).against == "base"
    write_plan(folder, ["ppo", "grpo"], [0], against="grpo")
    assert Comparison.read(folder).against == "grpo"
    with pytest.raises(ConfigError, match=r"'grop' is not compared here\. Did you mean 'grpo'"):
        Comparison.read(folder, against="grop")


def test_variants_of_a_method() -> None:
    assert family("ppo@kl_coef=0.1") == family("ppo") == "ppo"
    assert is_trained("ppo@kl_coef=0.1")
    assert not is_trained("best-of-n@n=4")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        Comparison.read(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"it has no compare\.yaml"):
        Comparison.read(tmp_path)
    assert not is_comparison(tmp_path)
    assert is_comparison(write_plan(tmp_path / "compare-a", ["ppo"], [0]))


def test_a_damaged_plan_is_named(folder: Path) -> None:
    (folder / "compare.yaml").write_text("recipe: {}\n")
    with pytest.raises(DataError, match=r"compare\.yaml: there is no section compare"):
        Comparison.read(folder)


def lost(folder: Path) -> str:
    """The reason of the one cell of a comparison that counts as failed."""
    (one,) = Comparison.read(folder).failed
    assert one.samples is None and one.failure is not None
    return one.failure


def test_a_damaged_cell_loses_none_of_the_others(folder: Path) -> None:
    damaged = write_cell(folder, "ppo", 0) / "samples.parquet"
    write_cell(folder, "ppo", 1)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    comparison = Comparison.read(folder)
    assert [cell.seed for cell in comparison.methods["ppo"]] == [1]
    assert "ppo" in comparison.text() and "no readable Parquet file" in comparison.text()


def test_damaged_cells_are_named(folder: Path) -> None:
    cell = write_cell(folder, "ppo", 0)
    samples = (cell / "samples.parquet").read_bytes()
    for content, message in ((samples[:-9], "no readable Parquet file"), (b"", "no readable Parquet file")):
        (cell / "samples.parquet").write_bytes(content)
        assert re.search(rf"ppo-seed0.samples\.parquet is {message}; take the cell's folder away", lost(folder))
    (cell / "samples.parquet").unlink()
    assert re.search(r"is missing, though its cell\.json says", lost(folder))
    (cell / "cell.json").write_text("{")
    with pytest.raises(DataError, match=r"ppo-seed0.cell\.json: not valid JSON"):
        Comparison.read(folder)
    for content in ("[]", '{"method": "ppo"}', '{"method": 3, "seed": 0}'):
        (cell / "cell.json").write_text(content)
        with pytest.raises(DataError, match="names no method and seed"):
            Comparison.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": ["a"] * 12}, "'reward' holds str, where numbers belong"),
        ({"prompt_index": [0.5] * 12}, "prompt_index holds something else"),
        ({"prompt_index": [1] * 6 + [3] * 6}, "does not count from 0"),
        ({"prompt_index": [0] * 12}, "have different prompts"),
    ],
)
def test_damaged_columns_are_named(folder: Path, change: dict[str, list[object]], message: str) -> None:
    write_cell(folder, "ppo", 0, columns=change)
    assert message in lost(folder)


def test_missing_columns_and_rows_are_named(folder: Path) -> None:
    path = write_cell(folder, "ppo", 0) / "samples.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.slice(0, 0), path)
    assert "has no rows" in lost(folder)
    pyarrow.parquet.write_table(table.drop_columns(["base_logprob"]), path)
    assert "the column 'base_logprob' is missing" in lost(folder)


def test_cells_of_other_prompts_are_refused(folder: Path) -> None:
    write_cell(folder, "ppo", 0)
    write_cell(folder, "ppo", 1, [[1.0, 2.0]])
    with pytest.raises(DataError, match="answered different held-out prompts"):
        Comparison.read(folder)


def test_notes_are_read_and_damaged_ones_named(folder: Path) -> None:
    (folder / "notes.json").write_text(json.dumps(["The KL is biased."]))
    assert Comparison.read(folder).notes == ["The KL is biased."]
    (folder / "notes.json").write_text("{}")
    with pytest.raises(DataError, match=r"notes\.json: expected a list"):
        Comparison.read(folder)


def test_two_folders_of_one_cell_are_refused(folder: Path) -> None:
    write_cell(folder, "ppo", 0).rename(folder / "cells" / "old")
    write_cell(folder, "ppo", 0)
    with pytest.raises(DataError, match="are the same method and seed"):
        Comparison.read(folder)


def test_reading_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-a", {"base": 0.0, "sft": 0.1}, prompts=3)
    before = sorted(folder.rglob("*"))
    Comparison.read(folder).text()
    assert sorted(folder.rglob("*")) == before
