"""What a run came to, read from its folder; and runs of a tiny model that are really trained, in their own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from forked_runs import assert_same_run
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS
from tropism.cli import main
from tropism.errors import StorageError
from tropism.safe_yaml import read_yaml
from tropism.sweeps.sweep import Sweep
from tropism.sweeps.work import Ended, Job, Watch, _Follower, execute, outcome
from tropism.training.run_lock import RunLock

REWARD = """
import os, time
from pathlib import Path

def early(completions, trainer_state):
    mark = os.environ.get("TEST_WAIT_AT")
    if mark and trainer_state["step"] == 2 and not Path(mark).exists():
        Path(mark).touch()
        time.sleep(60)
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]
"""


def job_of(folder: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "run": str(folder / "run"),
        "recipe": "",
        "recipe_path": str(folder / "job.yaml"),
        "log": str(folder / "log"),
        "working_directory": str(folder),
        "options": ("--allow-code",),
        "metric": "eval/reward",
    }
    return Job(**{**fields, **changes})


def write_metrics(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(step: int, value: float | None) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "eval/reward": value, "eval/length_mean": 4.0}


# ---- what a run came to ----------------------------------------------------------------------------------------------


def test_the_last_or_the_best_value_counts(tmp_path: Path) -> None:
    rows = [(0, 0.9), (1, 0.3), (2, 0.7), (3, 0.5)]
    write_metrics(tmp_path, *(evaluated(*row) for row in rows))
    assert outcome(job_of(tmp_path)).value == 0.5
    assert outcome(job_of(tmp_path, take="best")).value == 0.7  # 0.9 is before training
    assert outcome(job_of(tmp_path, take="best", mode="min")).value == 0.3
    (tmp_path / "run" / "timings.jsonl").write_text('{"kind": "update", "step": 1, "time/step": 2.5}\n')
    assert outcome(job_of(tmp_path, metric="time/step")).value == 2.5


def test_the_interval_is_that_over_the_prompts_of_the_value_that_counts(tmp_path: Path) -> None:
    """Of n equal values it has no width; of one that is measured under other sampling it is that one's."""
    write_metrics(
        tmp_path, *({**evaluated(step, 0.0), "eval/reward@top_k=5": 1.0, "eval/mine": 2.0} for step in (0, 3))
    )
    (tmp_path / "run" / "evaluations").mkdir()
    columns: dict[str, list[Any]] = {
        "prompt": ["a", "b", "c", "d"],
        "completion": [""] * 4,
        "reward": [-1.0, -1.0, 1.0, 1.0],
        "length": [3.0] * 4,
        "sequence_kl": [None] * 4,
        "finish_reason": ["eos"] * 4,
        "metric/mine": [2.0] * 4,
    }
    other = {f"{name}@top_k=5": [1.0] * 4 if name == "reward" else values for name, values in columns.items()}
    del other["prompt@top_k=5"]
    pq.write_table(pa.table(columns | other), tmp_path / "run" / "evaluations" / "step-000003.parquet")
    low, high = outcome(job_of(tmp_path)).interval or (0.0, 0.0)
    assert low == pytest.approx(-high) and 0.8 < high <= 1
    assert outcome(job_of(tmp_path, metric="eval/reward@top_k=5")).interval == (1, 1)
    assert outcome(job_of(tmp_path, metric="eval/mine")).interval == (2, 2)
    assert outcome(job_of(tmp_path, metric="eval/sequence_kl")).interval is None


def test_a_value_that_is_no_number_is_a_reason(tmp_path: Path) -> None:
    write_metrics(tmp_path, evaluated(0, 0.5), evaluated(3, None))
    ended = outcome(job_of(tmp_path))
    assert ended.value is None and ended.reason == "eval/reward is no finite number at the end"


def test_a_missing_metric_is_told_with_those_there_are(tmp_path: Path) -> None:
    write_metrics(tmp_path, evaluated(0, 0.5), {"kind": "update", "step": 1, "loss/policy": 0.1})
    ended = outcome(job_of(tmp_path, metric="eval/rewrd"))
    assert ended.there_are == ("eval/length_mean", "eval/reward", "loss/policy")


# ---- watching --------------------------------------------------------------------------------------------------------


