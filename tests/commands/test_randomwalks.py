"""tropism randomwalks: what it writes and says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropism.cli import main

SMALL = ("--n-nodes", "4", "--p-edge", "0.5", "--n-walks", "30", "--n-layer", "1", "--n-embd", "8", "--n-head", "2")


def test_it_writes_the_folder_and_says_what_the_task_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "walks"
    assert main(["randomwalks", str(out), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "graph: 4 nodes" in shown and "walks: 30" in shown and f"written: {out}" in shown
    names = {
        "allowed.json",
        "evaluation.jsonl",
        "graph.json",
        "held_out.jsonl",
        "model",
        "prompts.jsonl",
        "walks.jsonl",
    }
    assert {path.name for path in out.iterdir()} == names


def test_wrong_settings_and_a_full_folder_are_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["randomwalks", str(tmp_path / "walks"), "--n-nodes", "40"]) == 2
    assert "every node is a letter" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["randomwalks", str(tmp_path), *SMALL]) == 2
    assert "not an empty folder" in capsys.readouterr().err
