"""``python -m benchmarks soak``: memory and seconds of a step over thousands of small steps, as a plot and JSON."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import physical_cores, versions
from benchmarks.models import random_model
from benchmarks.runner import ROOT
from benchmarks.standard import write

WARM_UP = 0.1
"""Share of the steps at the beginning that the trend leaves out: caches fill, and libraries load late."""
SHOWN = 500
"""Most points of a series in JSON and on the plot."""
EVALUATE_EVERY, SAVE_EVERY = 100, 20
MODEL = "0.05M"


class Recording:
    """Memory and time at the end of every step."""

    def __init__(self) -> None:
        self.megabytes = array("d")
        self.seconds = array("d")
        self.files = array("l")
        self._since = time.perf_counter()

    def add(self) -> None:
        """A step has ended."""
        now, process = time.perf_counter(), psutil.Process()
        self.megabytes.append(process.memory_info().rss / 1e6)
        self.seconds.append(now - self._since)
        self.files.append(process.num_fds() if hasattr(process, "num_fds") else 0)
        self._since = time.perf_counter()

    def summary(self) -> dict[str, Any]:
        """First, last and trend of each; the trend is that of a straight line through the steps after the warm-up."""
        return {
            "first_mb": self.megabytes[0],
            "after_warm_up_mb": self.megabytes[int(WARM_UP * len(self.megabytes))],
            "last_mb": self.megabytes[-1],
            "most_mb": max(self.megabytes),
            "mb_per_1000_steps": 1000 * slope(self.megabytes),
            "first_half_seconds_per_step": statistics.median(self.seconds[: len(self.seconds) // 2 or 1]),
            "second_half_seconds_per_step": statistics.median(self.seconds[len(self.seconds) // 2 :]),
            "first_open_files": self.files[0],
            "last_open_files": self.files[-1],
        }


def slope(values: Sequence[float]) -> float:
    """Change per step of the least-squares line through ``values`` without those of the warm-up; 0 for a single one."""
    kept = list(values)[int(WARM_UP * len(values)) :]
    return statistics.linear_regression(range(len(kept)), kept).slope if len(kept) > 1 else 0.0


def main(arguments: Sequence[str]) -> None:
    """Run the steps, print what memory did, write JSON and the plot."""
    options = parse(arguments)
    from tropism.training.memory import keep_freed_memory

    keep_freed_memory()
    result = measure(options.steps, options.threads, report=lambda line: print(line, flush=True))
    out = options.out or ROOT / "benchmarks" / "results" / f"soak-cpu-{date.today().isoformat()}.json"
    write(out, result)
    print(f"written to {out}, {plot(result, options.images)}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="GRPO steps of four prompts, four completions each")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: the cores")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/soak-cpu-<date>.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the plot")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    return options


def measure(steps: int, threads: int, *, report: Callable[[str], None]) -> dict[str, Any]:
    """One run with everything on that a run writes: logs, rollouts, evaluations, checkpoints, the best weights."""
    import torch

    torch.set_num_threads(threads)
    recording = Recording()
    with tempfile.TemporaryDirectory(prefix="tropism-soak-") as scratch:
        run = Path(scratch) / "run"
        train(run, steps, recording, report)
        logs = sum(path.stat().st_size for path in run.glob("*.jsonl"))
        tables = len(list(run.glob("rollouts/*.parquet")))
    summary = recording.summary()
    report(
        f"{steps} steps: {summary['first_mb']:.1f} MB after the first, {summary['after_warm_up_mb']:.1f} MB after the "
        f"warm-up, {summary['last_mb']:.1f} MB after the last; "
        f"trend {summary['mb_per_1000_steps']:+.2f} MB per 1,000 steps"
    )
    every = max(1, steps // SHOWN)
    return {
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "threads": threads,
        "versions": versions(),
        "steps": steps,
        "model": MODEL,
        "evaluate_every": EVALUATE_EVERY,
        "save_every": SAVE_EVERY,
        "log_bytes": logs,
        "rollout_files": tables,
        **summary,
        "every": every,
        "megabytes": [round(value, 3) for value in recording.megabytes[::every]],
        "seconds": [round(value, 4) for value in recording.seconds[::every]],
    }


def train(run: Path, steps: int, recording: Recording, report: Callable[[str], None]) -> None:
    """The run itself, with a note of memory after every step."""
    from tropism.algorithms import GRPO
    from tropism.build import Assembly
    from tropism.config import Recipe
    from tropism.rewards import RewardConfig
    from tropism.rollouts.config import Sampling
    from tropism.training.config import CheckpointConfig, EvaluationConfig, TrainerConfig

    prompts = [f"w{first} w{second} w{first + second}" for first in range(1, 9) for second in range(1, 9)]
    recipe = Recipe(
        model=random_model(MODEL),
        algorithm=GRPO(group_size=4),
        data=prompts[8:],
        eval_data=prompts[:8],
        reward=RewardConfig.of(even_words),
        run=str(run),
        total_steps=steps,
        prompts_per_step=4,
        sampling=Sampling(max_new_tokens=12),
        trainer=TrainerConfig(
            learning_rate=1e-4,
            progress=False,
            evaluation=EvaluationConfig(every=EVALUATE_EVERY),
            checkpoints=CheckpointConfig(every=SAVE_EVERY),
        ),
    )
    assembly = Assembly(recipe)
    keep_books: Callable[..., bool] = assembly.trainer.after_update

    def after_update(metrics: dict[str, float], ended: bool) -> bool:
        stop = keep_books(metrics, ended)
        if ended:
            recording.add()
            done = len(recording.megabytes)
            if done % max(1, steps // 10) == 0:
                report(f"step {done}: {recording.megabytes[-1]:.1f} MB, {recording.seconds[-1]:.3f} s")
        return stop

    assembly.trainer.after_update = after_update
    assembly.check()
    assembly.run.execute(steps, resumed=None)


def even_words(completions: list[str]) -> list[float]:
    """The share of words whose number is even."""
    words = [[word for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(int(word[1:]) % 2 == 0 for word in line) / max(1, len(line)) for line in words]


def plot(result: dict[str, Any], folder: Path) -> Path:
    """Resident memory over the steps, and the seconds of a step below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), dpi=160, layout="constrained")
    memory, seconds = figure.subplots(2, 1, sharex=True)
    steps = [1 + index * result["every"] for index in range(len(result["megabytes"]))]
    memory.plot(steps, result["megabytes"])
    memory.set(ylabel="resident memory (MB)", ylim=(0, 1.15 * result["most_mb"]))
    seconds.plot(steps, result["seconds"], linewidth=0.8)
    seconds.set(ylabel="seconds of a step", xlabel="step", ylim=(0, None))
    for panel in (memory, seconds):
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"{result['steps']:,} GRPO steps, {result['threads']} threads: "
        f"{result['mb_per_1000_steps']:+.2f} MB per 1,000 steps after the warm-up",
        fontsize=10,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak-memory.png"
    figure.savefig(path)
    return path
