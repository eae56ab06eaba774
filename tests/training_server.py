"""Imports everything once, then forks ``tropism train`` for each run it is asked for, and signals it where it is slow.

Started by ``forked_runs``. Reads requests, one JSON object a line, and answers
each with one.

    {"arguments": [...], "logs": [FILE, ...]}    the command line after ``tropism``; where each process's output goes
        "port": PORT                             with several processes: where they meet
        "settings": {NAME: VALUE}                environment variables on top
        "slow": PHASE, "rank": RANK              that phase takes a minute (two seconds where it is to end), or fails
        "signals": [[SECONDS, NUMBER, RANK], ...]    sent after that long in the phase, each after the one before
    {"codes": [...], "seconds": [...]}           exit codes; seconds from the first signal (or the phase) to the ends
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from tropism import build, cli
from tropism.algorithms.grpo import GRPOAlgorithm
from tropism.errors import ModelError, RewardError, StorageError
from tropism.rewards import RewardHarness
from tropism.rollouts import engine
from tropism.training import boundary
from tropism.training.run_folder import RunFolder
from tropism.types import RewardInputs

LONG, SHORT = 60.0, 2.0
PATIENCE = 30.0
"""Seconds after which a run that does not end is killed; it hangs."""


def main() -> None:
    torch.set_num_threads(1)
    tell({"ready": True})
    for line in sys.stdin:
        tell(serve(json.loads(line)))


def tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait for the phase, send the signals, wait for the end."""
    reading, writing = os.pipe()
    children = []
    for rank in range(len(request["logs"])):
        child = os.fork()
        if child == 0:
            os.close(reading)
            in_child(request, rank, writing)
        children.append(child)
    os.close(writing)
    with os.fdopen(reading) as said:
        reached = bool(said.readline()) if request.get("slow") else False
        began = time.monotonic()
        for index, (delay, number, rank) in enumerate(request.get("signals", []) if reached else ()):
            time.sleep(delay)
            began = time.monotonic() if index == 0 else began
            with suppress(ProcessLookupError):
                os.kill(children[rank], number)
        ends = [wait_for(child, until=began + PATIENCE if reached else None) for child in children]
    return {"codes": [code for code, _ in ends], "seconds": [end - began for _, end in ends], "reached": reached}


def wait_for(child: int, *, until: float | None) -> tuple[int | None, float]:
    """The exit code of a process and when it ended; None if it had to be killed."""
    while until is None or time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, time.monotonic()


def in_child(request: dict[str, Any], rank: int, writing: int) -> None:
    """The command, with one phase slowed down; leaves with its exit code."""
    output = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    count = len(request["logs"])
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ |= request.get("settings", {})
    if request.get("slow") and rank == request.get("rank", 0):
        PHASES[request["slow"]](lambda: os.write(writing, b"reached\n"))
    code = cli.main(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Slow phases ---------------------------------------------------------------------------------------------------------

Announce = Callable[[], Any]


def before(owner: Any, name: str, wait: Callable[[], None], *, call: int = 1, ever_after: bool = False) -> None:
    """Let ``owner.name`` wait at its ``call``-th call, and at every one that follows where ``ever_after``."""
    original, calls = getattr(owner, name), 0

    def slowed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call or (ever_after and calls > call):
            wait()
        return original(*arguments, **named)

    setattr(owner, name, slowed)


def sleeping(announce: Announce, seconds: float = LONG) -> Callable[[], None]:
    def wait() -> None:
        announce()
        time.sleep(seconds)

    return wait


def compiled(announce: Announce) -> Callable[[], None]:
    """Minutes in one call of compiled code, which lets other threads run but never looks for signals."""

    def wait() -> None:
        announce()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)

    return wait


def stubborn(announce: Announce) -> Callable[[], None]:
    """Code that takes an interrupt for one more failure to try again after."""

    def wait() -> None:
        announce()
        while True:
            with suppress(BaseException):
                time.sleep(LONG)

    return wait


def failing(announce: Announce, error: Exception) -> Callable[[], None]:
    def fail() -> None:
        announce()
        raise error

    return fail


def scoring(wait: Callable[[], None], *, step: int) -> None:
    """Wait when the completions of a step (from 0) are scored; the dry call before training is of step 0, too."""
    original = RewardHarness.evaluate

    def evaluate(harness: RewardHarness, inputs: RewardInputs, **named: Any) -> Any:
        if inputs.trainer_state.get("step") == step and "total_steps" in inputs.trainer_state:
            wait()
        return original(harness, inputs, **named)

    RewardHarness.evaluate = evaluate  # type: ignore[method-assign, assignment]


def sampling(wait: Callable[[], None], *, purpose: str, call: int) -> None:
    """Wait in the ``call``-th rollout for training or evaluation."""
    original, calls = engine.EmbeddedSampler.generate, 0

    def generate(sampler: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if named["key"].purpose == purpose:
            calls += 1
            if calls == call:
                wait()
        return original(sampler, *arguments, **named)

    engine.EmbeddedSampler.generate = generate  # type: ignore[method-assign, assignment]


OUT_OF_MEMORY = torch.OutOfMemoryError("tried to allocate 2 GB")

PHASES: dict[str, Callable[[Announce], None]] = {
    "loading": lambda a: before(build, "policy_of", sleeping(a)),
    "memory": lambda a: before(build, "memory_of_run", sleeping(a)),
    "pre-flight": lambda a: before(build, "preflight", sleeping(a)),
    "first evaluation": lambda a: sampling(sleeping(a), purpose="evaluation", call=1),
    "sampling": lambda a: sampling(sleeping(a), purpose="training", call=2),
    "reward": lambda a: scoring(sleeping(a), step=1),
    "compiled reward": lambda a: scoring(compiled(a), step=1),
    "stubborn reward": lambda a: scoring(stubborn(a), step=1),
    "update": lambda a: before(GRPOAlgorithm, "loss", sleeping(a), call=4),
    "evaluation": lambda a: sampling(sleeping(a), purpose="evaluation", call=2),
    "last evaluation": lambda a: sampling(sleeping(a), purpose="evaluation", call=3),
    "saving": lambda a: before(boundary, "write_checkpoint", sleeping(a, SHORT)),
    "failing reward": lambda a: scoring(failing(a, RewardError("reward 'early': the judge is not there")), step=1),
    "failing update": lambda a: before(GRPOAlgorithm, "loss", failing(a, OUT_OF_MEMORY), call=4, ever_after=True),
    "failing evaluation": lambda a: sampling(failing(a, ArithmeticError("no")), purpose="evaluation", call=2),
    "failing log": lambda a: before(RunFolder, "append", failing(a, StorageError("the disk is full")), call=5),
    "failing load": lambda a: before(build, "policy_of", failing(a, ModelError("there is no such model"))),
    "export": lambda a: before(build, "save_policy", sleeping(a, SHORT)),
}


if __name__ == "__main__":
    main()
