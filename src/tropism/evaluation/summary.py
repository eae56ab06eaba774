"""What a run bought: before and after on the held-out prompts, and plain cautions against believing it too soon."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tropism.errors import DataError
from tropism.evaluation.number_texts import change_text, interval_text, number_text
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.evaluation.statistics import Interval, bootstrap_interval, paired_difference
from tropism.evaluation.text_quality import WordShift, distinct_n, distinct_texts, repetition, risen_words

Floats = NDArray[np.float64]

KL_LIMIT = 10.0
"""Nats per completion above which the samples must be read before the reward is believed."""
KL_FAR = 25.0
"""Nats per completion above which ordinary language has usually been left."""
FEW_PROMPTS = 20
"""Fewer held-out prompts than this give a rough interval."""
SALAD_SHARE = 0.35
"""Share of all words that the ten most risen words may make up before the text is called repetitive praise."""
LONGEST_WORD = 40
"""Characters of a word that are shown."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One evaluation in numbers. An interval is None where nothing was measured."""

    step: int
    prompts: int
    scored: int
    """Prompts whose completion got a reward."""
    reward: Interval | None
    sequence_kl: Interval | None
    """Nats per completion (mean over prompts of the summed log-ratio to the reference)."""
    kl_per_token: float
    """Nats; NaN where not measured."""
    length: float
    """Mean completion tokens."""
    distinct_2: float
    """Share of distinct word pairs over all completions."""
    distinct_texts: float
    """Share of distinct completions."""
    repetition: float
    """Mean share of word triples that occurred before in the same completion."""
    finish_reasons: Mapping[str, float]
    """Share of completions by why they ended."""
    terms: Mapping[str, Interval]
    """Raw value of each reward term that scored anything."""
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    """Each metric of the user that has a value."""
    settings: Mapping[str, Snapshot] = field(default_factory=dict)
    """The same under changed sampling, by its label."""


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """The completions of one held-out prompt before and after training."""

    prompt: str
    before: str
    after: str
    reward_before: float
    """NaN where unscored."""
    reward_after: float
    """NaN where unscored."""
    kl_after: float
    """Nats over the whole completion."""
    others: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Completion and reward after training under changed sampling, by its label."""

    @property
    def change(self) -> float:
        """Reward after minus before, NaN where one is unscored."""
        return self.reward_after - self.reward_before


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Before and after training, on the same held-out prompts."""

    before: Snapshot
    after: Snapshot | None
    """The best evaluation where the run names one, else the last; None if there is only one evaluation so far."""
    change: Interval | None
    """Paired difference of the reward, over the prompts scored on both sides."""
    term_changes: Mapping[str, Interval]
    """The same for each reward term."""
    metric_changes: Mapping[str, Interval] = field(default_factory=dict)
    """The same for each metric of the user."""
    risen: tuple[WordShift, ...]
    """The words whose share grew most."""
    cautions: tuple[str, ...]
    """What to keep in mind before believing the numbers, each a full sentence; the gravest first."""

    @property
    def kl_level(self) -> Literal["unknown", "low", "high", "extreme"]:
        """How far the policy has moved: up to 10 nats, up to 25, beyond."""
        kl = self.after.sequence_kl if self.after else None
        if kl is None:
            return "unknown"
        return "low" if kl.mean <= KL_LIMIT else "high" if kl.mean <= KL_FAR else "extreme"


def summarise(run: RunData) -> Summary:
    """Compare the first evaluation of a run with its best (where the metrics record ``best/step``) or last one.

    Raises:
        DataError: the run has no evaluation yet, or the two evaluations hold different prompts.
    """
    first, last, notes = _ends(run)
    before = _snapshot(first)
    if last is None:
        notes.append("There is one evaluation so far, so nothing can be compared yet.")
        return Summary(before=before, after=None, change=None, term_changes={}, risen=(), cautions=tuple(notes))
    after = _snapshot(last)
    change = _paired(first.rewards, last.rewards)
    shared_terms = [name for name in after.terms if name in before.terms]
    changes = {name: _paired(first.terms[name], last.terms[name]) for name in shared_terms}
    measured = [name for name in after.metrics if name in before.metrics]
    metric_changes = {name: _paired(first.metrics[name], last.metrics[name]) for name in measured}
    shifts = risen_words(first.completions, last.completions, count=10)
    risen = tuple(replace(shift, word=shift.word[:LONGEST_WORD]) for shift in shifts)
    cautions = [
        *_kl_cautions(after.sequence_kl),
        *_text_cautions(before, after, risen),
        *_reward_cautions(after, change),
        *notes,
    ]
    return Summary(
        before=before,
        after=after,
        change=change,
        term_changes={name: interval for name, interval in changes.items() if interval is not None},
        metric_changes={name: interval for name, interval in metric_changes.items() if interval is not None},
        risen=risen,
        cautions=tuple(cautions),
    )


def compared(run: RunData) -> tuple[Evaluation, Evaluation] | None:
    """The two evaluations that ``summarise`` compares, or None while there are fewer than two.

    Raises:
        DataError: as in ``summarise``.
    """
    first, last, _ = _ends(run)
    return None if last is None else (first, last)


