"""Comparisons of a tiny model whose processes are calls in this one, which has imported everything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS
from tropism.cli import main
from tropism.comparing import child, course
from tropism.comparing.config import compare_config
from tropism.comparing.course import Course
from tropism.comparing.tasks import Task
from tropism.sweeps.work import Ended, Halt, Job, Watch, _command, outcome, reason_in

REWARD = """
import os, time
from pathlib import Path

def early(completions, prompts, trainer_state):
    mark = os.environ.get("TEST_WAIT_AT")
    if mark and trainer_state.get("step") == 2 and not Path(mark).exists():
        Path(mark).touch()
        time.sleep(60)
    said = os.environ.get("TEST_FAIL_AT")
    if said and any(said in prompt for prompt in prompts):
        raise RuntimeError("the judge is ill")
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]
"""
HELD_OUT = ["so", "we sat", "a dog"]


def write_files(folder: Path) -> dict[str, Any]:
    """A tiny model on the disk, prompts and a reward; the plain values of a recipe."""
    tiny_model("llama", seed=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "held-out.txt").write_text("\n".join(HELD_OUT))
    return {
        "model": "model",
        "data": "prompts.txt",
        "eval_data": "held-out.txt",
        "reward": "rewards.py:early",
        "prompts_per_step": 4,
        "sampling": {"max_new_tokens": 5},
        "trainer": {"learning_rate": 1e-3, "progress": False, "preflight": False},
    }


class Processes:
    """Runs what a comparison would start, one after the other, and counts it."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        """Of every child: its arguments, files without their folders."""
        self.before: Callable[[list[str]], None] = lambda arguments: None
        """Called before each."""

    def _work(self, arguments: list[str], log: Path, work: Callable[[list[str]], int]) -> int:
        self.commands.append([Path(word).name if "/" in word else word for word in arguments])
        self.before(arguments)
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            return work(arguments)

    def run_process(self, begin: list[str], log: Path, folder: str, environment: Mapping[str, str], **_: Any) -> int:
        return self._work(begin[1:], log, child.work)

    def execute(self, job: Job, watch: Watch | None = None, *, halt: Halt | None = None) -> Ended:
        log = Path(job.log)
        log.touch()
        size = log.stat().st_size
        Path(job.recipe_path).write_text(job.recipe)
        command = [*job.child[1:], *_command(job, Path(job.run)), *job.options]
        code = self._work(command, log, child.work if len(job.child) > 1 else main)
        return Ended(reason=reason_in(log, size, code)) if code else outcome(job)


def in_order(tasks: Sequence[Task], *, processes: int, halt: Halt) -> dict[str, str]:
    """As ``run_tasks``, in this thread."""
    failed: dict[str, str] = {}
    for task in tasks:
        try:
            if task.needs in failed:
                raise RuntimeError(failed[task.needs])
            task.act()
        except Exception as error:
            failed[task.name] = str(error)
            task.lost(str(error))
    return failed


def here(monkeypatch: pytest.MonkeyPatch) -> Processes:
    """Let comparisons run in this process."""
    processes = Processes()
    monkeypatch.setattr(course, "execute", processes.execute)
    monkeypatch.setattr(course, "run_process", processes.run_process)
    monkeypatch.setattr(course, "run_tasks", in_order)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    return processes


def make_course(mapping: Mapping[str, Any], methods: Any, *, out: Path, **settings: Any) -> Course:
    """A comparison of one seed with a budget of 48 completions, unless told otherwise."""
    budget = {} if "seconds" in settings else {"completions": 48}
    config = compare_config(None, methods=methods, **{"seeds": 1, "samples_per_prompt": 2, **budget, **settings})
    return Course(config, mapping, out, allow_code=True)


def cell(folder: Path, name: str) -> dict[str, Any]:
    """``cell.json`` of a cell."""
    return dict(json.loads((folder / "cells" / name / "cell.json").read_text()))


def samples(folder: Path, name: str) -> dict[str, list[Any]]:
    """The columns of a cell's samples."""
    return dict(pq.read_table(folder / "cells" / name / "samples.parquet").to_pydict())
