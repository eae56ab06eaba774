from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import METHODS, Setting, assemble, early_letters, execute, stop_after
from tropism.rewards import RewardConfig
from tropism.training import stopwatch
from tropism.training.interrupt import Interrupted
from tropism.training.stopwatch import StepClock, Stopwatch

STAGES = ("time/rollout", "time/reward", "time/logprobs", "time/make_batch", "time/update", "time/log")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock shows the last entry."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[-1])
    return now


def test_a_stage_inside_another_interrupts_its_count(ticks: list[float]) -> None:
    watch = Stopwatch()
    with watch.measure("outer"):
        ticks.append(1.0)
        with watch.measure("inner"):
            ticks.append(4.0)
        ticks.append(6.0)
        with suppress(KeyError), watch.measure("inner"):
            ticks.append(7.0)
            raise KeyError
    ticks.append(100.0)
    with watch.measure("outer"):
        ticks.append(100.5)
    assert (watch.take("outer"), watch.take("inner"), watch.take("never")) == (3.5, 4.0, 0.0)
    assert watch.take("outer") == 0.0


def test_steps_and_what_lies_between_them(ticks: list[float]) -> None:
    clock = StepClock()
    ticks.append(2.0)
    clock.begin(samples=10, tokens=100)
    with clock.logging():
        ticks.append(2.5)
    for seconds in (1.0, 0.5):
        clock.add_update(seconds)
    ticks.append(6.0)
    assert clock.end(samples=18, tokens=140) == {
        "time/updates": 1.5,
        "time/log": 0.5,
        "time/between": 2.0,
        "time/step": 4.0,
        "throughput/tokens_per_second": 10.0,
        "throughput/samples_per_second": 2.0,
    }
    with clock.logging():
        ticks.append(7.0)
    clock.begin(samples=18, tokens=140, whole=False)
    ticks.append(8.0)
    assert clock.end(samples=20, tokens=150) == {"time/updates": 0.0, "time/log": 0.0, "time/between": 1.0}


def timings(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]


def slow(completions: list[str]) -> list[float]:
    time.sleep(0.1)
    return early_letters(completions)


@pytest.mark.parametrize("method", METHODS)
def test_the_stages_of_a_step_add_up_to_it(method: str, tmp_path: Path) -> None:
    on_policy = METHODS[method].on_policy
    changes: dict[str, Any] = {"reward": RewardConfig.of({"slow": {"use": slow}})} if on_policy else {}
    execute(assemble(Setting(method, False, "llama"), tmp_path / "run", **changes))
    lines = timings(tmp_path / "run")
    for step in (1, 2):
        mine = [line for line in lines if line["step"] == step and line["kind"] != "evaluation"]
        stages = sum(line.get(name, 0.0) for line in mine for name in STAGES)
        (closing,) = (line for line in mine if "time/step" in line)
        assert closing is mine[-1]
        assert closing["time/updates"] == pytest.approx(sum(line.get("time/update", 0.0) for line in mine))
        # What no stage holds takes well below a millisecond per update; the bound leaves room for a busy machine.
        assert stages <= closing["time/step"] <= stages + (0.5 * stages if on_policy else 0.2)
        seconds = closing["time/step"]
        before = max((line["tokens"] for line in lines if line["step"] < step), default=0)
        assert closing["throughput/tokens_per_second"] * seconds == pytest.approx(closing["tokens"] - before)
        if on_policy:
            assert closing["throughput/samples_per_second"] * seconds == pytest.approx(8)
            collect = mine[0]
            sampled = collect["throughput/rollout_tokens_per_second"] * collect["time/rollout"]
            assert sampled == pytest.approx(closing["tokens"] - before)
            assert collect["time/reward"] > 0.1 and ("time/logprobs" not in collect or collect["time/logprobs"] > 0)


def test_a_step_that_another_process_began_has_no_seconds(tmp_path: Path) -> None:
    setting = Setting("grpo", False, "llama")
    stopped = assemble(setting, tmp_path / "run")
    stop_after(stopped, 2, 15)
    with pytest.raises(Interrupted):
        execute(stopped)
    execute(assemble(setting, tmp_path / "run", resume=True))
    first, second = (line for line in timings(tmp_path / "run") if "time/updates" in line)
    assert (first["step"], second["step"]) == (1, 2)
    assert "time/step" not in first and "throughput/tokens_per_second" not in first
    assert second["time/step"] > 0
