"""Reward against KL: what each nat away from the base model bought, over training, over settings, and at best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tropism.comparing.results import BASE, Comparison, family
from tropism.errors import DataError
from tropism.evaluation.best_of import best_of_table
from tropism.evaluation.frontier import OptimalPoint, optimal_frontier
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.evaluation.statistics import Interval
from tropism.storage import write_whole

Floats = NDArray[np.float64]

ENUMERATION = "exact.json"
"""In the folder of a comparison: rewards and log-probs under the base of all completions of every held-out prompt."""


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """A policy: how far it is from the base, and what reward it has."""

    kl: float
    """Nats."""
    reward: float
    step: int | None = None
    """Of training; None for what was measured at the end."""
    share: float = math.nan
    """Of training, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class FrontierLine:
    """What belongs together: a method over training, or the values of one setting."""

    name: str
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All that is known about reward against KL in a comparison."""

    ends: Mapping[str, tuple[Interval, Interval]]
    """KL and reward of each method as measured in the end, with their intervals."""
    over_training: tuple[FrontierLine, ...]
    """Each method along training, mean over its seeds."""
    over_settings: tuple[FrontierLine, ...]
    """Each method that was compared with several values of a setting, from the smallest KL on."""
    best_of: FrontierLine | None
    """The best of n = 1, 2, 4, ... of the base model's own samples, at the bound ln n - (n - 1) / n."""
    exact: tuple[OptimalPoint, ...]
    """The best that any policy can have; none where the completions cannot be listed."""


def frontier(comparison: Comparison) -> Frontier:
    """Everything measured about reward against KL.

    Raises:
        DataError: a run folder or ``exact.json`` is damaged.
    """
    ends = {row.name: (row.kl, row.reward) for row in comparison.results.rows if math.isfinite(row.kl.mean)}
    return Frontier(
        ends=ends,
        over_training=tuple(over_training(comparison)),
        over_settings=tuple(_over_settings(ends)),
        best_of=best_of_line(comparison),
        exact=tuple(_exact(comparison.folder / ENUMERATION)),
    )


def over_training(comparison: Comparison, *, kl: bool = True) -> list[FrontierLine]:
    """Held-out reward (and KL) of each method at the evaluations of its training, mean over the seeds that have them.

    Args:
        kl: whether only evaluations with a KL count.
    """
    lines = []
    for name, cells in comparison.methods.items():
        runs = [RunData.read(cell.run).evaluations for cell in cells if cell.run is not None]
        points = _mean_points([found for run in runs if (found := _points(run, need_kl=kl))])
        if points:
            lines.append(FrontierLine(name=name, points=tuple(points)))
    return lines


def _points(evaluations: Sequence[Evaluation], *, need_kl: bool) -> dict[int, FrontierPoint]:
    last = max((one.step for one in evaluations), default=0)
    points = {}
    for one in evaluations:
        rewards, kls = (values[np.isfinite(values)] for values in (one.rewards, one.sequence_kl))
        if len(rewards) and (len(kls) or not need_kl):
            points[one.step] = FrontierPoint(
                kl=float(kls.mean()) if len(kls) else math.nan,
                reward=float(rewards.mean()),
                step=one.step,
                share=one.step / last if last else 0.0,
            )
    return points


def _mean_points(runs: Sequence[Mapping[int, FrontierPoint]]) -> list[FrontierPoint]:
    """The mean over seeds at the steps that all of them have."""
    if not runs:
        return []
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    return [
        FrontierPoint(
            kl=float(np.mean([run[step].kl for run in runs])),
            reward=float(np.mean([run[step].reward for run in runs])),
            step=step,
            share=float(np.mean([run[step].share for run in runs])),
        )
        for step in steps
    ]


def _over_settings(ends: Mapping[str, tuple[Interval, Interval]]) -> list[FrontierLine]:
    families: dict[str, list[FrontierPoint]] = {}
    for name, (kl, reward) in ends.items():
        families.setdefault(family(name), []).append(FrontierPoint(kl=kl.mean, reward=reward.mean))
    return [
        FrontierLine(name=name, points=tuple(sorted(points, key=lambda point: point.kl)))
        for name, points in families.items()
        if len(points) > 1
    ]


def best_of_line(comparison: Comparison) -> FrontierLine | None:
    """What choosing the best of n would give, without sampling again: from all samples of the base, without bias."""
    if BASE not in comparison.methods:
        return None
    samples = comparison.answers(BASE)
    rows: list[list[float]] = []
    for prompt in range(len(comparison.prompts)):
        rewards = np.concatenate([one.rewards[one.of_prompt(prompt)] for one in samples])
        rows.append(rewards[np.isfinite(rewards)].tolist())
    fewest = min(map(len, rows))
    if fewest < 2:
        return None
    sizes = [2**power for power in range(fewest.bit_length()) if 2**power <= fewest]
    table = best_of_table(rows, sizes if sizes[-1] == fewest else [*sizes, fewest])
    return FrontierLine(
        name="best of n", points=tuple(FrontierPoint(kl=one.kl, reward=one.reward.mean) for one in table)
    )


# The exact optimum ----------------------------------------------------------------------------------------------------


def write_enumeration(
    folder: str | Path, rewards: Sequence[Sequence[float]], reference_logprobs: Sequence[Sequence[float]]
) -> Path:
    """Tell a comparison all completions of its held-out prompts, so that its frontier shows the exact optimum.

    Args:
        folder: of the comparison.
        rewards: [P][Y] of every completion of every held-out prompt.
        reference_logprobs: [P][Y] their log-probs under the base model, in nats, at the temperature of the comparison.

    Returns:
        The file that was written.

    Raises:
        ValueError: as in ``optimal_frontier``.
        StorageError: the file cannot be written.
    """
    optimal_frontier(rewards, reference_logprobs, [1.0])
    table = {
        "rewards": [[float(value) for value in row] for row in rewards],
        "reference_logprobs": [[float(value) for value in row] for row in reference_logprobs],
    }
    path = Path(folder) / ENUMERATION
    write_whole(path, json.dumps(table).encode())
    return path


def exact_frontier(rewards: Any, reference_logprobs: Any, *, points: int = 40) -> list[OptimalPoint]:
    """``optimal_frontier`` at prices of a nat that go from next to no KL to almost all there is to gain.

    Args:
        rewards: as in ``optimal_frontier``.
        reference_logprobs: as in ``optimal_frontier``.
        points: how many, at least 2.
    """
    nested = len(rewards) > 0 and np.ndim(rewards[0]) > 0
    spread = max(float(np.ptp(np.asarray(row, dtype=np.float64))) for row in (rewards if nested else [rewards]))
    if spread == 0 or not math.isfinite(spread):
        return optimal_frontier(rewards, reference_logprobs, [1.0])
    return optimal_frontier(rewards, reference_logprobs, (spread * np.geomspace(20.0, 0.02, points)).tolist())


def _exact(path: Path) -> list[OptimalPoint]:
    if not path.is_file():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return exact_frontier(table["rewards"], table["reference_logprobs"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} lists no completions with rewards and reference_logprobs: {error}") from error