def sample_pairs(run: RunData, *, count: int = 3) -> list[SamplePair]:
    """Completions of the same prompts before and after, from the largest gain in reward to the largest loss.

    Of more prompts than ``count``, evenly spaced ranks are taken: with 3 the largest gain, the median and the smallest.
    Unscored prompts come last.

    Raises:
        DataError: as in ``summarise``.
        ValueError: ``count`` < 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    ends = compared(run)
    if ends is None:
        return []
    first, last = ends
    gains = last.rewards - first.rewards
    order = np.argsort(-gains, kind="stable")  # NaN sorts last
    scored = order[np.isfinite(gains[order])]
    order = scored if len(scored) >= count else order
    ranks = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [
        SamplePair(
            prompt=first.prompts[i],
            before=first.completions[i],
            after=last.completions[i],
            reward_before=float(first.rewards[i]),
            reward_after=float(last.rewards[i]),
            kl_after=float(last.sequence_kl[i]),
            others={label: (other.completions[i], float(other.rewards[i])) for label, other in last.settings.items()},
        )
        for i in order[ranks].tolist()
    ]


def summary_rows(summary: Summary) -> list[tuple[str, str, str, str]]:
    """The table of a summary as text: (what, before, after, change), empty strings where there is nothing to say."""
    before, after = summary.before, summary.after
    late_reward, late_kl = (after.reward, after.sequence_kl) if after else (None, None)
    rows = [
        (
            "reward (held-out)",
            interval_text(before.reward),
            interval_text(late_reward),
            change_text(summary.change),
        ),
        ("sequence KL (nats)", interval_text(before.sequence_kl), interval_text(late_kl), ""),
    ]
    numbers = [
        ("KL per token (nats)", "kl_per_token", ".3f"),
        ("length (tokens)", "length", ".1f"),
        ("distinct word pairs", "distinct_2", ".1%"),
        ("distinct completions", "distinct_texts", ".1%"),
        ("repeated word triples", "repetition", ".1%"),
    ]
    for label, name, form in numbers:
        rows.append(
            (
                label,
                number_text(getattr(before, name), form),
                number_text(getattr(after, name), form) if after else "",
                "",
            )
        )
    reasons = dict.fromkeys([*before.finish_reasons, *(after.finish_reasons if after else ())])
    for reason in reasons:
        share = number_text(after.finish_reasons.get(reason, 0.0), ".1%") if after else ""
        rows.append((f"ended by {reason}", number_text(before.finish_reasons.get(reason, 0.0), ".1%"), share, ""))
    terms = list(dict.fromkeys([*before.terms, *(after.terms if after else ())]))
    for name in terms if len(terms) > 1 else ():  # a single term is the reward itself
        late = interval_text(after.terms.get(name)) if after else ""
        rows.append(
            (
                f"reward term {name}",
                interval_text(before.terms.get(name)),
                late,
                change_text(summary.term_changes.get(name)),
            )
        )
    for name in dict.fromkeys([*before.metrics, *(after.metrics if after else ())]):
        late = interval_text(after.metrics.get(name)) if after else ""
        change = change_text(summary.metric_changes.get(name))
        rows.append((_metric_label(name), interval_text(before.metrics.get(name)), late, change))
    return rows


def _metric_label(name: str) -> str:
    """What the table calls a measure; the gold reward and its terms are no metrics of the user."""
    if name == "gold":
        return "gold reward (held-out)"
    return f"gold term {name.removeprefix('gold/')}" if name.startswith("gold/") else f"metric {name}"


def _ends(run: RunData) -> tuple[Evaluation, Evaluation | None, list[str]]:
    """The first evaluation, the one to compare it with, and notes on the choice."""
    if run.comparisons and not run.evaluations:
        raise DataError(
            f"the run {str(run.folder)!r} trained a reward model, which writes no completions to compare; measure it "
            f"with: tropism evaluate {run.folder}"
        )
    if not run.evaluations:
        raise DataError(f"the run {str(run.folder)!r} has no evaluation yet, so there is nothing to compare")
    first, last, notes = run.evaluations[0], run.evaluations[-1], list(run.skipped)
    if run.best_step is not None and run.best_step != last.step:
        best = next((one for one in run.evaluations if one.step == run.best_step), None)
        if best is first:
            notes.append(
                f"No evaluation was better than the model before training; the last step, {last.step}, is shown."
            )
        elif best is None:
            notes.append(
                f"The best step, {run.best_step}, has no evaluation file; the last step, {last.step}, is shown."
            )
        else:
            notes.append(f"The best step, {best.step}, is shown; training went on to step {last.step}.")
            last = best
    if last is first:
        return first, None, notes
    if first.prompts != last.prompts:
        raise DataError(
            f"the evaluations at steps {first.step} and {last.step} in {str(run.folder)!r} hold different prompts; "
            "before and after can only be compared on the same prompts in the same order"
        )
    return first, last, notes


def _mean_interval(values: Floats) -> Interval | None:
    """The mean of the measured values, infinite where one of them is, or None where nothing was measured."""
    measured = values[~np.isnan(values)]
    if not len(measured):
        return None
    if np.isinf(measured).any():
        return Interval(math.inf, math.nan, math.nan)
    return bootstrap_interval(measured)


def _paired(before: Floats, after: Floats) -> Interval | None:
    both = np.isfinite(before) & np.isfinite(after)
    return paired_difference(before[both], after[both]) if both.any() else None


def _snapshot(evaluation: Evaluation) -> Snapshot:
    if not len(evaluation):
        raise DataError(f"the evaluation at step {evaluation.step} has no rows; evaluate on at least one prompt")
    texts, kl = evaluation.completions, _mean_interval(evaluation.sequence_kl)
    length = float(np.mean(evaluation.lengths))
    reasons = Counter(evaluation.finish_reasons)
    terms = {name: _mean_interval(values) for name, values in evaluation.terms.items()}
    metrics = {name: _mean_interval(values) for name, values in evaluation.metrics.items()}
    return Snapshot(
        step=evaluation.step,
        prompts=len(evaluation),
        scored=int(np.isfinite(evaluation.rewards).sum()),
        reward=_mean_interval(evaluation.rewards),
        sequence_kl=kl,
        kl_per_token=kl.mean / length if kl is not None and length > 0 else math.nan,
        length=length,
        distinct_2=distinct_n(texts, 2),
        distinct_texts=distinct_texts(texts),
        repetition=repetition(texts, 3),
        finish_reasons={reason: number / len(texts) for reason, number in reasons.most_common()},
        terms={name: interval for name, interval in terms.items() if interval is not None},
        metrics={name: interval for name, interval in metrics.items() if interval is not None},
        settings={label: _snapshot(other) for label, other in evaluation.settings.items()},
    )


def _kl_cautions(kl: Interval | None) -> list[str]:
    text = ""
    if kl is None:
        return []
    if kl.mean > KL_FAR:
        text = (
            f"Sequence KL is {kl.mean:.1f} nats, far above {KL_LIMIT:g} nats: the text has probably left ordinary "
            "language to please the reward. Read the samples; do not trust the reward."
        )
    elif kl.mean > KL_LIMIT:
        text = (
            f"Sequence KL is {kl.mean:.1f} nats, above {KL_LIMIT:g} nats: read the samples before trusting the reward."
        )
    elif kl.known and kl.high < 0:
        text = (
            f"The estimated sequence KL is below 0 ({kl.mean:.2f} nats), which no KL can be: the completions were not "
            "sampled from the distribution that their log-probs belong to (temperature, top-p or top-k)."
        )
    return [text] if text else []


def _text_cautions(before: Snapshot, after: Snapshot, risen: tuple[WordShift, ...]) -> list[str]:
    cautions = []
    if after.distinct_2 < before.distinct_2 / 2:
        pairs = f"distinct word pairs {before.distinct_2:.0%} before, {after.distinct_2:.0%} after"
        cautions.append(f"Diversity fell by more than half ({pairs}): the policy says the same thing to every prompt.")
    if after.distinct_texts < before.distinct_texts / 2:
        shares = f"{before.distinct_texts:.0%} before, {after.distinct_texts:.0%} after"
        cautions.append(f"The share of distinct completions fell by more than half ({shares}).")
    share_before, share_after = sum(shift.before for shift in risen), sum(shift.after for shift in risen)
    if share_after > SALAD_SHARE and share_after > 2 * share_before:
        words = ", ".join(shift.word for shift in risen[:5])
        cautions.append(
            f"{len(risen)} words ({words}, ...) make up {share_after:.0%} of the text, {share_before:.0%} before: "
            "the policy may be reciting what the reward likes."
        )
    if after.repetition > 0.1 and not after.repetition <= 2 * before.repetition:
        cautions.append(f"Completions repeat themselves: {after.repetition:.0%} of their word triples occurred before.")
    if before.length > 0 and not before.length / 2 <= after.length <= 2 * before.length:
        lengths = f"from {before.length:.0f} to {after.length:.0f} tokens"
        cautions.append(f"The length changed by more than a factor of two ({lengths}): the reward may pay for length.")
    return cautions


def _reward_cautions(after: Snapshot, change: Interval | None) -> list[str]:
    cautions = []
    if change is None:
        cautions.append("No prompt was scored both before and after, so the reward cannot be compared.")
    elif change.known and change.high < 0:
        cautions.append(f"The held-out reward fell: {change_text(change)}.")
    elif change.includes(0):
        cautions.append(f"The interval of the change in reward includes 0 ({change_text(change)}): no effect is shown.")
    if after.scored < after.prompts:
        cautions.append(f"{after.prompts - after.scored} of {after.prompts} completions got no reward.")
    if after.prompts < FEW_PROMPTS:
        cautions.append(f"There are only {after.prompts} held-out prompts: the intervals are rough.")
    return cautions
