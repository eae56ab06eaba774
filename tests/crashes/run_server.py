"""Imports everything once, then forks a process for each run it is asked for, and kills it where it is told to.

Started by the tests beside it. Reads requests, one JSON object a line, and answers each with one. A run is small (two
steps of four updates) and saves after every update.

    {"run": FOLDER, "setting": NAME}             train; the answer has "ended": "whole", "error" or "killed"
        "resume": true                           go on with it
        "kill": {"save": K, "delay": SECONDS}    SIGKILL that long after the K-th save began; 0: after the run began
        "limit": {"save": K, "bytes": N}         no file may grow beyond N bytes from the K-th save on: a full disk
        "limit": {"saved": K, "bytes": N}        the same, from right after that save
        "stop": {"save": K}                      SIGSTOP when that save begins; answers with "pid" at once
    {"go_on": PID}                               let a stopped run go on to its end
    {"write": FOLDER, "line": N}                 replace a checkpoint, write another, prune; killed at the N-th line
                                                 of the functions that change the disk
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tiny_runs import PROMPTS, Setting, assemble, execute
from tropism.build import Assembly
from tropism.training import boundary
from tropism.training import checkpoint as checkpoint_module
from tropism.training.checkpoint import Checkpoint, checkpoint_name, prune, write_checkpoint
from tropism.training.config import CheckpointConfig, EvaluationConfig

SETTINGS = {
    "grpo-full": Setting("grpo", adapter=False, family="llama"),
    "ppo-lora": Setting("ppo", adapter=True, family="gpt2"),
}
CHANGING = {"write_checkpoint", "_put_in_place", "_discard", "prune"}
"""Functions of the module that change the disk; the others look at it, or compute."""
Say = Callable[..., None]
Work = Callable[[dict[str, Any], Say], None]


def main() -> None:
    torch.set_num_threads(1)
    for name in serve(list_modules, {})["modules"]:
        importlib.import_module(name)
    tell({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "go_on" in request:
            os.kill(request["go_on"], signal.SIGCONT)
            tell(ended(request["go_on"], pipes.pop(request["go_on"])))
        else:
            tell(serve(write if "write" in request else train, request))


def list_modules(request: dict[str, Any], say: Say) -> None:
    """Say what a run imports on its way, for the server to import it once for all runs."""
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            train({"run": f"{folder}/{setting}", "setting": setting}, lambda **event: None)
    say(modules=[name for name in sys.modules if not name.startswith("__")])


def tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


# The server's side ---------------------------------------------------------------------------------------------------

pipes: dict[int, Any] = {}
"""What stopped runs say, by process."""


def serve(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """Fork a process for ``work``; kill or stop it when it says that the time has come."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        in_child(work, request, writing)
    os.close(writing)
    said, events = os.fdopen(reading), []
    kill, stop = request.get("kill"), request.get("stop")
    for line in said if kill or stop else ():
        event = json.loads(line)
        events.append(event)
        if stop and event.get("save") == stop["save"]:
            os.kill(child, signal.SIGSTOP)
            pipes[child] = said
            return {"pid": child}
        if kill and event.get("save") == kill["save"]:
            time.sleep(kill["delay"])
            os.kill(child, signal.SIGKILL)
            break
    return ended(child, said, events)


def ended(child: int, said: Any, events: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """How a run ended, and what it said on its way, ``events`` first."""
    events = [*events, *(json.loads(line) for line in said if line.endswith("\n"))]
    said.close()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"ended": "killed", "signal": os.WTERMSIG(status)}
    return {name: value for event in events for name, value in event.items()}


def in_child(work: Work, request: dict[str, Any], writing: int) -> None:
    """Do the work, say how it ended, and leave without coming back."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tropism").addHandler(listener)

    def say(**event: Any) -> None:
        os.write(writing, (json.dumps(event) + "\n").encode())

    try:
        work(request, say)
        say(ended="whole", messages=messages)
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        say(ended="error", type=type(error).__name__, text=str(error), messages=messages)
    os._exit(0)


# The side of the run -------------------------------------------------------------------------------------------------


def train(request: dict[str, Any], say: Say) -> None:
    """One run, or what is left of it."""
    say(save=0)
    assembly = assemble(
        SETTINGS[request["setting"]],
        Path(request["run"]),
        resume=request.get("resume", False),
        eval_data=PROMPTS[:3],
        trainer={
            "checkpoints": CheckpointConfig(every=1, keep=2),
            "evaluation": EvaluationConfig(every=1),
            "preflight": False,
        },
    )
    announce_saves(say, request.get("limit", {}))
    save_after_every_update(assembly)
    execute(assembly)


def save_after_every_update(assembly: Assembly) -> None:
    keep_books: Callable[..., bool] = assembly.trainer.after_update

    def after_update(metrics: dict[str, float], at_end: bool) -> bool:
        stop = keep_books(metrics, at_end)
        if not at_end:
            assembly.run.saver.save()
        return stop

    assembly.trainer.after_update = after_update


def announce_saves(say: Say, limit: dict[str, int]) -> None:
    """Say when a checkpoint begins to be written; limit files from then on where that is wanted."""
    saves = 0

    def limit_files(name: str) -> None:
        if limit.get(name) == saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit["bytes"], resource.RLIM_INFINITY))

    def announced(folder: Path, checkpoint: Checkpoint) -> None:
        nonlocal saves
        if folder.name != "best":
            saves += 1
            limit_files("save")
            say(save=saves)
        write_checkpoint(folder, checkpoint)

    def pruned(folder: Path, **how: Any) -> None:
        prune(folder, **how)
        limit_files("saved")

    boundary.write_checkpoint, boundary.prune = announced, pruned  # type: ignore[attr-defined]


def write(request: dict[str, Any], say: Say) -> None:
    """Write step 1, write it again with other weights, write step 2 and prune to one; killed at a line of the code."""

    def at(steps: int, value: float) -> None:
        tensors: dict[str, dict[str, torch.Tensor]] = {"policy": {"a": torch.full((3,), value)}}
        state = {"value": value}
        path = folder / checkpoint_name(steps=steps, updates=steps)
        write_checkpoint(path, Checkpoint(state=state, tensors={**tensors, "optimizer": {}, "batch": {}}))

    folder = Path(request["write"])
    folder.mkdir()
    at(1, 1.0)
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != checkpoint_module.__file__ or frame.f_code.co_name not in CHANGING:
            return None
        lines += event == "line"
        if lines == request["line"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    at(1, 2.0)
    at(2, 3.0)
    prune(folder, keep=1)
    sys.settrace(None)


if __name__ == "__main__":
    main()
