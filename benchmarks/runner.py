"""The parent: starts one worker per system, lets them take turns step by step, and gathers what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.work import Job, System, Work

ROOT = Path(__file__).resolve().parents[1]
REST = 0.3
"""Seconds between two systems' steps: OpenMP's threads of the one before spin for a while after its last loop."""
Report = Callable[[str], None]


class WorkerError(Exception):
    """A worker ended without an answer; the message holds the end of what it wrote to stderr."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for every worker."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    """Clean steps of each system, after one to warm up."""
    scratch: Path
    timeout: float = 900.0
    """Most seconds for loading, and for a step."""
    report: Report = print


@dataclass
class Steps:
    """What one system has shown on one work."""

    load_seconds: float = 0.0
    first: dict[str, Any] | None = None
    clean: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    """Why there is nothing more."""


class Worker:
    """A process that does a job and takes turns through its pipes."""

    def __init__(self, job: Job, *, timeout: float) -> None:
        self.timeout = timeout
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment(job.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        self.tell(job.to_json())

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self.last_words()) from None

    def hear(self) -> dict[str, Any]:
        """The next message.

        Raises:
            WorkerError: there is none, or not in time.
        """
        assert self.process.stdout is not None
        alarm = threading.Timer(self.timeout, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if not line:
            raise WorkerError(self.last_words())
        message: dict[str, Any] = json.loads(line)
        return message

    def step(self) -> dict[str, Any]:
        """One step, alone on the machine."""
        time.sleep(REST)
        self.tell("go")
        return self.hear()

    def last_words(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        tail = "".join(self.stderr.readlines()[-12:]).strip()
        return f"exit status {code}; stderr ends with:\n{tail}"

    def stop(self) -> None:
        """End the process, at the latest by force."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stderr.close()


def environment(threads: int) -> dict[str, str]:
    """The environment of a worker: the same threads for every library, no network, this package importable."""
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def ask(job: Job, *, timeout: float) -> dict[str, Any]:
    """The answer of a worker that only prepares or measures something.

    Raises:
        WorkerError: it failed.
    """
    worker = Worker(job, timeout=timeout)
    try:
        return worker.hear()
    finally:
        worker.stop()


def run_work(work: Work, systems: Sequence[System], model: str, settings: Settings) -> dict[str, Steps]:
    """One work by several systems in turns: all load, all warm up, then a step of each, ``repeats`` times.

    A system that fails keeps its error and the steps before it; the others go on.
    """
    results = {system.name: Steps() for system in systems}
    workers: dict[str, Worker] = {}
    try:
        for system in systems:
            _start(work, system, model, settings, workers, results[system.name])
        for turn in range(settings.repeats + 1):
            for name in list(workers):
                _turn(work, name, turn, settings, workers, results[name])
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def _start(
    work: Work, system: System, model: str, settings: Settings, workers: dict[str, Worker], steps: Steps
) -> None:
    scratch = settings.scratch / f"{work.name}-{system.name}"
    job = Job(
        task=system.module,
        device=settings.device,
        threads=settings.threads,
        scratch=str(scratch),
        model=model,
        precision=system.precision,
        checkpointing=system.checkpointing,
        compiled=system.compiled,
        work=work,
    )
    worker = Worker(job, timeout=settings.timeout)
    try:
        message = worker.hear()
    except WorkerError as death:
        _lose(work, system.name, str(death), settings, steps)
        worker.stop()
        return
    if message["event"] == "unavailable":
        _lose(work, system.name, message["reason"], settings, steps)
        worker.stop()
        return
    steps.load_seconds = message["load_seconds"]
    workers[system.name] = worker


def _turn(work: Work, name: str, turn: int, settings: Settings, workers: dict[str, Worker], steps: Steps) -> None:
    try:
        step = workers[name].step()
        if step["tokens"] != work.tokens:
            raise WorkerError(f"made {step['tokens']} tokens in a step, where the work has {work.tokens}")
    except WorkerError as death:
        _lose(work, name, str(death), settings, steps)
        workers.pop(name).stop()
        return
    if turn == 0:
        steps.first = step
    else:
        steps.clean.append(step)
    settings.report(f"{work.name} {name} {'warm-up' if turn == 0 else f'step {turn}'}: {step['seconds']:.3f} s")


def _lose(work: Work, name: str, reason: str, settings: Settings, steps: Steps) -> None:
    steps.error = reason
    settings.report(f"{work.name} {name}: {reason}")
