"""The part of a run's report that is about a reward model: how well it agrees with people, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tropism.errors import DataError
from tropism.evaluation.comparison_files import calibration_curves
from tropism.evaluation.comparison_numbers import Calibration, ComparisonNumbers, measure
from tropism.evaluation.comparison_table import ScoredComparison
from tropism.evaluation.comparison_verdict import best_rule, counts_text, number_rows, verdict
from tropism.evaluation.number_texts import interval_text
from tropism.evaluation.plots import Series, line_chart, training_curve
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
class Section:
    """What the template shows, and the metrics that it shows already."""

    view: dict[str, Any]
    metrics: frozenset[str]


def reward_model_section(run: RunData) -> Section | None:
    """The section of a run that trained a reward model, or None of another run.

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
    return Section(
        view={
            "headline": _headline(first, after),
            "steps": f"step {run.comparisons[0].step} to {shown.step}" if after else f"step {shown.step}",
            "counts": counts_text(result),
            "verdict": verdict(result),
            "skipped": run.skipped,
            "rule": _rule_card(result),
            "calibration_error": _plain_number(result, "calibration_error"),
            "curves": [*_curves(run, numbers), *_calibration_charts(result)],
            "rows": _rows(first, after),
            "examples": _examples(shown),
            "facts": _facts(run),
        },
        metrics=frozenset({f"loss/{shown.kind}", "choice/accuracy", "eval/loss", "eval/accuracy"}),
    )


def _shown_step(run: RunData) -> ComparisonStep:
    """The evaluation of the best step where the run names one, else the last."""
    best = [one for one in run.comparisons if one.step == run.best_step]
    return best[0] if best else run.comparisons[-1]


# Cards and numbers ----------------------------------------------------------------------------------------------------


def _headline(first: ComparisonNumbers, after: ComparisonNumbers | None) -> dict[str, str]:
    """The accuracy, or for ratings the correlation, before and after."""
    name, title = ("pearson", "Correlation with ratings") if first.kind == "rating" else ("accuracy", "Accuracy")
    sides = [_plain_number(one, name) if one else "" for one in (first, after)]
    now = (after or first).numbers.get(name)
    return {"title": title, "before": sides[0], "after": sides[1] or "not yet", "interval": interval_text(now)}


def _rule_card(result: ComparisonNumbers) -> dict[str, str] | None:
    rule = best_rule(result)
    if rule is None:
        return None
    lead = result.leads[rule.name]
    level = "low" if lead.known and lead.low > 0 else "extreme" if lead.known and lead.high < 0 else "high"
    return {"words": rule.words, "accuracy": f"{rule.accuracy.mean:.3f}", "level": level, "lead": interval_text(lead)}


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


def _curves(run: RunData, numbers: Sequence[tuple[int, ComparisonNumbers]]) -> list[dict[str, Any]]:
    kind = numbers[0][1].kind
    loss = "Loss" if kind == "choice" else "Mean squared error"
    main = ("pearson", "Correlation with ratings") if kind == "rating" else ("accuracy", "Accuracy")
    panels = [
        (loss, training_curve(*run.series(f"loss/{kind}")), _held_out(numbers, "loss"), None),
        (main[1], training_curve(*run.series("choice/accuracy")), _held_out(numbers, main[0]), _rule_line(numbers)),
    ]
    return [
        _chart(title, [*lines, *([points] if points else [])], rule)
        for title, lines, points, rule in panels
        if lines or points
    ]


def _chart(title: str, series: Sequence[Series], rule: tuple[str, float] | None) -> dict[str, Any]:
    lines = list(series)
    if rule is not None:
        ends = np.concatenate([one.x for one in series])
        x = np.array([ends.min(), ends.max()])
        lines.insert(0, Series(x=x, y=np.full(2, rule[1]), kind="rule"))
    kinds = {one.kind for one in series}
    return {
        "title": title,
        "svg": line_chart(lines, title=title),
        "train": "train" in kinds,
        "eval": "eval" in kinds,
        "rule": None if rule is None else rule[0],
    }


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
        notes=[f"step {step}: {value.mean:.4g}" for step, value in known],
    )


def _rule_line(numbers: Sequence[tuple[int, ComparisonNumbers]]) -> tuple[str, float] | None:
    """Legend and height of the best rule; it is the same at every step."""
    rule = best_rule(numbers[0][1])
    return None if rule is None else (f"best rule: {rule.words}", rule.accuracy.mean)


def _calibration_charts(result: ComparisonNumbers) -> list[dict[str, Any]]:
    return [_calibration_chart(name, curve) for name, curve in calibration_curves(result).items()]


def _calibration_chart(name: str, curve: Calibration) -> dict[str, Any]:
    known = [one for one in curve.bins if one.count]
    diagonal = np.array([curve.bins[0].low, 1.0])
    points = Series(
        x=np.array([one.predicted for one in known]),
        y=np.array([one.observed.mean for one in known]),
        low=np.array([one.observed.low for one in known]),
        high=np.array([one.observed.high for one in known]),
        kind="eval",
        notes=[f"{one.count} predictions of {one.predicted:.2f}: {one.observed.mean:.2f}" for one in known],
    )
    title = f"Calibration: {name}"
    svg = line_chart(
        [Series(x=diagonal, y=diagonal, kind="rule"), points], title=title, x_label="predicted probability"
    )
    return {"title": title, "svg": svg, "train": False, "eval": True, "rule": "as sure as it should be"}


# Examples -------------------------------------------------------------------------------------------------------------


def _examples(shown: ComparisonStep) -> list[dict[str, Any]]:
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


def _example(label: str, item: ScoredComparison) -> dict[str, Any]:
    order = sorted(range(len(item.scores)), key=lambda place: -item.scores[place])[:MOST_COMPLETIONS]
    marks = []
    for place in order:
        words = [f"score {item.scores[place]:.2f}"]
        if item.ratings is not None:
            words.append(f"rating {item.ratings[place]:.2f}")
        if item.target is not None and len(item.scores) == 1:
            words.append(f"label {item.target:.2f}")
        marks.append({"text": _cut(item.completions[place]), "words": ", ".join(words), "chosen": place == item.choice})
    said = f"; the second is better by {item.target:.2f}" if item.target is not None and len(item.scores) == 2 else ""
    return {"label": label + said, "prompt": _cut(item.prompt), "completions": marks}


def _cut(text: str) -> str:
    """The text for reading: without blanks around it, and cut where it is very long."""
    shown = text.strip()
    if len(shown) <= MOST_CHARACTERS:
        return shown
    return f"{shown[:MOST_CHARACTERS]} ... (cut here: {len(shown)} characters)"
