from __future__ import annotations

import gzip
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import Setting, assemble, assert_same, early_letters, execute, stop_after, weights_of
from tropism.build import Assembly
from tropism.errors import ConfigError
from tropism.rewards import RewardConfig
from tropism.training.interrupt import Interrupted
from tropism.training.profile_table import Event, format_table, product_flops, read_events, stage_times
from tropism.training.profiling import Profile, stage

PPO = Setting("ppo", False, "llama")
GRPO = Setting("grpo", False, "llama")
MS = 1_000_000


def profiled(setting: Setting, run: Path, *, resume: bool = False, **changes: Any) -> Assembly:
    assembly = assemble(setting, run, resume=resume, **{"total_steps": 3, **changes})
    assembly.profile_a_step()
    return assembly


def rows(table: str) -> dict[str, float]:
    """Seconds of the stages, by name with its indentation; what is left over gets the name of its stage before it."""
    found: dict[str, float] = {}
    block = table.split("\n\n")[1]
    for line in block.splitlines()[1:]:
        match = re.match(r"^( *)(.+?) +(?:\d+ +)?(\d+\.\d{3}) +\d+\.\d %", line)
        assert match is not None
        found[match[1] + match[2]] = float(match[3])
    return found


# The table, from events made by hand ---------------------------------------------------------------------------------

EVENTS = [
    Event("stage/step", 0, 100 * MS),
    Event("aten::index", 1 * MS, 3 * MS, number=1),
    Event("stage/rollout", 10 * MS, 50 * MS),
    Event("aten::linear", 12 * MS, 32 * MS, number=2),
    Event("aten::mm", 14 * MS, 30 * MS, flops=32_000_000, number=3),
    Event("aten::linear", 40 * MS, 44 * MS, number=4),
    Event("stage/update", 50 * MS, 95 * MS),
    Event("stage/backward", 60 * MS, 90 * MS),
    Event("aten::mm", 61 * MS, 71 * MS, thread=7, flops=100_000_000, number=5),
    Event("kernel", 64 * MS, 84 * MS, thread=3, launched_by=5),
    Event("aten::mm", 99 * MS, 140 * MS, thread=7, number=6),
]


def test_seconds_of_stages_and_operators_by_hand() -> None:
    stages = {one.path: one for one in stage_times(EVENTS[::-1])}
    step, rollout = stages[("step",)], stages[("step", "rollout")]
    update, backward = stages[("step", "update")], stages[("step", "update", "backward")]
    assert (step.seconds, rollout.seconds, update.seconds, backward.seconds) == (0.1, 0.04, 0.045, 0.03)
    linear, mm = rollout.operators["aten::linear"], rollout.operators["aten::mm"]
    assert (linear.calls, mm.calls, mm.flops) == (2, 1, 32_000_000)
    assert (linear.seconds, mm.seconds, mm.rate) == pytest.approx((0.008, 0.016, 2e9))
    assert rollout.python_seconds == pytest.approx(0.040 - 0.024)
    assert step.python_seconds == pytest.approx(0.1 - 0.085 - 0.002)
    assert update.python_seconds == pytest.approx(0.015)
    # Another thread: beside the stage's own, at the stage in which it began; its kernel counts where it was launched.
    assert backward.operators["aten::mm"].seconds == pytest.approx(0.01)
    assert backward.operators["aten::mm"].kernel_seconds == pytest.approx(0.02)
    assert backward.operators["aten::mm"].rate == pytest.approx(5e9)
    assert backward.python_seconds == pytest.approx(0.03)
    assert step.operators["aten::mm"].calls == 1


def test_the_table_adds_up_by_hand() -> None:
    table = format_table(stage_times(EVENTS), first_step=2, steps=1)
    assert rows(table) == {
        "rollout": 0.040,
        "update": 0.045,
        "  backward": 0.030,
        "  the rest": 0.015,
        "the rest": 0.015,
        "together": 0.1,
    }
    assert table.startswith("Where step 2 went: 0.100 s")
    assert re.search(r"^  aten::mm +1 +0\.016 +16\.0 % +2\.0 +0\.000$", table, re.MULTILINE)
    assert max(len(line) for line in table.splitlines()) <= 88
    assert format_table(stage_times(EVENTS[:-3]), first_step=2, steps=3).startswith("Where steps 2 to 4 went")
    assert format_table([], first_step=1, steps=1) == "no stage was recorded\n"


