"""The part of a run's report that is about a reward model: how well it agrees with people, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup

from tropism.errors import DataError
from tropism.evaluation.charts import LineChart, blocks, pictures
from tropism.evaluation.comparison_files import calibration_curves
from tropism.evaluation.comparison_numbers import Calibration, ComparisonNumbers, measure
from tropism.evaluation.comparison_table import ScoredComparison
from tropism.evaluation.comparison_verdict import best_rule, counts_text, number_rows, verdict
from tropism.evaluation.number_texts import interval_text
from tropism.evaluation.page_blocks import (
    PageCard,
    PageSample,
    cards_block,
    list_block,
    samples_block,
    table_block,
    text_block,
)
from tropism.evaluation.pages import PageSection
from tropism.evaluation.plots import Series
from tropism.evaluation.run_curves import HELD_OUT, training_curve
from tropism.evaluation.run_folder import ComparisonStep, RunData, is_finite
from tropism.evaluation.statistics import Interval

SHOWN = 3
"""Comparisons of each sort that are shown."""
MOST_CHARACTERS = 2000
"""Of one prompt or completion; what is longer is cut, and says so."""
MOST_COMPLETIONS = 16
"""Of one comparison; the best scores are shown."""
EVALUATION = ("evaluation",)


@dataclass(frozen=True, kw_only=True)
class RewardModelPart:
    """What a report says about a reward model."""

    lead: Markup
    """The cards on top."""
    sections: list[PageSection]
    metrics: frozenset[str]
    """The metrics that are shown."""


def reward_model_part(run: RunData) -> RewardModelPart | None:
    """The part of the report of a run that trained a reward model, or None of another run.

    Raises:
        DataError: an evaluation has no rows.
    """
    if not run.comparisons:
        return None
    for one in run.comparisons:
        if not one.items:
            raise DataError(f"the evaluation at step {one.step} has no rows; evaluate on at least one comparison")
    shown = _shown_step(run)
    numbers = [(one.step, measure(one.items, one.kind)) for one in run.comparisons]
    first, result = numbers[0][1], dict(numbers)[shown.step]
    after = result if shown is not run.comparisons[0] else None
    steps = f"step {run.comparisons[0].step} to {shown.step}" if after else f"step {shown.step}"
    charts = [*_curves(run, numbers), *_calibration_charts(result)]
    facts = _facts(run)
    sections = [
        PageSection(title="What the numbers say", body=_verdict(run, result)),
        PageSection(title="Learning and calibration", body=blocks(charts), pictures=pictures(charts)),
        PageSection(title="Before and after", body=_table(first, after)),
        PageSection(title="Held-out comparisons", body=_samples(shown)),
    ]
    if facts:
        sections.append(PageSection(title="The reward model", body=table_block(("setting", "value"), facts)))
    return RewardModelPart(
        lead=cards_block(_cards(first, after, f"{counts_text(result)}, {steps}")),
        sections=sections,
        metrics=frozenset({f"loss/{shown.kind}", "choice/accuracy", "eval/loss", "eval/accuracy"}),
    )


def _shown_step(run: RunData) -> ComparisonStep:
    """The evaluation of the best step where the run names one, else the last."""
    best = [one for one in run.comparisons if one.step == run.best_step]
    return best[0] if best else run.comparisons[-1]


# Cards and numbers ----------------------------------------------------------------------------------------------------


def _cards(first: ComparisonNumbers, after: ComparisonNumbers | None, counts: str) -> list[PageCard]:
    result = after or first
    cards = [_headline(first, after, counts), *_rule_card(result)]
    error = _plain_number(result, "calibration_error")
    if error:
        note = "mean distance between how sure it is that the chosen one beats another and how often that came true"
        cards.append(PageCard(title="Calibration error", value=error, notes=[note]))
    return cards


def _headline(first: ComparisonNumbers, after: ComparisonNumbers | None, counts: str) -> PageCard:
    """The accuracy, or for ratings the correlation, before and after."""
    name, title = ("pearson", "Correlation with ratings") if first.kind == "rating" else ("accuracy", "Accuracy")
    interval = interval_text((after or first).numbers.get(name))
    return PageCard(
        title=f"{title} on held-out data",
        before=_plain_number(first, name) or "unknown",
        value=(_plain_number(after, name) or "unknown") if after else "not yet",
        lines=[Markup('{} <span class="quiet">(95 %)</span>').format(interval)],
        notes=[counts],
    )


def _rule_card(result: ComparisonNumbers) -> list[PageCard]:
    rule = best_rule(result)
    if rule is None:
        return []
    lead = result.leads[rule.name]
    known: Literal["low", "extreme", "high"]
    known = "low" if lead.known and lead.low > 0 else "extreme" if lead.known and lead.high < 0 else "high"
    return [
        PageCard(
            title="Best rule that reads nothing",
            value=f"{rule.accuracy.mean:.3f}",
            lines=[rule.words],
            notes=[f"the model's lead: {interval_text(lead)}"],
            level=known,
        )
    ]


def _verdict(run: RunData, result: ComparisonNumbers) -> Markup:
    paragraphs = Markup("").join(text_block(sentence) for sentence in verdict(result))
    return paragraphs + list_block(run.skipped, kind="cautions")


def _table(first: ComparisonNumbers, after: ComparisonNumbers | None) -> Markup:
    note = "Brackets are 95 % bootstrap intervals over the held-out comparisons."
    return table_block(("quantity", "before", "after"), _rows(first, after), note=note)


def _plain_number(result: ComparisonNumbers, name: str) -> str:
    return f"{result.numbers[name].mean:.3f}" if name in result.numbers else ""


def _rows(first: ComparisonNumbers, after: ComparisonNumbers | None) -> list[tuple[str, str, str]]:
    """(what, before, after); rules are the same on both sides."""
    late = dict(number_rows(after)) if after else {}
    return [(label, interval_text(value), interval_text(late.get(label))) for label, value in number_rows(first)]


def _facts(run: RunData) -> list[tuple[str, str]]:
    """What ``model/reward_model.json`` says; empty before it is exported."""
    facts = run.reward_model
    if not facts:
        return []
    rows = [("reads", str(facts.get("text", "")))]
    for name in ("gain", "bias", "offset"):
        if is_finite(facts.get(name)):
            rows.append((name, f"{float(facts[name]):.6g}"))
    done = facts.get("normalised")
    if not isinstance(done, dict):
        return [*rows, ("normalised", "no: its scores have no known scale")]
    for label, name in (("mean of the scores, normalised", "mean"), ("their standard deviation", "std")):
        if is_finite(done.get(name)):
            rows.append((label, f"{float(done[name]):.4g}"))
    return [*rows, ("measured on", f"{done.get('samples')} completions of {done.get('policy')!s:.200}")]


# Curves ---------------------------------------------------------------------------------------------------------------


def _curves(run: RunData, numbers: Sequence[tuple[int, ComparisonNumbers]]) -> list[LineChart]:
    kind = numbers[0][1].kind
    loss = "Loss" if kind == "choice" else "Mean squared error"
    main = ("pearson", "Correlation with ratings") if kind == "rating" else ("accuracy", "Accuracy")
    panels = [
        (loss, "loss", training_curve(*run.series(f"loss/{kind}")), _held_out(numbers, "loss"), None),
        (main[1], main[0], training_curve(*run.series("choice/accuracy")), _held_out(numbers, main[0]), numbers[0][1]),
    ]
    charts = []
    for title, name, lines, points, ruled in panels:
        series = [*lines, *([points] if points else [])]
        rule = best_rule(ruled) if ruled else None
        if series and rule is not None:  # it is the same at every step
            ends = np.concatenate([one.x for one in series])
            x, height = np.array([ends.min(), ends.max()]), np.full(2, rule.accuracy.mean)
            series.insert(0, Series(x=x, y=height, kind="rule", label=f"best rule: {rule.words}"))
        if series:
            charts.append(LineChart(title=title, name=name, series=series))
    return charts


def _held_out(numbers: Sequence[tuple[int, ComparisonNumbers]], name: str) -> Series | None:
    """One number of every evaluation, with its interval."""
    known: list[tuple[int, Interval]] = [(step, one.numbers[name]) for step, one in numbers if name in one.numbers]
    if not known:
        return None
    return Series(
        x=np.array([float(step) for step, _ in known]),
        y=np.array([value.mean for _, value in known]),
        low=np.array([value.low for _, value in known]),
        high=np.array([value.high for _, value in known]),
        kind="eval",
        label=HELD_OUT,
        notes=[f"step {step}: {value.mean:.4g}" for step, value in known],
    )


def _calibration_charts(result: ComparisonNumbers) -> list[LineChart]:
    return [_calibration_chart(name, curve) for name, curve in calibration_curves(result).items()]


def _calibration_chart(name: str, curve: Calibration) -> LineChart:
    known = [one for one in curve.bins if one.count]
    diagonal = np.array([curve.bins[0].low, 1.0])
    points = Series(
        x=np.array([one.predicted for one in known]),
        y=np.array([one.observed.mean for one in known]),
        low=np.array([one.observed.low for one in known]),
        high=np.array([one.observed.high for one in known]),
        kind="eval",
        label=HELD_OUT,
        notes=[f"{one.count} predictions of {one.predicted:.2f}: {one.observed.mean:.2f}" for one in known],
    )
    line = Series(x=diagonal, y=diagonal, kind="rule", label="as sure as it should be")
    title = f"Calibration: {name}"
    return LineChart(title=title, name=f"calibration-{name}", series=[line, points], x_label="predicted probability")


# Examples -------------------------------------------------------------------------------------------------------------


def _samples(shown: ComparisonStep) -> Markup:
    return samples_block(_examples(shown), identifier="comparisons", searchable=False)


def _examples(shown: ComparisonStep) -> list[PageSample]:
    """The surest right and wrong ones; of numbers the best and the worst fit."""
    if shown.kind == "choice":
        told = sorted(
            (item for item in shown.items if item.choice is not None), key=lambda item: -max(_probabilities(item))
        )
        right = [item for item in told if item.predicted == item.choice]
        wrong = [item for item in told if item.predicted != item.choice]
        groups = [("Right, and surest of it", right[:SHOWN]), ("Wrong, and surest of it", wrong[:SHOWN])]
    else:
        fit = sorted(shown.items, key=_error)
        half = min(SHOWN, (len(fit) + 1) // 2)
        rest = fit[half:]
        groups = [("Nearest to the label", fit[:half]), ("Farthest from the label", rest[::-1][:SHOWN])]
    return [_example(label, item) for label, items in groups for item in items]


def _error(item: ScoredComparison) -> float:
    predicted = item.scores[1] - item.scores[0] if len(item.scores) == 2 else item.scores[0]
    return abs(predicted - (item.target or 0.0))


def _probabilities(item: ScoredComparison) -> list[float]:
    top = max(item.scores)
    shares = [math.exp(score - top) for score in item.scores]
    return [share / math.fsum(shares) for share in shares]


def _example(label: str, item: ScoredComparison) -> PageSample:
    order = sorted(range(len(item.scores)), key=lambda place: -item.scores[place])[:MOST_COMPLETIONS]
    sides = []
    for place in order:
        words = [f"score {item.scores[place]:.2f}"]
        if item.ratings is not None:
            words.append(f"rating {item.ratings[place]:.2f}")
        if item.target is not None and len(item.scores) == 1:
            words.append(f"label {item.target:.2f}")
        chosen = Markup("<b>chosen</b>") if place == item.choice else ""
        sides.append((", ".join(words), _cut(item.completions[place]), chosen))
    said = f"; the second is better by {item.target:.2f}" if item.target is not None and len(item.scores) == 2 else ""
    marked = [number for number, place in enumerate(order) if place == item.choice]
    return PageSample(prompt=_cut(item.prompt), sides=sides, label=label + said, marked=marked)


def _cut(text: str) -> str:
    """The text for reading: without blanks around it, and cut where it is very long."""
    shown = text.strip()
    if len(shown) <= MOST_CHARACTERS:
        return shown
    return f"{shown[:MOST_CHARACTERS]} ... (cut here: {len(shown)} characters)"
