"""The soak run records memory step by step, and its trend is that of a straight line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import soak


def test_the_trend_leaves_out_the_warm_up() -> None:
    assert soak.slope([100.0, *(5.0 + 0.5 * step for step in range(1, 10))]) == pytest.approx(0.5)
    assert soak.slope([3.0] * 50) == 0.0
    assert soak.slope([3.0]) == 0.0


def test_what_is_recorded_by_hand() -> None:
    recording = soak.Recording()
    for megabytes, seconds in ((50, 9), (100, 1), (101, 1), (102, 2), (103, 2)):
        recording.megabytes.append(megabytes)
        recording.seconds.append(seconds)
        recording.files.append(7)
    summary = recording.summary()
    assert (summary["first_mb"], summary["last_mb"], summary["most_mb"]) == (50, 103, 103)
    assert (summary["first_half_seconds_per_step"], summary["second_half_seconds_per_step"]) == (5, 2)


def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tropism.training.memory.keep_freed_memory", lambda: False)  # of the process of all tests
    out = tmp_path / "soak.json"
    soak.main(["--steps", "6", "--threads", "1", "--out", str(out), "--images", str(tmp_path)])
    result = json.loads(out.read_text())
    assert len(result["megabytes"]) == len(result["seconds"]) == result["steps"] == result["rollout_files"] == 6
    assert 50 < result["first_mb"] < 5000 and result["log_bytes"] > 1000
    assert (tmp_path / "soak-memory.png").stat().st_size > 1000
    assert "MB per 1,000 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        soak.main(["--steps", "1"])
