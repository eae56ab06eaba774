from __future__ import annotations

from pathlib import Path

import pytest

from comparing.made_up import write_cell, write_plan
from tropism.cli import main


def test_report_knows_the_folder_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    write_cell(folder, "sft", 0)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "Comparison a" in (folder / "report.html").read_text()


def test_a_damaged_comparison_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    (write_cell(folder, "sft", 0) / "cell.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    assert "sft-seed0" in capsys.readouterr().err
