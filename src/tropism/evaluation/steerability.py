"""How closely a model gives the reward that it was asked for: the numbers of a sweep over targets.

A sweep completes every prompt at every target. All intervals come from resampling the prompts, each of which keeps all
its completions at all targets. Targets within the range of the training rewards decide the numbers; targets beyond it
are reported for themselves. A NaN among the achieved rewards means "unscored" and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tropism.errors import DataError
from tropism.evaluation.statistics import Interval, bootstrap_interval, percentile_interval
from tropism.evaluation.sweep_numbers import SweepNumbers, correlation, resampled_weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MARGIN = 0.01
"""Share of the training range that a target may lie outside of it and still count as within: a classifier whose rewards
end at 0.9997 was trained on all that there is up to 1."""
NEAR = 0.05
"""A training reward lies near a target if they differ by at most this share of the spread."""
BEYOND = 0.25
"""How far the default targets beyond the training range lie outside of it, as a share of the spread."""


@dataclass(frozen=True, eq=False)
class TrainingRewards:
    """How the rewards were distributed that a model was trained on."""

    knots: Floats
    """[M] ascending: all rewards, or their quantiles at evenly spaced probabilities from 0 to 1."""

    @classmethod
    def of(cls, rewards: Sequence[float] | Floats) -> TrainingRewards:
        """From all rewards or their quantiles, in any order; NaN (unscored) is left out.

        Raises:
            DataError: fewer than two different rewards, or an infinite one.
        """
        values = np.asarray(rewards, dtype=np.float64).ravel()
        values = np.sort(values[~np.isnan(values)])
        if not len(values) or values[0] == values[-1] or np.isinf(values).any():
            raise DataError("the training rewards must be finite and at least two of them different")
        return cls(values)

    @property
    def low(self) -> float:
        """The lowest."""
        return float(self.knots[0])

    @property
    def high(self) -> float:
        """The highest."""
        return float(self.knots[-1])

    def quantile(self, share: float) -> float:
        """The reward that ``share`` of the training rewards lie below (linear between neighbours)."""
        return float(np.quantile(self.knots, share))

    @property
    def bulk(self) -> tuple[float, float]:
        """Their 5th and 95th percentile; the whole range where those are one."""
        low, high = self.quantile(0.05), self.quantile(0.95)
        return (low, high) if high > low else (self.low, self.high)

    @property
    def spread(self) -> float:
        """What lies between the two ends of ``bulk``."""
        low, high = self.bulk
        return high - low

    def includes(self, target: float) -> bool:
        """Whether a target lies within the training range (give or take ``MARGIN``)."""
        room = MARGIN * (self.high - self.low)
        return bool(self.low - room <= target <= self.high + room)

    def near(self, target: float) -> float:
        """The share of the training rewards that lie near a target (``NEAR``)."""
        return float(np.mean(np.abs(self.knots - target) <= NEAR * self.spread * (1 + 1e-9)))


def default_targets(training: TrainingRewards, count: int = 11) -> list[float]:
    """What a sweep asks for: ``count`` targets evenly spaced over the bulk of the training rewards, one below the range
    of the training rewards and one above it, in ascending order."""
    room = max(BEYOND * training.spread, 2 * MARGIN * (training.high - training.low))
    inside = np.linspace(*training.bulk, count).tolist()
    return [training.low - room, *inside, training.high + room]


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """N completions, each of a prompt that was asked for a target."""

    prompts: tuple[str, ...]
    """[N]"""
    completions: tuple[str, ...]
    """[N]"""
    prompt_indices: Ints
    """[N] which prompt; what is resampled."""
    targets: Floats
    """[N] in the reward's own units."""
    achieved: Floats
    """[N] in the reward's own units, NaN where unscored."""
    sequence_kl: Floats
    """[N] log-prob at the target minus the base model's of the plain prompt, in nats; NaN where there is no base."""

    def __post_init__(self) -> None:
        columns = (self.completions, self.prompt_indices, self.targets, self.achieved, self.sequence_kl)
        if any(len(column) != len(self.prompts) for column in columns):
            raise ValueError(f"the columns of {len(self.prompts)} samples have different lengths")
        if not np.isfinite(self.targets).all() or np.isinf(self.achieved).any():
            raise ValueError("targets must be finite, and achieved rewards finite or NaN (unscored)")

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, target: float) -> Samples:
        """Those that were asked for this target."""
        rows = np.flatnonzero(self.targets == target)
        return Samples(
            prompts=tuple(self.prompts[row] for row in rows),
            completions=tuple(self.completions[row] for row in rows),
            prompt_indices=self.prompt_indices[rows],
            targets=self.targets[rows],
            achieved=self.achieved[rows],
            sequence_kl=self.sequence_kl[rows],
        )

    @classmethod
    def concat(cls, parts: Sequence[Samples]) -> Samples:
        """All samples of all parts, in order."""
        return cls(
            prompts=tuple(text for part in parts for text in part.prompts),
            completions=tuple(text for part in parts for text in part.completions),
            prompt_indices=np.concatenate([part.prompt_indices for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            achieved=np.concatenate([part.achieved for part in parts]),
            sequence_kl=np.concatenate([part.sequence_kl for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What was achieved at one target."""

    target: float
    in_range: bool
    """Whether it lies within the range of the training rewards."""
    count: int
    """Scored completions."""
    achieved: Interval
    """Mean."""
    std: float
    """Of single completions (n - 1); NaN with fewer than two."""
    median: float
    sequence_kl: Interval
    """Mean, in nats."""
    coverage: float
    """Share of the training rewards near this target."""


@dataclass(frozen=True, kw_only=True)
class Beyond:
    """What a target does that lies outside the training range."""

    target: float
    side: Literal["below", "above"]
    achieved: Interval
    """Mean."""
    further: Interval
    """How far the mean moved in the direction that was asked for, from the outermost target within the range."""

    @property
    def moves_on(self) -> bool:
        """Whether the mean certainly goes on moving in the direction asked for."""
        return self.further.low > 0


@dataclass(frozen=True, kw_only=True)
class Steerability:
    """The numbers of a sweep. An undefined one (nothing to rank, no base model) is NaN, and so are unknown bounds."""

    targets: tuple[TargetResult, ...]
    """Ascending."""
    beyond: tuple[Beyond, ...]
    spearman: Interval
    """Rank correlation of targets and mean achieved rewards."""
    spearman_samples: Interval
    """Rank correlation over single completions."""
    slope: Interval
    """Least squares over single completions: how much more is achieved per unit asked for; 1 is ideal."""
    intercept: Interval
    """Of the same line."""
    calibration_error: Interval
    """Mean over the targets of |mean achieved - target|."""
    calibration_rms: Interval
    """Root of the mean over the targets of (mean achieved - target)^2."""
    gap: Interval
    """Mean achieved at the highest minus at the lowest target within the range."""
    gap_share: Interval
    """The same as a share of the training rewards' spread (5th to 95th percentile)."""
    control_share: Interval
    """Share of the prompts whose own rank correlation is positive; a prompt that never moves counts as not."""
    control_mean: Interval
    """Mean of the prompts' own rank correlations; that of a prompt that never moves counts as 0."""
    sequence_kl: Interval
    """Mean over all completions at targets within the range."""
    prompts: int
    samples: int
    unscored: int


def steerability(
    samples: Samples, training: TrainingRewards, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Steerability:
    """Every number of a sweep.

    Args:
        samples: of every prompt at every target (a prompt may have several at each).
        training: what the model was trained on.
        confidence, resamples, seed: as in ``statistics.bootstrap_interval``.

    Raises:
        DataError: fewer than two targets within the training range have scored completions.
    """
    sweep = _sweep_of(samples, training)
    values = {name: value[0] for name, value in sweep.numbers(np.ones((1, sweep.prompts))).items()}
    chunks = [sweep.numbers(weights) for weights in resampled_weights(sweep.prompts, sweep.entries, resamples, seed)]
    resampled = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in values}

    def interval(name: str, index: int | tuple[()] = ()) -> Interval:
        drawn = resampled[name] if index == () else resampled[name][:, index]
        return percentile_interval(float(values[name][index]), drawn, count=sweep.prompts, confidence=confidence)

    def over_prompts(each: Floats) -> Interval:
        if np.isnan(each).all():
            return Interval(math.nan, math.nan, math.nan)
        return bootstrap_interval(each, confidence=confidence, resamples=resamples, seed=seed)

    own = sweep.correlations_of_prompts()
    single = ("spearman", "spearman_samples", "slope", "intercept", "calibration_error", "calibration_rms")
    return Steerability(
        targets=tuple(
            TargetResult(
                target=float(target),
                in_range=training.includes(target),
                count=int(sweep.count[:, index].sum()),
                achieved=interval("means", index),
                **_spread_of(samples.at(target).achieved),
                sequence_kl=interval("kl_means", index),
                coverage=training.near(target),
            )
            for index, target in enumerate(sweep.targets)
        ),
        beyond=tuple(
            Beyond(
                target=float(sweep.targets[index]),
                side="below" if sweep.targets[index] < training.low else "above",
                achieved=interval("means", index),
                further=interval("further", index),
            )
            for index in sweep.outside.tolist()
        ),
        **{name: interval(name) for name in (*single, "gap", "gap_share", "sequence_kl")},
        control_share=over_prompts(np.where(np.isnan(own), np.nan, own > 0)),
        control_mean=over_prompts(own),
        prompts=sweep.prompts,
        samples=len(samples),
        unscored=int(np.isnan(samples.achieved).sum()),
    )


def pearson(samples: Samples, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Pearson's r of target and achieved reward over single completions, with its bootstrap interval over prompts."""
    rows = ~np.isnan(samples.achieved)
    prompts, prompt = np.unique(samples.prompt_indices[rows], return_inverse=True)
    x, y = samples.targets[rows][None], samples.achieved[rows][None]
    if not len(prompts):
        return Interval(math.nan, math.nan, math.nan)
    value = float(correlation(x, y, np.ones_like(x))[0])
    drawn = [
        correlation(x, y, weights[:, prompt]) for weights in resampled_weights(len(prompts), x.size, resamples, seed)
    ]
    return percentile_interval(value, np.concatenate(drawn), count=len(prompts), confidence=confidence)


@dataclass(frozen=True, kw_only=True)
class DistributionStatistic:
    """The distribution of some rewards, as the numbers that describe it."""

    count: int
    min: float
    max: float
    mean: float
    median: float
    std: float
    """With n - 1; NaN with a single reward."""
    pct_1: float
    pct_5: float
    pct_25: float
    pct_75: float
    pct_95: float
    pct_99: float

    @classmethod
    def of(cls, rewards: Floats) -> DistributionStatistic:
        """Of all that are not NaN (unscored).

        Raises:
            DataError: there is none.
        """
        values = rewards[~np.isnan(rewards)]
        if not len(values):
            raise DataError(f"none of the {len(rewards)} completions is scored, so there is nothing to describe")
        shares = np.percentile(values, [1, 5, 25, 75, 95, 99]).tolist()
        names = ("pct_1", "pct_5", "pct_25", "pct_75", "pct_95", "pct_99")
        return cls(
            count=len(values),
            min=float(values.min()),
            max=float(values.max()),
            mean=float(values.mean()),
            **_spread_of(values),
            **dict(zip(names, shares, strict=True)),
        )


def _sweep_of(samples: Samples, training: TrainingRewards) -> SweepNumbers:
    targets = np.unique(samples.targets)
    sweep = SweepNumbers(
        prompt_indices=samples.prompt_indices,
        targets=samples.targets,
        achieved=samples.achieved,
        sequence_kl=samples.sequence_kl,
        within=np.array([training.includes(target) for target in targets]),
        above=targets > training.high,
        spread=training.spread,
    )
    if len(sweep.inside) < 2:
        raise DataError(
            f"{len(sweep.inside)} targets within the training rewards ({training.low:g} to {training.high:g}) have "
            "scored completions; ask for at least two of those"
        )
    return sweep


def _spread_of(values: Floats) -> dict[str, float]:
    scored = values[~np.isnan(values)]
    std = float(scored.std(ddof=1)) if len(scored) > 1 else math.nan
    return {"median": float(np.median(scored)) if len(scored) else math.nan, "std": std}
