"""What the scores of held-out comparisons are worth: accuracy beside trivial rules, calibration, correlation.

Every rate is a sum over comparisons divided by another one, so that intervals come from resampling comparisons: all
pairs of one comparison are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tropism.evaluation.comparison_table import ScoredComparison
from tropism.evaluation.statistics import Interval, percentile_interval
from tropism.evaluation.sweep_numbers import MidRanks, correlation, resampled_weights

if TYPE_CHECKING:
    from tropism.judgements import Kind

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RATING_GAP = 0.5
"""Two completions whose ratings differ by less count as equally good."""
BINS = 10
"""Of equal width, of each calibration curve."""
RESAMPLES = 2000
_ROUNDING = 1e-9
"""1.4 and 0.9 differ by 0.5, but for the last bit."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Predictions of about the same confidence."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean confidence; NaN where there are none."""
    observed: Interval
    """Share of them that came true."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How often predictions came true, against how sure they were."""

    bins: tuple[Bin, ...]
    error: float
    """Mean of |predicted - observed| over the bins, weighted by their counts; NaN without any prediction."""
    by_chance: float
    """What ``error`` would be, about, if every probability were right and predictions were independent: it falls with
    their number, and an error of this size shows nothing."""

    @property
    def count(self) -> int:
        """Predictions in all bins."""
        return sum(one.count for one in self.bins)


@dataclass(frozen=True, kw_only=True)
class ComparisonNumbers:
    """Everything that is measured on held-out comparisons."""

    kind: Kind
    items: int
    told: int
    """Comparisons in which one was chosen, or found better; ties in the labels are left out of the accuracy."""
    pairs: int
    """Pairs within a comparison whose ratings differ enough; 0 where there are no ratings."""
    rating_gap: float
    """By how much, at least."""
    numbers: Mapping[str, Interval]
    """By name, as ``eval/<name>`` in the metrics; bounds are NaN where no interval was asked for, or there is none."""
    leads: Mapping[str, Interval]
    """Accuracy less that of each rule on the same comparisons, by the name of the rule's accuracy."""
    pair_curve: Calibration | None
    """The chosen one against each other one, seen from the one with the higher score; None for ratings."""
    best_curve: Calibration | None
    """The highest score being the choice; None unless some comparison has more than two completions."""