def test_a_follower_tells_each_step_once_and_reads_whole_lines(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def watch(step: int, value: float) -> bool:
        seen.append((step, value))
        return value < 0

    path = tmp_path / "metrics.jsonl"
    follower = _Follower(path, "eval/reward")
    assert not follower.look(watch)  # there is no file yet
    lines = [json.dumps(evaluated(step, value)) + "\n" for step, value in enumerate((0.9, 0.1, 0.2, 0.3, -1))]
    path.write_text(lines[0] + lines[1] + lines[2][:20])
    follower.look(watch)
    assert seen == [(1, 0.1)]  # nothing of step 0, before training
    path.write_text("".join(lines[:3]))
    follower.look(watch)
    path.write_text("".join(lines[:2]))  # cut back by a run that goes on
    follower.look(watch)
    lines[2] = json.dumps({"kind": "update", "step": 2}) + "\n"  # shorter: what was read ends inside the next line
    path.write_text("".join(lines[:4]))
    follower.look(watch)
    assert seen == [(1, 0.1), (2, 0.2), (3, 0.3)] and not follower.stopped
    path.write_text("".join(lines))
    assert follower.look(watch) and follower.stopped


def test_a_follower_notices_at_once_that_evaluations_lack_the_metric(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(evaluated(0, 0.5)) + "\n")
    follower = _Follower(path, "eval/rewrd")
    assert follower.look(None) and follower.lacking == ("eval/length_mean", "eval/reward")
    path.write_text(json.dumps({"kind": "collect", "step": 1, "reward/mean": 1.0}) + "\n")
    assert not _Follower(path, "loss/policy").look(None)  # may come yet


# ---- real runs -------------------------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    """A tiny model on the disk, prompts, a reward, a recipe of three steps, and a sweep over it."""
    tiny_model("llama", seed=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "held-out.txt").write_text("so\nwe sat\na dog\nmy cat")
    recipe = {
        "model": "model",
        "algorithm": {"name": "grpo", "group_size": 2},
        "data": "prompts.txt",
        "eval_data": "held-out.txt",
        "reward": "rewards.py:early",
        "total_steps": 3,
        "prompts_per_step": 4,
        "seed": 7,
        "sampling": {"max_new_tokens": 6},
        "trainer": {"evaluation": {"every": 1}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_sweep(folder, 1e-3, 1e30, 3e-2)


def write_sweep(folder: Path, *rates: float) -> None:
    parameters = {"trainer.learning_rate": {"strategy": "grid", "values": list(rates)}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"metric": "eval/reward", "parameters": parameters}))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with ``write_files`` in it."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def in_process(job: Job, watch: Watch | None) -> Ended:
    """As ``execute``, without the seconds that a process takes to start."""
    Path(job.recipe_path).write_text(job.recipe)
    code = main(["train", job.recipe_path, *job.options])
    return outcome(job) if code == 0 else Ended(reason="failed")


def test_the_best_recipe_trains_the_best_run_again(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 1e30 makes weights that are not finite: that trial fails, and the sweep goes on."""
    monkeypatch.setitem(Sweep.__init__.__kwdefaults__, "execute", in_process)  # type: ignore[arg-type]
    assert main(["sweep", "recipe.yaml", "sweep.yaml", "--out", "out", "--allow-code"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["complete"], summary["failed"]) == (2, 1) and summary["best"] in (0, 2)
    assert f"next:  tropism train {Path('out/best.yaml')}" in shown and "trial 001 (2 of 3) failed" in shown
    best = summary["rows"][0]
    assert best["interval"][0] <= best["value"] <= best["interval"][1]
    assert main(["train", "out/best.yaml", "--allow-code", "--run", "again"]) == 0
    trained = Path("out") / best["folder"]
    assert (Path("again") / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert read_yaml("again/recipe.yaml") == {**read_yaml(trained / "recipe.yaml"), "run": "again"}


def test_a_run_is_a_process_of_its_own(files: Path) -> None:
    """One that fails gives its message as the reason; one that another process uses is left alone."""
    recipe = read_yaml("recipe.yaml") | {"run": str(files / "run"), "data": "no-such-file.txt"}
    job = job_of(files, recipe=yaml.safe_dump(recipe))
    ended = execute(job)
    assert ended.value is None and "no-such-file.txt" in str(ended.reason) and ended.seconds > 0
    assert "error: " in Path(job.log).read_text() and not (files / "run").exists()
    (files / "run").mkdir()
    lock = RunLock(files / "run")
    lock.acquire()
    try:
        with pytest.raises(StorageError, match="in use by"):
            execute(job)
    finally:
        lock.release()


COMMAND = (sys.executable, "-m", "tropism.cli", "sweep", "recipe.yaml", "sweep.yaml", "--allow-code", "--out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a sweep of two trials, in the folder whole, that nothing interrupted."""
    folder = tmp_path_factory.mktemp("sweeps")
    write_files(folder)
    write_sweep(folder, 1e-3, 3e-2)
    subprocess.run([*COMMAND, "whole"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_was_interrupted_goes_on_to_the_same_end(
    whole: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, SIGTERM and the death of the sweep all let the run save; the next call ends as an uninterrupted one."""
    monkeypatch.chdir(whole)
    cut, mark = Path(f"cut-{number}"), whole / f"mark-{number}"
    environment = os.environ | {"TEST_WAIT_AT": str(mark)}
    process = subprocess.Popen([*COMMAND, str(cut)], env=environment, text=True, stderr=subprocess.PIPE)
    until = time.monotonic() + 600
    while not mark.exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), said
    if number != signal.SIGKILL:
        assert "0 of 2 trials are done; the same command goes on" in said
    while (cut / "trials" / "000" / ".lock-owner.json").exists():  # of a run whose sweep has died
        assert time.monotonic() < until
        time.sleep(0.1)
    assert list((cut / "trials" / "000" / "checkpoints").iterdir()) and not (cut / "trials" / "001").exists()
    subprocess.run([*COMMAND, str(cut)], check=True, stdout=subprocess.DEVNULL)
    assert "--resume" in (cut / "logs" / "000.log").read_text()
    for name in ("000", "001"):
        assert_same_run(cut / "trials" / name, whole / "whole" / "trials" / name)
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (cut, whole / "whole"))
    assert one["best"] == other["best"]
    assert [row | {"seconds": 0} for row in one["rows"]] == [row | {"seconds": 0} for row in other["rows"]]
