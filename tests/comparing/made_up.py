"""Folders of comparisons with made-up numbers, as ``tropism compare`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

PROMPTS = 6
SAMPLES = 2
WORDS = ("red", "blue", "green", "loud", "still", "warm", "cold", "tall")


def write_plan(folder: Path, methods: Mapping[str, Any] | Sequence[str], seeds: Sequence[int], **section: Any) -> Path:
    """``compare.yaml`` of a comparison with a budget of 100 completions."""
    folder.mkdir(parents=True, exist_ok=True)
    names = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    plan = {"recipe": {"model": "demo"}, "compare": {"methods": dict(names), "seeds": [*seeds], "completions": 100}}
    plan["compare"] |= section
    (folder / "compare.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder


def write_cell(
    folder: Path,
    method: str,
    seed: int,
    rewards: Sequence[Sequence[float]] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """A finished cell, or a failed one where ``failure`` is among the facts.

    Args:
        rewards: [P][K] of every sample of every prompt; by default made up from method and seed.
        columns: of ``samples.parquet``, in the place of those made up.
    """
    cell = folder / "cells" / f"{method}-seed{seed}"
    cell.mkdir(parents=True)
    trained = method not in ("base", "best-of-n")
    numbers = {"completions": 100, "tokens": 1000, "seconds": 12.5} if trained else {}
    common = {"method": method, "seed": seed, "failure": None, "completions": 0, "tokens": 0, "seconds": 0.0}
    common |= {"completions_per_answer": 1, "settings": {}, "choices": [], "kl_estimator": "k1", "kl_bound": None}
    (cell / "cell.json").write_text(json.dumps(common | numbers | facts))
    if facts.get("failure"):
        return cell
    rng = np.random.default_rng([seed, *method.encode()])
    table = np.asarray(rng.normal(0, 0.1, (PROMPTS, SAMPLES)) if rewards is None else rewards, dtype=float)
    prompts, samples = table.shape
    rows = prompts * samples
    made_up = {
        "prompt_index": np.repeat(np.arange(prompts), samples),
        "sample": np.tile(np.arange(samples), prompts),
        "prompt": np.repeat([f"prompt {index}" for index in range(prompts)], samples).tolist(),
        "completion": [" ".join(rng.choice(WORDS, 4)) for _ in range(rows)],
        "reward": table.ravel(),
        "length": np.full(rows, 10),
        "finish_reason": ["eos" if row % 2 else "length" for row in range(rows)],
        "sequence_kl": np.full(rows, 2.0 if trained else np.nan if method == "best-of-n" else 0.0),
        "base_logprob": np.full(rows, -10 * np.log(8.0)),
        "reward/vader": table.ravel(),
    }
    pyarrow.parquet.write_table(pyarrow.table(made_up | dict(columns or {})), cell / "samples.parquet")
    return cell


def write_training(cell: Path, points: Mapping[int, tuple[float, float]]) -> Path:
    """A run folder with evaluations: mean reward and KL by step, over two prompts."""
    run = cell / "run"
    (run / "evaluations").mkdir(parents=True)
    (run / "recipe.yaml").write_text("algorithm: ppo\n")
    for step, (reward, kl) in points.items():
        columns = {
            "prompt": ["one", "two"],
            "completion": ["a", "b"],
            "reward": [reward - 0.1, reward + 0.1],
            "length": [3, 5],
            "sequence_kl": [kl - 1, kl + 1],
            "finish_reason": ["eos", "length"],
        }
        path = run / "evaluations" / f"step-{step:06d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return run


def write_comparison(
    folder: Path,
    means: Mapping[str, float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    noise: float = 0.02,
    prompts: int = 24,
) -> Path:
    """A whole comparison: ``means`` is the reward of each method; prompts differ by far more than ``noise``."""
    write_plan(folder, [name for name in means if name != "base"], seeds)
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 0.3, (prompts, 1))
    for method, mean in means.items():
        for seed in seeds:
            own = np.random.default_rng([seed, *method.encode()])
            rewards = mean + hardness + own.normal(0, noise) + own.normal(0, noise, (prompts, SAMPLES))
            cell = write_cell(folder, method, seed, rewards.tolist())
            if method not in ("base", "best-of-n"):
                half = means.get("base", 0.0) + (mean - means.get("base", 0.0)) / 2
                write_training(cell, {0: (means.get("base", 0.0), 0.0), 5: (half, 1.0), 10: (mean, 2.0)})
    return folder