def measure(
    items: Sequence[ScoredComparison],
    kind: Kind,
    *,
    rating_gap: float = RATING_GAP,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ComparisonNumbers:
    """All numbers of at least one comparison.

    choice       ``loss`` (-log softmax at the choice, for a tie its mean over all), ``accuracy`` and that of rules that
                 read nothing, ``pair_accuracy``, ``calibration_error``, ``overconfidence`` (mean of confidence less
                 outcome over pairs)
    rating       ``loss`` (mean squared error), ``pearson``, ``spearman``, ``pearson_length``, ``label_mean``,
                 ``label_variance``
    difference   the same of the difference of the two scores, and the accuracy of its sign beside the rules

    Equal scores are no advantage: where m completions share the highest, the prediction counts as 1/m of a right one if
    one of them is the choice, so that a model with one score for all has the accuracy of chance.

    Args:
        rating_gap: pairs of completions whose ratings differ by at least this are compared for ``pair_accuracy``.
        resamples: of the comparisons, for 95 % intervals; 0: none.
    """
    grid = _Grid(items, kind)
    rates, told, pairs = _Rates(), 0, 0
    rates.add("loss", grid.weights * grid.losses, grid.weights)
    if kind != "rating":
        told = grid.add_choices(rates)
    if kind == "choice":
        pairs = grid.add_rated_pairs(rates, rating_gap)
    pair_bins = grid.pair_bins(rates) if kind == "choice" and told else None
    best_bins = grid.best_bins(rates) if kind == "choice" and told and grid.present.sum(1).max() > 2 else None
    intervals = rates.intervals(resamples, seed)
    if kind != "choice":
        intervals |= grid.correlations(resamples, seed)
    curves = [None if one is None else _calibration(one, intervals) for one in (pair_bins, best_bins)]
    numbers = {name: value for name, value in intervals.items() if ":" not in name and not math.isnan(value.mean)}
    if curves[0] is not None:
        numbers["calibration_error"] = _alone(curves[0].error)
    if kind != "choice":
        numbers["label_mean"] = _alone(float(grid.targets.mean()))
        numbers["label_variance"] = _alone(float(grid.targets.var()))
    if pairs:
        numbers["pairs"] = _alone(pairs)
    return ComparisonNumbers(
        kind=kind,
        items=len(items),
        told=told,
        pairs=pairs,
        rating_gap=rating_gap,
        numbers=numbers,
        leads={name.removeprefix("lead:"): one for name, one in intervals.items() if name.startswith("lead:")},
        pair_curve=curves[0],
        best_curve=curves[1],
    )


class _Rates:
    """Named rates: a sum over comparisons divided by another one.

    A name with a colon is a part of something, and no number of its own.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.above: list[Floats] = []
        self.below: list[Floats] = []

    def add(self, name: str, above: Floats, below: Floats) -> None:
        """[N] each."""
        self.names.append(name)
        self.above.append(above)
        self.below.append(below)

    def intervals(self, resamples: int, seed: int) -> dict[str, Interval]:
        """Each rate with its interval; NaN where there is nothing to divide by."""
        above, below = np.stack(self.above, 1), np.stack(self.below, 1)
        values = _ratio(above.sum(0), below.sum(0))
        count = len(above)
        drawn = [
            _ratio(weights @ above, weights @ below)
            for weights in resampled_weights(count, count + 2 * len(self.names), resamples, seed)
        ]
        if not drawn:
            return {name: _alone(value) for name, value in zip(self.names, values.tolist(), strict=True)}
        every = np.concatenate(drawn)
        return {
            name: percentile_interval(value, column, count=count)
            for name, value, column in zip(self.names, values.tolist(), every.T, strict=True)
        }


class _Grid:
    """Comparisons as arrays [N, K], with empty places where one has fewer completions than another."""

    def __init__(self, items: Sequence[ScoredComparison], kind: Kind) -> None:
        width = max(len(item.scores) for item in items)
        shape = (len(items), width)
        self.kind = kind
        self.scores, self.characters, self.ratings = np.zeros(shape), np.zeros(shape), np.full(shape, np.nan)
        self.present = np.zeros(shape, dtype=np.bool_)
        for row, item in enumerate(items):
            size = len(item.scores)
            self.present[row, :size] = True
            self.scores[row, :size], self.characters[row, :size] = item.scores, item.characters
            if item.ratings is not None:
                self.ratings[row, :size] = item.ratings
        self.weights = np.array([item.weight for item in items])
        self.targets = np.array([item.target or 0.0 for item in items])
        choices = [-1 if item.choice is None else item.choice for item in items]
        self.choices = np.array(choices) if kind == "choice" else np.where(self.targets > 0, 1, 0)
        self.told: Bools = self.choices >= 0 if kind == "choice" else self.targets != 0
        self.predictions = self.scores[:, 1] - self.scores[:, 0] if kind == "difference" else self.scores[:, 0]

    @property
    def losses(self) -> Floats:
        """[N] -log softmax at the choice, its mean over all for a tie; or the squared error."""
        if self.kind != "choice":
            errors: Floats = (self.predictions - self.targets) ** 2
            return errors
        negative = -self._log_probabilities()
        chosen = negative[np.arange(len(negative)), np.maximum(self.choices, 0)]
        tied = np.where(self.present, negative, 0.0).sum(1) / self.present.sum(1)
        losses: Floats = np.where(self.told, chosen, tied)
        return losses

    def _log_probabilities(self) -> Floats:
        """[N, K] log softmax of the scores; -inf at empty places."""
        masked = np.where(self.present, self.scores, -np.inf)
        shifted = masked - masked.max(1, keepdims=True)
        logs: Floats = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return logs

    def picked(self, values: Floats) -> Floats:
        """[N] how right it is to take the completion with the highest value [N, K]: 1/m if m share it."""
        masked = np.where(self.present, values, -np.inf)
        highest = masked == masked.max(1, keepdims=True)
        share: Floats = highest[np.arange(len(highest)), np.maximum(self.choices, 0)] / highest.sum(1)
        return np.where(self.told, share, 0.0)

    def add_choices(self, rates: _Rates) -> int:
        """Accuracy of the model and of the rules; returns how many comparisons have a choice."""
        told = self.told.astype(np.float64)
        if not told.any():
            return 0
        places = np.broadcast_to(np.arange(self.scores.shape[1], dtype=np.float64), self.scores.shape)
        often = np.bincount(self.choices[self.told])
        ways = {
            "accuracy_longest": self.characters,
            "accuracy_shortest": -self.characters,
            "accuracy_chance": np.zeros_like(self.scores),
        }
        if len(np.flatnonzero(often)) > 1:  # otherwise the data is written that way, and place says nothing
            ways["accuracy_first"] = -places
            ways["accuracy_majority"] = (places == often.argmax()).astype(np.float64)
        own = self.picked(self.scores)
        rates.add("accuracy", own, told)
        for name, values in ways.items():
            right = self.picked(values)
            rates.add(name, right, told)
            rates.add(f"lead:{name}", own - right, told)
        return int(told.sum())

    def add_rated_pairs(self, rates: _Rates, gap: float) -> int:
        """Accuracy on pairs of clearly different ratings; returns how many there are."""
        better = self.ratings[:, :, None] - self.ratings[:, None, :] >= gap - _ROUNDING  # NaN: no
        count = better.sum((1, 2)).astype(np.float64)
        if not count.any():
            return 0
        for name, values in (("pair_accuracy", self.scores), ("pair_accuracy_longest", self.characters)):
            lead = values[:, :, None] - values[:, None, :]
            rates.add(name, np.where(better, (np.sign(lead) + 1) / 2, 0.0).sum((1, 2)), count)
        return int(count.sum())

    def pair_bins(self, rates: _Rates) -> _Bins:
        """The chosen one against each other, as the probability that the higher score wins: 0.5 and more."""
        chosen = self.scores[np.arange(len(self.scores)), np.maximum(self.choices, 0)]
        lead = chosen[:, None] - self.scores
        others = self.present & self.told[:, None]
        others &= np.arange(self.scores.shape[1])[None, :] != self.choices[:, None]
        confidence = 1 / (1 + np.exp(-np.abs(lead)))
        won = (np.sign(lead) + 1) / 2
        count = others.sum(1).astype(np.float64)
        rates.add("overconfidence", np.where(others, confidence - won, 0.0).sum(1), count)
        return _Bins("pair", 0.5, confidence, won, others, rates)

    def best_bins(self, rates: _Rates) -> _Bins:
        """Whether the completion with the highest score was chosen, against its probability."""
        confidence = np.exp(self._log_probabilities().max(1))[:, None]
        return _Bins("best", 0.0, confidence, self.picked(self.scores)[:, None], self.told[:, None], rates)

    def correlations(self, resamples: int, seed: int) -> dict[str, Interval]:
        """Of predictions with labels, and of lengths with labels."""
        length = self.characters[:, 1] - self.characters[:, 0] if self.kind == "difference" else self.characters[:, 0]
        return {
            "pearson": _correlation(self.predictions, self.targets, resamples, seed),
            "spearman": _correlation(MidRanks(self.predictions), MidRanks(self.targets), resamples, seed),
            "pearson_length": _correlation(length, self.targets, resamples, seed),
        }


class _Bins:
    """Predictions sorted into bins by confidence; their outcomes become rates.

    Args:
        low: least confidence there can be.
        confidence, outcomes: [N, M]. counted: [N, M] bool.
    """

    def __init__(
        self, name: str, low: float, confidence: Floats, outcomes: Floats, counted: Bools, rates: _Rates
    ) -> None:
        self.name = name
        self.edges = np.linspace(low, 1.0, BINS + 1).round(6).tolist()
        place = np.clip(((confidence - low) / (1.0 - low) * BINS).astype(np.int64), 0, BINS - 1)
        self.counts, self.predicted = [], []
        for number in range(BINS):
            here = counted & (place == number)
            count = here.sum(1).astype(np.float64)
            rates.add(f"{name}:{number}", np.where(here, outcomes, 0.0).sum(1), count)
            self.counts.append(int(count.sum()))
            self.predicted.append(float(confidence[here].mean()) if here.any() else math.nan)


def _calibration(bins: _Bins, intervals: Mapping[str, Interval]) -> Calibration:
    made = tuple(
        Bin(
            low=bins.edges[number],
            high=bins.edges[number + 1],
            count=bins.counts[number],
            predicted=bins.predicted[number],
            observed=intervals[f"{bins.name}:{number}"],
        )
        for number in range(BINS)
    )
    total = sum(one.count for one in made)
    parts = [one.count * abs(one.predicted - one.observed.mean) for one in made if one.count]
    # The mean distance of a normal variable from its mean is sqrt(2 / pi) deviations.
    noise = [math.sqrt(2 / math.pi * one.count * one.predicted * (1 - one.predicted)) for one in made if one.count]
    return Calibration(
        bins=made,
        error=math.fsum(parts) / total if total else math.nan,
        by_chance=math.fsum(noise) / total if total else math.nan,
    )


def _correlation(x: Floats | MidRanks, y: Floats | MidRanks, resamples: int, seed: int) -> Interval:
    """Of values [N], or of their ranks, which every resample makes anew; NaN where one side is constant."""

    def of(weights: Floats) -> Floats:
        left, right = (side.of(weights) if isinstance(side, MidRanks) else side[None] for side in (x, y))
        return correlation(left, right, weights)

    count = len(x.order) if isinstance(x, MidRanks) else len(x)
    value = float(of(np.ones((1, count)))[0])
    drawn = [of(weights) for weights in resampled_weights(count, 4 * count, resamples, seed)]
    return percentile_interval(value, np.concatenate(drawn), count=count) if drawn else _alone(value)


def _alone(value: float) -> Interval:
    return Interval(float(value), math.nan, math.nan)


def _ratio(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    out = np.full(above.shape, np.nan)
    quotient: Floats = np.divide(above, below, out=out, where=below != 0)
    return quotient
