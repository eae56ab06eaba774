"""``python -m benchmarks conditioned``: steps per second of reward-conditioned training against plain SFT.

Both learn from the same texts, in one process, step by step in turn. What is asked of conditioning is a slot per text
and a number per slot, so the two should take the same time.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import physical_cores, processor, versions
from benchmarks.models import model_folder
from benchmarks.runner import ROOT
from benchmarks.standard import write
from benchmarks.work import LEARNING_RATE, texts_of

WARM_UP = 2
"""Steps of each that are not counted."""


def main(arguments: Sequence[str]) -> None:
    """Take the steps, print the ratio, write JSON."""
    options = parse(arguments)
    import torch

    from tropism.training.memory import keep_freed_memory

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    seconds = measure(options)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["sft"] / medians["conditioned"]
    for name, values in seconds.items():
        spread = f"{min(values):.3f} to {max(values):.3f} s"
        print(f"{name:<12} median {medians[name]:.3f} s a step ({spread})")
    print(f"conditioned: {ratio:.3f} of the steps per second of sft ({options.rows} texts of {options.tokens} tokens)")
    result = {
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": processor(),
        "threads": options.threads,
        "versions": versions(),
        "model": options.model,
        "rows": options.rows,
        "tokens": options.tokens,
        "ratio": ratio,
        "seconds": seconds,
    }
    out = options.out or ROOT / "benchmarks" / "results" / f"conditioned-cpu-{date.today().isoformat()}.json"
    write(out, result)
    print(f"written to {out}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks conditioned", description=__doc__)
    parser.add_argument("--model", default="demo", help="any model, or one of the random ones of the benchmarks")
    parser.add_argument("--steps", type=int, default=15, help="counted steps of each")
    parser.add_argument("--rows", type=int, default=16, help="texts of a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text, the eos included")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: the cores")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/conditioned-cpu-<date>.json")
    options = parser.parse_args(arguments)
    if min(options.steps, options.rows) < 1 or options.tokens < 2:
        parser.error("--steps and --rows must be at least 1, --tokens at least 2")
    return options


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each counted step."""
    from tropism.algorithms import SFT, RewardConditioned

    seconds: dict[str, list[float]] = {"sft": [], "conditioned": []}
    with tempfile.TemporaryDirectory(prefix="tropism-conditioned-") as scratch:
        runs = {
            "sft": assembled(SFT(), options, scratch),
            "conditioned": assembled(RewardConditioned(), options, scratch),
        }
        for step in range(WARM_UP + options.steps):
            for name, run in runs.items():
                taken = one_step(run)
                if step >= WARM_UP:
                    seconds[name].append(taken)
    return seconds


def assembled(algorithm: Any, options: argparse.Namespace, scratch: str) -> Any:
    """A run that is built and has not begun."""
    from tropism.build import Assembly
    from tropism.config import Recipe
    from tropism.models.loading import ModelConfig, load_model
    from tropism.training.config import TrainerConfig

    model = load_model(ModelConfig(name=str(model_folder(options.model))))
    texts = texts_of(model.tokenizer, options.rows, options.tokens - 1)
    return Assembly(
        Recipe(
            model=model,
            algorithm=algorithm,
            data=[{"text": text, "reward": number / options.rows} for number, text in enumerate(texts)],
            run=str(Path(scratch) / algorithm.name),
            total_steps=10**9,
            prompts_per_step=options.rows,
            trainer=TrainerConfig(learning_rate=LEARNING_RATE, progress=False),
        )
    )


def one_step(run: Any) -> float:
    """Seconds from the texts to the updated weights."""
    began = time.perf_counter()
    for batch in run.trainer.source.collect(run.policy):
        run.trainer.update(batch)
    run.trainer.source.finish()
    return time.perf_counter() - began
