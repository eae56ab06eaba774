"""What the numbers of a reward model say, in sentences: whether it beats rules that read nothing, how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tropism.evaluation.comparison_numbers import ComparisonNumbers
from tropism.evaluation.statistics import Interval

RULES = {
    "accuracy_longest": "always the longest",
    "accuracy_shortest": "always the shortest",
    "accuracy_first": "always the first",
    "accuracy_majority": "always the place chosen most often",
    "accuracy_chance": "any at random",
}
"""Rules that read no text, by the name of their accuracy."""

LABELS = {
    "loss": "loss",
    "accuracy": "accuracy",
    **{name: f"  {rule}" for name, rule in RULES.items()},
    "pair_accuracy": "pairs of different ratings",
    "pair_accuracy_longest": "  always the longer",
    "calibration_error": "calibration error",
    "overconfidence": "overconfidence",
    "pearson": "Pearson, scores and labels",
    "spearman": "Spearman, scores and labels",
    "pearson_length": "  Pearson, lengths and labels",
    "label_mean": "mean label",
    "label_variance": "variance of the labels",
}
"""Every number that is shown, in this order."""

FEW = 50
"""Fewer comparisons than this say little."""
CLOSE, ROUGH = 0.05, 0.1
"""Calibration errors, less what chance makes, up to which probabilities are close, or rough."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that reads nothing, and how often it is right."""

    name: str
    """As in the metrics, such as ``accuracy_longest``."""
    words: str
    accuracy: Interval


def best_rule(result: ComparisonNumbers) -> Rule | None:
    """The rule that is right most often, or None where nothing was chosen."""
    known = [name for name in RULES if name in result.numbers]
    if not known:
        return None
    best = max(known, key=lambda name: result.numbers[name].mean)
    return Rule(name=best, words=RULES[best], accuracy=result.numbers[best])


def number_rows(result: ComparisonNumbers) -> list[tuple[str, Interval]]:
    """Label and value of every number but the counts."""
    labels = dict(LABELS)
    if result.kind != "choice":
        labels["loss"] = "mean squared error"
    return [(label, result.numbers[name]) for name, label in labels.items() if name in result.numbers]


def counts_text(result: ComparisonNumbers) -> str:
    """How much was measured, in one line."""
    what = {"choice": "comparisons", "rating": "ratings", "difference": "differences"}[result.kind]
    parts = [f"{result.items} held-out {what}"]
    if result.kind != "rating" and result.told < result.items:
        parts.append(f"{result.items - result.told} of them ties")
    if result.pairs:
        parts.append(f"{result.pairs} pairs whose ratings differ by {result.rating_gap:g} or more")
    return ", ".join(parts)


def verdict(result: ComparisonNumbers) -> list[str]:
    """What the numbers say, the most important first; intervals are needed for it."""
    sentences = [*_against_rules(result), *_of_pairs(result), *_of_correlation(result), *_of_calibration(result)]
    if result.items < FEW:
        sentences.append(f"There are only {result.items} of them, so the intervals are rough.")
    return sentences


def _against_rules(result: ComparisonNumbers) -> list[str]:
    rule = best_rule(result)
    if rule is None:
        return [] if result.kind == "rating" else ["Every held-out label is a tie, so there is no accuracy."]
    own, lead = result.numbers["accuracy"], result.leads[rule.name]
    shares = f"it is right in {own.mean:.1%}, the best of them ({rule.words}) in {rule.accuracy.mean:.1%}"
    if not lead.known:
        return [f"Whether it is better than rules that read nothing cannot be said: {shares}."]
    if lead.low > 0:
        return [f"It is better than every rule that reads nothing: {shares}."]
    if lead.high < 0:
        return [f"It is worse than a rule that reads nothing: {shares}. Do not use it as a reward."]
    return [f"It is not shown to be better than rules that read nothing: {shares}, which may be chance."]


def _of_pairs(result: ComparisonNumbers) -> list[str]:
    if "pair_accuracy" not in result.numbers:
        return []
    own, longer = result.numbers["pair_accuracy"].mean, result.numbers["pair_accuracy_longest"].mean
    gap = f"whose ratings differ by {result.rating_gap:g} or more"
    return [f"Of pairs {gap} it orders {own:.1%} rightly; by length alone it would be {longer:.1%}."]


def _of_correlation(result: ComparisonNumbers) -> list[str]:
    variance = result.numbers.get("label_variance")
    if variance is None or not variance.mean:
        return []
    explained = 1 - result.numbers["loss"].mean / variance.mean
    if explained <= 0:
        sentences = ["Its squared error is no smaller than that of always giving the mean label."]
    else:
        sentences = [f"It explains {explained:.0%} of the variance of the labels."]
    own, length = (abs(result.numbers[n].mean) if n in result.numbers else 0.0 for n in ("pearson", "pearson_length"))
    if own <= length:
        sentences.append("Its scores follow the labels no better than the mere lengths of the texts do.")
    return sentences


def _of_calibration(result: ComparisonNumbers) -> list[str]:
    if "calibration_error" not in result.numbers:
        return []
    error, gap = result.numbers["calibration_error"].mean, result.numbers["overconfidence"]
    chance = result.pair_curve.by_chance if result.pair_curve else math.nan
    if not gap.known or gap.includes(0.0):
        sure = "It is about as sure as it should be"
    else:
        word, way = ("too sure of itself", "above") if gap.mean > 0 else ("less sure than it could be", "below")
        degree = "a little " if abs(gap.mean) <= CLOSE else ""
        sure = f"It is {degree}{word}: on average its probabilities are {abs(gap.mean):.2f} {way} what came true"
    if chance > ROUGH:
        use = "there are too few predictions to say more"
    elif error - chance <= CLOSE:
        use = "its probabilities are close enough to be used"
    elif error - chance <= ROUGH:
        use = "its probabilities are rough"
    else:
        use = "its scores say which is better, but are no probabilities"
    return [f"{sure}. Calibration error {error:.3f}, of which chance makes about {chance:.3f}: {use}."]
