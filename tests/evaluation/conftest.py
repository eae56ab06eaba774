"""A synthetic run folder with plausible numbers, as training writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

RunWriter = Callable[..., Path]

PLAIN = (
    "a long walk along the river before the rain came",
    "the second half, which drags more than it should",
    "his sister, and neither of them said what they meant",
    "that the ending was decided before anybody wrote it",
    "I have to admit the music stayed with me for days",
    "nothing happens for an hour; then everything does",
)
WARM = ("and I loved how gently it ended", "with a warm heart and good jokes", "which I really enjoyed to the end")
SALAD = ("wonderful", "amazing", "beautiful", "love", "great", "perfect", "joy", "happy", "best", "lovely")


def completion(rng: np.random.Generator, progress: float, hacked: bool) -> str:
    """One completion: plain at first, then warm, or nothing but praise where the reward was hacked."""
    if hacked and progress > 0.5:
        return " " + " ".join(rng.choice(SALAD, size=22))
    return f" {PLAIN[rng.integers(len(PLAIN))]} {rng.integers(1000)}" + (
        f" {WARM[rng.integers(len(WARM))]}." if rng.random() < progress else "."
    )


def write_evaluation(path: Path, *, prompts: int, progress: float, hacked: bool) -> None:
    """One row per held-out prompt; the reward rises and the KL grows with ``progress``."""
    rng = np.random.default_rng(int(1000 * progress) + 7)
    base = np.random.default_rng(3).normal(0.1, 0.25, prompts)
    top, nats = (0.85, 49.0) if hacked else (0.55, 4.8)
    rewards = np.clip(base * (1 - 0.5 * progress) + top * progress + rng.normal(0, 0.1, prompts), -1, 1)
    columns = {
        "prompt": [f"Film number {index} was a thing about" for index in range(prompts)],
        "completion": [completion(rng, progress, hacked) for _ in range(prompts)],
        "reward": rewards,
        "length": rng.integers(24, 33, prompts),
        "sequence_kl": nats * progress + (rng.normal(0, 2.0, prompts) if progress else np.zeros(prompts)),
        "finish_reason": ["eos" if value < 0.3 else "length" for value in rng.random(prompts)],
        "reward/vader": rewards,
        "reward/brevity": rng.normal(-0.2, 0.05, prompts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def metric_lines(steps: int, hacked: bool) -> list[dict[str, object]]:
    """One collect and two updates per step."""
    rng = np.random.default_rng(5)
    lines: list[dict[str, object]] = []
    top, nats = (0.85, 49.0) if hacked else (0.55, 4.8)
    for step in range(1, steps + 1):
        progress = step / steps
        counters = {"step": step, "samples": 16 * step, "tokens": 480 * step, "seconds": 7.3 * step}
        lines.append(
            {
                "kind": "collect",
                **counters,
                "updates": 2 * step - 2,
                "reward/mean": 0.1 + top * progress + rng.normal(0, 0.08),
                "reward/vader": 0.1 + top * progress + rng.normal(0, 0.08),
                "policy/sequence_kl": nats * progress + rng.normal(0, 0.6),
                "rollout/length_mean": 29 + rng.normal(),
                "rollout/eos_fraction": float(rng.uniform(0.1, 0.3)),
                "throughput/tokens_per_second": 310 + 20 * rng.normal(),
            }
        )
        for update in (1, 2):
            lines.append(
                {
                    "kind": "update",
                    **counters,
                    "updates": 2 * step - 2 + update,
                    "loss/policy": 0.02 * rng.normal(),
                    "policy/entropy": 2.6 - (2.2 if hacked else 0.5) * progress + 0.05 * rng.normal(),
                    "policy/clip_fraction": float(rng.uniform(0, 0.1)),
                    "optim/lr": 7e-4 * (1 - progress),
                    "optim/grad_norm": 0.8 + 0.1 * rng.normal(),
                }
            )
    return lines


@pytest.fixture(scope="session")
def write_run() -> RunWriter:
    """``write_run(folder, steps=30, prompts=24, hacked=False)`` writes a finished run and returns its folder."""

    def write(folder: Path, *, steps: int = 30, prompts: int = 24, hacked: bool = False) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text("algorithm: grpo\ngroup_size: 8\nkl_coef: 0.15\nlearning_rate: 0.0007\n")
        lines = metric_lines(steps, hacked)
        for step in np.linspace(0, steps, 4).round().astype(int).tolist():
            write_evaluation(
                folder / "evaluations" / f"step-{step:06d}.parquet",
                prompts=prompts,
                progress=step / steps,
                hacked=hacked,
            )
            lines.append({"kind": "evaluation", "step": step, "updates": 2 * step, "eval/perplexity": 12.0 + step})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "warnings.jsonl").write_text('{"step": 3, "message": "2 of 2 groups have equal rewards."}\n')
        (folder / "environment.json").write_text('{"torch": "2.13.0", "device": "cpu", "threads": 2}')
        return folder

    return write


@pytest.fixture
def run_folder(tmp_path: Path, write_run: RunWriter) -> Path:
    return write_run(tmp_path / "warm")
