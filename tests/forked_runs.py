"""Runs of the real command line on a tiny model, in processes forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, assert_same
from tropism.training.checkpoint import list_checkpoints

SCRIPT = Path(__file__).with_name("training_server.py")
LIMIT = 10.0
"""Seconds that a run may take to end."""

REWARD = """
def early(completions):
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]
"""


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended, in order of rank."""

    codes: list[int | None]
    """None: it hung and was killed."""
    seconds: list[float]
    """From the first signal, or else from the phase that was asked for."""
    said: list[str]
    reached: bool
    """Whether the run came to the phase that was asked for."""


class Server:
    """See training_server.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, *arguments: object, logs: Path, count: int = 1, **what: Any) -> Ended:
        """``tropism ARGUMENTS`` in ``count`` processes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        paths = [logs.with_name(f"{logs.name}-{rank}.log") for rank in range(count)]
        what |= {"arguments": [str(argument) for argument in arguments], "logs": [str(path) for path in paths]}
        self.process.stdin.write(json.dumps(what | {"port": free_port()}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        said = [path.read_text(errors="replace") for path in paths]
        for path in paths:
            path.unlink()
        return Ended(said=said, **answer)

    def train(
        self,
        recipe: Path,
        run: Path,
        phase: str | None = None,
        *signals: tuple[float, int] | tuple[float, int, int],
        count: int = 1,
        rank: int = 0,
        more: Sequence[object] = (),
        settings: Mapping[str, str] | None = None,
    ) -> Ended:
        """A new run; processes get signals while one of them is in a phase that takes long."""
        triples = [(*signal, 0)[:3] for signal in signals]
        return self.run(
            *("train", recipe, "--run", run, "--allow-code", *more),
            logs=run, count=count, slow=phase, rank=rank, signals=triples, settings=dict(settings or {})
        )  # fmt: skip

    def finish(self, run: Path, *, count: int = 1) -> None:
        """Resume a run, which must get to its end."""
        ended = self.run("train", "--resume", run, "--allow-code", logs=run, count=count)
        assert ended.codes == [0] * count, ended.said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving() -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())["ready"]
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


def write_recipe(folder: Path) -> Path:
    """Two steps of two updates each, evaluated before, between and after them."""
    tiny_model("llama", seed=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "held-out.txt").write_text("\n".join(PROMPTS[:2]))
    values = {
        "model": str(folder / "model"),
        "algorithm": {"name": "grpo", "group_size": 2, "num_epochs": 2},
        "data": str(folder / "prompts.txt"),
        "eval_data": str(folder / "held-out.txt"),
        "reward": {"terms": {"early": {"use": f"{folder / 'rewards.py'}:early"}}, "scale": "running"},
        "total_steps": 2,
        "prompts_per_step": 4,
        "seed": 7,
        "sampling": {"max_new_tokens": 6},
        "trainer": {"learning_rate": 1e-3, "evaluation": {"every": 1}, "micro_batch_size": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def contents(run: Path) -> dict[str, Any]:
    """What equal runs share: logs, and everything of the last checkpoint but the sizes of logs with seconds in them."""
    last = list_checkpoints(run / "checkpoints")[-1]
    state = {k: v for k, v in json.loads((last / "state.json").read_text()).items() if k != "logs"}
    return {
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "warnings": (run / "warnings.jsonl").read_bytes() if (run / "warnings.jsonl").exists() else None,
        "checkpoint": last.name,
        "state": state,
        "files": sorted(path.relative_to(run).as_posix() for path in run.rglob("*.parquet")),
    }


def assert_same_run(run: Path, whole: Path) -> None:
    """Equal bit for bit, the exported model included."""
    assert contents(run) == contents(whole)
    for name in ("policy", "optimizer"):
        one, other = (list_checkpoints(folder / "checkpoints")[-1] / f"{name}.safetensors" for folder in (run, whole))
        assert_same(load_file(one), load_file(other))
    assert_same(load_file(run / "model" / "model.safetensors"), load_file(whole / "model" / "model.safetensors"))
