"""The benchmark of conditioning counts the same work for both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import conditioned


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tropism.training.memory.keep_freed_memory", lambda: False)  # of the process of all tests
    out = tmp_path / "conditioned.json"
    options = ["--model", "0.05M", "--steps", "2", "--rows", "4", "--tokens", "8", "--threads", "1", "--out", str(out)]
    conditioned.main(options)
    result = json.loads(out.read_text())
    assert {name: len(values) for name, values in result["seconds"].items()} == {"sft": 2, "conditioned": 2}
    assert result["ratio"] > 0
    assert "of the steps per second of sft" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        conditioned.main(["--steps", "0"])
