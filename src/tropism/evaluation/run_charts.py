"""The charts of a run's report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tropism.evaluation.charts import Histogram, LineChart, file_stem
from tropism.evaluation.plots import Series
from tropism.evaluation.run_curves import HELD_OUT, Column, Floats, evaluation_means, term_means, training_curve
from tropism.evaluation.run_folder import RunData
from tropism.evaluation.summary import KL_LIMIT, compared

MAIN_CURVES: tuple[tuple[str, str, str, Column | None, str | None], ...] = (
    ("Reward", "reward", "reward/mean", "rewards", "eval/reward"),
    ("Sequence KL to the reference (nats)", "sequence-kl", "policy/sequence_kl", "sequence_kl", "eval/sequence_kl"),
    ("Entropy (nats per token)", "entropy", "policy/entropy", None, None),
    ("Completion length (tokens)", "length", "rollout/length_mean", "lengths", "eval/length_mean"),
    ("Throughput (tokens per second)", "throughput", "throughput/tokens_per_second", None, None),
)
"""Title, name of the file, training metric, column of the evaluations, evaluation metric that the column shows."""
MOST_TERMS = 6
"""Of more terms of the reward the curves stand with the other metrics."""
MOST_CURVES = 200
"""Of the metrics that have no curve of their own above."""
EVERY_KIND = ("update", "collect", "evaluation")


def main_charts(run: RunData) -> list[LineChart]:
    """Reward, KL, reward against KL, each term of the reward, entropy, length and throughput: what there is."""
    charts = []
    for title, name, metric, column, _ in MAIN_CURVES:
        points = evaluation_means(run, column) if column else None
        is_kl = metric == "policy/sequence_kl"
        chart = _over_training(run, title, name, metric, points, limit=KL_LIMIT if is_kl else None)
        charts += [chart] if chart else []
    frontier = _frontier(run)
    if frontier:
        charts.insert(min(2, len(charts)), frontier)
    return [*charts[:3], *_term_charts(run), *charts[3:]]


def _over_training(
    run: RunData, title: str, name: str, metric: str, points: Series | None, *, limit: float | None = None
) -> LineChart | None:
    series = [*training_curve(*run.series(metric)), *([points] if points else [])]
    if not series:
        return None
    words = "" if limit is None else f"{limit:g} nats"
    return LineChart(title=title, name=name, series=series, limit=limit, limit_label=words, zero=limit is not None)


def _terms(run: RunData) -> list[str]:
    """Terms of the reward, where there are several: one that follows the reward no longer shows where it is misled."""
    names = list(dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.terms))
    return names if 1 < len(names) <= MOST_TERMS else []


def _term_charts(run: RunData) -> list[LineChart]:
    every = [
        _over_training(run, f"Reward term {name}", f"term-{file_stem(name)}", f"reward/{name}", term_means(run, name))
        for name in _terms(run)
    ]
    return [chart for chart in every if chart]


def _frontier(run: RunData) -> LineChart | None:
    """Reward against sequence KL, one point per evaluation: what each nat bought."""
    rewards, kls = evaluation_means(run, "rewards"), evaluation_means(run, "sequence_kl")
    if rewards is None or kls is None:
        return None
    steps, at_reward, at_kl = np.intersect1d(rewards.x, kls.x, return_indices=True)
    if len(steps) < 2 or rewards.low is None or rewards.high is None:
        return None
    path = Series(
        x=kls.y[at_kl],
        y=rewards.y[at_reward],
        low=rewards.low[at_reward],
        high=rewards.high[at_reward],
        kind="eval",
        label=HELD_OUT,
        notes=[f"step {step:g}" for step in steps],
    )
    return LineChart(title="Held-out reward against KL", name="frontier", series=[path], x_label="sequence KL (nats)")


def distribution_charts(run: RunData) -> list[Histogram]:
    """Reward, its terms and lengths of the held-out completions before and after, where both are known."""
    ends = compared(run) if run.evaluations else None
    if ends is None:
        return []
    before, after = ends
    wanted: list[tuple[str, str, str, Floats, Floats]] = [
        ("Held-out reward, share of prompts", "reward", "reward", before.rewards, after.rewards),
        ("Completion length, share of prompts", "length", "tokens", before.lengths, after.lengths),
    ]
    for name in _terms(run):
        sides = [one.terms.get(name, np.empty(0)) for one in ends]
        stem = f"term-{file_stem(name)}"
        wanted.append((f"Reward term {name}, share of prompts", stem, "raw value of the term", sides[0], sides[1]))
    return [
        Histogram(title=title, name=f"distribution-{name}", before=first, after=second, x_label=x_label)
        for title, name, x_label, first, second in wanted
        if np.isfinite(first).any() and np.isfinite(second).any()
    ]


def other_charts(run: RunData, above: frozenset[str]) -> list[LineChart]:
    """Every other metric of the run but those that are shown above."""
    above |= {f"{prefix}reward/{name}" for name in _terms(run) for prefix in ("", "eval/")}
    shown = above | {curve[2] for curve in MAIN_CURVES} | {curve[4] for curve in MAIN_CURVES}
    names = [name for name in run.names(EVERY_KIND) if name not in shown and not name.startswith("best/")]
    return [_small_chart(run, name, EVERY_KIND) for name in names[:MOST_CURVES]]


def _small_chart(run: RunData, name: str, kinds: Sequence[str]) -> LineChart:
    """One metric without a legend: there is one line."""
    return LineChart(title=name, name=name, series=training_curve(*run.series(name, kinds), label=""))
