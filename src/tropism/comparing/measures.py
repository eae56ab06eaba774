"""What each method of a comparison bought, what it cost, and how sure the differences are."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tropism.comparing.difference import (
    UNTRAINED,
    Difference,
    SeedNoise,
    differences,
    mean_interval,
    own_noise,
    seed_noise,
)
from tropism.comparing.results import BASE, Cell, Comparison, is_trained
from tropism.comparing.toxicity import toxicity_of
from tropism.evaluation.statistics import Interval
from tropism.evaluation.text_quality import distinct_n

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """One method, over its finished seeds."""

    name: str
    seeds: tuple[int, ...]
    """Those that are finished."""
    reward: Interval
    """Held-out reward, with its 95 % interval over prompts and seeds."""
    to_base: Difference | None
    """Reward minus that of the base model; None for the base, and where that is missing."""
    to_other: Difference | None
    """Reward minus that of the method that all are tested against; None for that method."""
    kl: Interval
    """Sequence KL to the base in nats, NaN where not measured."""
    kl_estimator: str
    """How ``kl`` was measured: ``k1``, or the bound of best-of-n; of seeds that differ all."""
    length: float
    """Mean completion tokens."""
    distinct_1: float
    """Share of distinct words among all words that one seed wrote, mean over seeds."""
    distinct_2: float
    """The same of word pairs."""
    perplexity: float
    """Of the completions under the base model, at temperature 1."""
    toxicity: Interval | None
    """Mean probability of being toxic, by the scorer that ``Results`` names; None without a scorer."""
    eos: float
    """Share of completions that the model ended itself."""
    seconds: float
    """Of training, mean over seeds."""
    completions: float
    """Sampled and scored in training, mean over seeds."""
    tokens: float
    """Sampled in training, mean over seeds."""
    per_answer: float
    """Completions that one answer costs later: n for best-of-n, else 1."""
    scored: int
    """Of all its held-out completions."""
    answered: int
    """All its held-out completions."""
    terms: Mapping[str, Interval]
    """Raw value of each term of the reward."""
    metrics: Mapping[str, Interval]
    """Metrics of the recipe."""
    settings: Mapping[int, Mapping[str, Any]]
    """What was chosen for it, by seed: target and guidance, beta, n."""

    @property
    def bounded(self) -> bool:
        """Whether ``kl`` is an upper bound and no estimate."""
        return self.kl_estimator.startswith("bound")


@dataclass(frozen=True, kw_only=True)
class Results:
    """All methods and all pairs of them."""

    rows: Sequence[Measures]
    """Those with a finished seed, in the order of the plan."""
    pairs: Sequence[Difference]
    """Every pair of methods but the base; one family for Holm's correction."""
    against: str
    """The method that all are tested against; another family."""
    toxicity_scorer: str
    """What judged toxicity; empty where nothing did."""
    toxicity_reason: str
    """Why nothing judged toxicity."""

    def row(self, name: str) -> Measures:
        """Of a method; KeyError where it has no finished seed."""
        return {row.name: row for row in self.rows}[name]


def measure(comparison: Comparison) -> Results:
    """Everything that the finished cells of a comparison say."""
    names = list(comparison.methods)
    values = {name: comparison.values(name) for name in names}
    noise = seed_noise(values, untrained=[name for name in names if not is_trained(name)])
    against = comparison.against
    to_base = _against(BASE, values, noise)
    to_other = to_base if against == BASE else _against(against, values, noise)
    toxicity = toxicity_of(comparison)
    rows = [
        _measures(
            name,
            comparison.methods[name],
            reward=mean_interval(values[name], noise[name]),
            differences_to=(to_base.get(name), to_other.get(name)),
            toxicity=toxicity.values.get(name),
        )
        for name in names
    ]
    pairs = [(one, other) for other, one in itertools.combinations([name for name in names if name != BASE], 2)]
    return Results(
        rows=rows,
        pairs=differences(values, pairs, noise),
        against=against,
        toxicity_scorer=toxicity.scorer,
        toxicity_reason=toxicity.reason,
    )


def _against(other: str, values: Mapping[str, Floats], noise: Mapping[str, SeedNoise]) -> dict[str, Difference]:
    """Each method against one; the base, where it is not that one, is no method to test."""
    if other not in values:
        return {}
    pairs = [(name, other) for name in values if name not in (other, BASE)]
    return {one.first: one for one in differences(values, pairs, noise)}


def interval_of(values: Floats, *, trained: bool) -> Interval:
    """Mean of [S, P] values and its interval, with the method's own variance between seeds."""
    return mean_interval(values, own_noise(values) if trained else UNTRAINED)


def _measures(
    name: str,
    cells: Sequence[Cell],
    *,
    reward: Interval,
    differences_to: tuple[Difference | None, Difference | None],
    toxicity: Floats | None,
) -> Measures:
    samples = [cell.samples for cell in cells if cell.samples is not None]
    trained = is_trained(name)

    def column(values: Sequence[Floats]) -> Interval:
        return interval_of(np.stack(values), trained=trained)

    def named(kind: str) -> dict[str, Interval]:
        shared = [key for key in getattr(samples[0], kind) if all(key in getattr(one, kind) for one in samples)]
        return {key: column([one.means(getattr(one, kind)[key]) for one in samples]) for key in shared}

    lengths = np.concatenate([one.lengths for one in samples])
    reasons = Counter(reason for one in samples for reason in one.finish_reasons)
    return Measures(
        name=name,
        seeds=tuple(cell.seed for cell in cells),
        reward=reward,
        to_base=differences_to[0],
        to_other=differences_to[1],
        kl=_kl(cells, column([one.by_prompt("sequence_kl") for one in samples])),
        kl_estimator=", ".join(dict.fromkeys(str(cell.facts.get("kl_estimator", "k1")) for cell in cells)),
        length=float(np.nanmean(lengths)) if np.isfinite(lengths).any() else math.nan,
        distinct_1=float(np.mean([distinct_n(one.completions, 1) for one in samples])),
        distinct_2=float(np.mean([distinct_n(one.completions, 2) for one in samples])),
        perplexity=_perplexity(np.concatenate([one.base_logprob for one in samples]), lengths),
        toxicity=None if toxicity is None else interval_of(toxicity, trained=trained),
        eos=reasons["eos"] / reasons.total(),
        seconds=_mean(cells, "seconds"),
        completions=_mean(cells, "completions"),
        tokens=_mean(cells, "tokens"),
        per_answer=_mean(cells, "completions_per_answer"),
        scored=sum(int(np.isfinite(one.rewards).sum()) for one in samples),
        answered=sum(len(one) for one in samples),
        terms=named("terms"),
        metrics=named("metrics"),
        settings={cell.seed: found for cell in cells if (found := cell.facts.get("settings"))},
    )


def _kl(cells: Sequence[Cell], measured: Interval) -> Interval:
    """The bound where the cells give one, else what was measured."""
    bounds = [bound for cell in cells if math.isfinite(bound := cell.number("kl_bound"))]
    return Interval(float(np.mean(bounds)), math.nan, math.nan) if bounds else measured


def _perplexity(logprobs: Floats, lengths: Floats) -> float:
    """exp of the mean negative log-prob per token, over the completions with both."""
    known = np.isfinite(logprobs) & np.isfinite(lengths)
    tokens = float(lengths[known].sum())
    nats = -float(logprobs[known].sum()) / tokens if tokens > 0 else math.nan
    return math.exp(nats) if nats < 700 else math.nan if math.isnan(nats) else math.inf


def _mean(cells: Sequence[Cell], name: str) -> float:
    values = [cell.number(name) for cell in cells]
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan
