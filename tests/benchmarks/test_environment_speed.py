"""The benchmark of the environment counts the same tokens for both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import environment


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.setattr("tropism.training.memory.keep_freed_memory", lambda: False)  # of the process of all tests
    out = tmp_path / "environment.json"
    options = ["--model", "0.05M", "--tokens", "5", "--samples", "1", "2", "--episodes", "2", "--threads", "1"]
    environment.main([*options, "--out", str(out)])
    result = json.loads(out.read_text())
    assert [found["samples"] for found in result["figures"]] == [1, 2]
    for found in result["figures"]:
        assert [len(taken) for taken in found["seconds"]["step"]] == [5, 5]
        assert [len(taken) for taken in found["seconds"]["reread"]] == [5]
        assert found["last"]["ratio"] > 0
    assert "2 sample(s), at 5 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        environment.main(["--tokens", "1"])