def test_operations_of_matrix_products(tmp_path: Path) -> None:
    """Against the profiler's own count, for what it counts."""
    left, right, bias = torch.ones(3, 5), torch.ones(5, 7), torch.ones(7)
    with torch.profiler.profile(with_flops=True) as profiler, torch.no_grad():
        _ = left @ right, torch.addmm(bias, left, right), torch.baddbmm(bias, left[None], right[None])
        torch.bmm(left.expand(4, 3, 5), right.expand(4, 5, 7))
    assert profiler.profiler is not None
    known = {event.key: event.flops for event in profiler.key_averages() if event.flops}
    mine: dict[str, int] = {}
    for event in read_events(profiler):
        mine[event.name] = mine.get(event.name, 0) + event.flops
    assert {name: count for name, count in mine.items() if count} == known
    assert mine["aten::mm"] == 210 and mine["aten::bmm"] == 840 and known.keys() >= {"aten::addmm", "aten::baddbmm"}
    assert product_flops("mkldnn::_linear_pointwise", [[2, 3, 5], [7, 5], [], []]) == 420


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_profile_leaves_both_files_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = execute(assemble(PPO, tmp_path / "plain", total_steps=3))
    one = execute(profiled(PPO, tmp_path / "run"))
    assert_same(weights_of(plain), weights_of(one))
    assert (tmp_path / "plain" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"table.txt", "trace.json.gz"}
    table = (folder / "table.txt").read_text()
    assert table in capsys.readouterr().err
    seconds = rows(table)
    top = {"rollout", "reward", "make_batch", "log", "update"}
    assert seconds.keys() - {"the rest", "together"} >= top
    assert {"  logprobs", "  forward", "  backward", "  optimizer"} <= seconds.keys()
    assert sum(seconds[name] for name in (*top, "the rest")) == pytest.approx(seconds["together"], abs=0.004)
    assert re.search(r"^update / backward .*\n(  .*\n)+  outside of operators", table, re.MULTILINE)
    assert re.search(r"^  (aten::|autograd::)\w+.* \d+\.\d{3} ", table, re.MULTILINE)
    lines = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").read_text().splitlines()]
    (step,) = (line["time/step"] for line in lines if line["step"] == 2 and "time/step" in line)
    assert seconds["together"] == pytest.approx(step, rel=0.1)
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"stage/step", "stage/rollout", "stage/update", "aten::mm"} <= names


def test_ctrl_c_during_the_profile_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    armed = [False]

    def interrupting(completions: list[str], trainer_state: dict[str, int]) -> list[float]:
        if trainer_state["step"] == 1 and armed[0]:
            armed[0] = False
            os.kill(os.getpid(), signal.SIGINT)
        return early_letters(completions)

    reward = RewardConfig.of({"terms": {"early": {"use": interrupting}}, "scale": "running"})
    whole = execute(assemble(GRPO, tmp_path / "whole", total_steps=4, reward=reward))
    armed[0] = True
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        execute(profiled(GRPO, run, total_steps=4, reward=reward))
    assert not (run / "profile").exists()
    assert "no profile is written" in capsys.readouterr().err
    assert stage("rollout") is stage("reward"), "nothing is recorded any more"
    resumed = execute(profiled(GRPO, run, resume=True, total_steps=4, reward=reward))
    assert_same(weights_of(whole), weights_of(resumed))
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (run / "profile" / "table.txt").read_text().startswith("Where step 3 went")


@pytest.mark.parametrize(("updates", "written"), [(7, False), (8, True)])
def test_a_signal_between_updates(updates: int, written: bool, tmp_path: Path) -> None:
    """Four updates a step, so that the profiled step has updates 5 to 8; a profile that is whole is kept."""
    whole = execute(assemble(GRPO, tmp_path / "whole", total_steps=3))
    stopped = profiled(GRPO, tmp_path / "run")
    stop_after(stopped, updates, signal.SIGTERM)
    with pytest.raises(Interrupted):
        execute(stopped)
    assert (tmp_path / "run" / "profile").exists() is written
    resumed = assemble(GRPO, tmp_path / "run", resume=True, total_steps=3)
    assert_same(weights_of(whole), weights_of(execute(resumed)))


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a profile needs 2 whole steps.*this run has 1: raise total_steps"):
        profiled(GRPO, tmp_path / "run", total_steps=1)
    stopped = assemble(GRPO, tmp_path / "other", total_steps=3)
    stop_after(stopped, 6, signal.SIGTERM)
    with pytest.raises(Interrupted):
        execute(stopped)
    with pytest.raises(ConfigError, match="this run has 1"):
        profiled(GRPO, tmp_path / "other", resume=True)


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assembly = profiled(Setting("sft", False, "llama"), tmp_path / "run")
    assert assembly.run.profile is not None
    assembly.run.profile.folder = tmp_path / "run" / "missing" / "profile"
    execute(assembly)
    assert assembly.trainer.counts.steps == 3
    assert "the profile cannot be written" in capsys.readouterr().err


def test_several_steps(tmp_path: Path) -> None:
    profile = Profile(tmp_path / "profile", left=3, steps=2)
    for _ in range(3):
        profile.step_begins()
        with stage("rollout"):
            torch.ones(3).sum()
        profile.step_ended()
        with stage("between"):
            torch.ones(3).sum()
    assert profile.recorded
    table = profile.write(first_step=2)
    assert re.search(r"^rollout +2 ", table, re.MULTILINE)
    assert "between" not in table
