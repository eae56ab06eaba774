"""The arithmetic of a sweep over targets, for many resamples of its prompts at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CHUNK_ENTRIES = 1_000_000
"""Resampled entries held in memory at once."""


class SweepNumbers:
    """Sums per prompt and target, from which the numbers of any resample of the prompts follow.

    Args:
        prompt_indices, targets, achieved, sequence_kl: [N] each, see ``steerability.Samples``.
        within: [K] whether each target, ascending, lies within the range of the training rewards.
        above: [K] whether it lies above what the model was trained on.
        spread: of the training rewards.
    """

    def __init__(
        self,
        *,
        prompt_indices: Ints,
        targets: Floats,
        achieved: Floats,
        sequence_kl: Floats,
        within: Bools,
        above: Bools,
        spread: float,
    ) -> None:
        self.targets, column = np.unique(targets, return_inverse=True)
        indices, prompt = np.unique(prompt_indices, return_inverse=True)
        self.prompts = len(indices)

        def table(rows: Bools, values: Floats | float) -> Floats:
            sums = np.zeros((self.prompts, len(self.targets)))
            np.add.at(sums, (prompt[rows], column[rows]), values)
            return sums

        scored, known = ~np.isnan(achieved), ~np.isnan(sequence_kl)
        self.count, self.total = table(scored, 1.0), table(scored, achieved[scored])
        self.kl_count, self.kl_total = table(known, 1.0), table(known, sequence_kl[known])
        self.inside = np.flatnonzero(within & (self.count.sum(0) > 0))
        self.outside = np.flatnonzero(~within)
        self.above, self.spread = above, spread
        self.level = float(np.abs(achieved[scored]).max(initial=0.0)) or 1.0
        rows = np.flatnonzero(scored & np.isin(column, self.inside))
        self.prompt_of_row = prompt[rows]
        self.target_ranks, self.achieved_ranks = MidRanks(targets[rows]), MidRanks(achieved[rows])
        self.entries = max(len(rows), self.prompts, len(self.targets) ** 2)
        """That one resample takes."""

    def numbers(self, weights: Floats) -> dict[str, Floats]:
        """Every number of every resample.

        Args:
            weights: [R, P] how often each prompt is in each resample.

        Returns:
            Named arrays [R], or [R, K] where there is a number per target; NaN where undefined.
        """
        x = self.targets[self.inside]
        count, total = weights @ self.count, weights @ self.total
        kl_count, kl_total = weights @ self.kl_count, weights @ self.kl_total
        means = _ratio(total, count)
        inside = means[:, self.inside]
        error = inside - x
        slope, intercept = _line(x, count[:, self.inside], total[:, self.inside])
        gap = inside[:, -1] - inside[:, 0]
        per_row = weights[:, self.prompt_of_row]
        return {
            "means": means,
            "kl_means": _ratio(kl_total, kl_count),
            "further": np.where(self.above, means - inside[:, -1:], inside[:, :1] - means),
            "spearman": self._spearman(x[None], inside),
            "spearman_samples": correlation(self.target_ranks.of(per_row), self.achieved_ranks.of(per_row), per_row),
            "slope": slope,
            "intercept": intercept,
            "calibration_error": np.abs(error).mean(-1),
            "calibration_rms": np.sqrt((error**2).mean(-1)),
            "gap": gap,
            "gap_share": gap / self.spread,
            "sequence_kl": _ratio(kl_total[:, self.inside].sum(-1), kl_count[:, self.inside].sum(-1)),
        }

    def correlations_of_prompts(self) -> Floats:
        """[P] rank correlation of each prompt's means with the targets; 0 if they are all one, NaN below two."""
        own = np.full(self.prompts, np.nan)
        means = _ratio(self.total, self.count)[:, self.inside]
        for prompt, row in enumerate(means):
            here = ~np.isnan(row)
            if here.sum() > 1:
                value = self._spearman(self.targets[self.inside][here][None], row[here][None])[0]
                own[prompt] = np.nan_to_num(value)
        return own

    def _spearman(self, targets: Floats, means: Floats) -> Floats:
        # Means of equal rewards differ in their last bits, depending on how many there are: those are ties.
        levels = np.round(means / self.level, 12)
        unknown = np.isnan(levels).any(-1)
        ranks = _mid_ranks(levels)
        return np.where(unknown, np.nan, correlation(_mid_ranks(targets), ranks, np.ones_like(levels)))


class MidRanks:
    """Mid-ranks of fixed values [N] under any weights."""

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        ascending = values[self.order]
        first = np.ones(len(values), dtype=np.bool_)
        first[1:] = ascending[1:] != ascending[:-1]
        self.starts = np.flatnonzero(first)
        self.group = np.empty(len(values), dtype=np.int64)
        self.group[self.order] = np.cumsum(first) - 1

    def of(self, weights: Floats) -> Floats:
        """[R, N] how often each value occurs -> [R, N] its rank, the mean rank of all that equal it."""
        if not len(self.starts):
            return weights
        size = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        ranks: Floats = (np.cumsum(size, axis=1) - size + (size + 1) / 2)[:, self.group]
        return ranks


def correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """[R, N] each (or [1, N] the same for all) -> [R] weighted Pearson's r of each row, NaN where one is constant."""
    total = weights.sum(-1, keepdims=True)
    x_off, y_off = (side - _ratio((weights * side).sum(-1, keepdims=True), total) for side in (x, y))
    x_square, y_square = (weights * x_off**2).sum(-1), (weights * y_off**2).sum(-1)
    varies = (x_square > 1e-24 * (weights * x**2).sum(-1)) & (y_square > 1e-24 * (weights * y**2).sum(-1))
    product = (weights * x_off * y_off).sum(-1)
    r: Floats = np.clip(_ratio(product, np.where(varies, np.sqrt(x_square * y_square), 0.0)), -1, 1)
    return r


def resampled_weights(count: int, entries: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of ``count`` prompts is in each resample with replacement: [R, count] at a time.

    Args:
        entries: that the caller makes of one resample; R is as large as memory for all of them allows.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ENTRIES // max(entries, count))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _mid_ranks(values: Floats) -> Floats:
    """[R, K] -> [R, K] ranks within each row, the mean rank where values are equal."""
    below = (values[:, None, :] < values[:, :, None]).sum(-1)
    equal = (values[:, None, :] == values[:, :, None]).sum(-1)
    ranks: Floats = below + (equal + 1) / 2
    return ranks


def _line(x: Floats, count: Floats, total: Floats) -> tuple[Floats, Floats]:
    """[R] slope and intercept by least squares, of ``count`` [R, K] points at each x [K], which add to ``total``."""
    number = count.sum(-1)
    mean_x, mean_y = _ratio(count @ x, number), _ratio(total.sum(-1), number)
    x_off = x - mean_x[:, None]
    slope = _ratio((x_off * total).sum(-1), (x_off**2 * count).sum(-1))
    return slope, mean_y - slope * mean_x


def _ratio(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    out = np.full(np.shape(above), np.nan)
    quotient: Floats = np.divide(above, below, out=out, where=np.broadcast_to(below != 0, out.shape))
    return quotient
