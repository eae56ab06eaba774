"""The page of a measurement: numbers with intervals, the split, distributions, and texts behind a click."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tropism.evaluation.charts import Histogram, blocks, pictures
from tropism.evaluation.number_texts import change_text, interval_text
from tropism.evaluation.page_blocks import (
    PageCard,
    PageSample,
    cards_block,
    code_block,
    details_block,
    list_block,
    samples_block,
    table_block,
    text_block,
)
from tropism.evaluation.pages import PageSection, write_page
from tropism.evaluation.statistics import Interval
from tropism.redaction import redact, redact_values
from tropism.schema import dump_yaml
from tropism.toxicity.metrics import MEASURED
from tropism.toxicity.result import ToxicityComparison, ToxicityResult

LABELS = {
    "toxicity_probability": "toxicity probability",
    "expected_max_toxicity": "expected maximum toxicity",
    "mean_toxicity": "mean toxicity",
    "toxic_share": "toxic share of completions",
    "prompt_score": "score of the prompts",
}
"""Metric -> how it is called for readers."""
EXPLAINED = (
    "Toxicity probability: the share of prompts with at least one completion from the threshold on. Expected maximum"
    " toxicity: the mean over prompts of the highest score. Both grow with the number of completions per prompt."
    " Intervals: 95 %, bootstrap over prompts."
)
MOST_SAMPLES = 20
"""Of the most and of the least toxic responses."""
MOST_CHARACTERS = 2000
"""Of one text; what is longer is cut, and says so."""


def write_result_page(result: ToxicityResult, path: Path) -> Path:
    """The page of one measurement, over an older one; its pictures lie beside it in ``plots/``."""
    charts = _charts(result)
    sections = [
        PageSection(title="Toxicity", body=_numbers_table(result)),
        *([PageSection(title="Distributions", body=blocks(charts))] if charts else []),
        PageSection(title="Responses", body=_extremes(result)),
        PageSection(title="Settings", body=_settings(result)),
    ]
    return write_page(
        path,
        title=f"Toxicity of {result.settings.get('model', 'a model')}",
        lead=_cards(result) + list_block(result.cautions, kind="cautions"),
        sections=sections,
        counters=_counters(result),
        pictures=pictures(charts),
    )


def write_comparison_page(comparison: ToxicityComparison, path: Path) -> Path:
    """The page of two measurements of the same prompts, over an older one."""
    base, tuned = comparison.base, comparison.tuned
    charts = [
        Histogram(
            title=f"Scores of the responses by {name}",
            name=f"responses {name}",
            before=base.scores[name].ravel(),
            after=tuned.scores[name].ravel(),
            x_label="score",
            labels=("base", "tuned"),
        )
        for name in base.scorers
        if np.isfinite(base.scores[name]).any() and np.isfinite(tuned.scores[name]).any()
    ]
    cautions = list(dict.fromkeys([*base.cautions, *tuned.cautions]))
    changed = _changed_most(comparison)
    sections = [
        PageSection(title="Base and tuned", body=_comparison_table(comparison)),
        *([PageSection(title="Distributions", body=blocks(charts))] if charts else []),
        *([PageSection(title="What changed most", body=changed)] if changed else []),
        PageSection(title="Settings", body=_settings(base, "base") + _settings(tuned, "tuned")),
    ]
    return write_page(
        path,
        title="Toxicity before and after",
        lead=_change_cards(comparison) + list_block(cautions, kind="cautions"),
        sections=sections,
        counters=_counters(base),
        pictures=pictures(charts),
    )


def _counters(result: ToxicityResult) -> list[tuple[str, str]]:
    return [
        ("prompts", str(len(result.prompts))),
        ("completions per prompt", str(result.samples_per_prompt)),
        ("scorers", ", ".join(result.scorers)),
    ]


def _cards(result: ToxicityResult) -> Markup:
    metrics = result.metrics[result.scorers[0]]["all"]
    shown: list[tuple[str, Interval | None]] = [(name, getattr(metrics, name)) for name in MEASURED[:3]]
    return cards_block([_card(LABELS[name], interval) for name, interval in shown if interval is not None])


def _card(title: str, interval: Interval, before: str = "") -> PageCard:
    lines = [f"95 %: {interval.low:.3f} to {interval.high:.3f}"] if interval.known else []
    return PageCard(title=title.capitalize(), value=f"{interval.mean:.3f}", before=before, lines=lines)


def _change_cards(comparison: ToxicityComparison) -> Markup:
    name = comparison.base.scorers[0]
    before, after = (one.metrics[name]["all"] for one in (comparison.base, comparison.tuned))
    cards = []
    for metric in MEASURED[:3]:
        one, other, change = getattr(before, metric), getattr(after, metric), comparison.changes[name]["all"][metric]
        if one is not None and other is not None and change is not None:
            verdict = "" if not change.known else _verdict(change)
            cards.append(
                PageCard(
                    title=LABELS[metric].capitalize(),
                    before=f"{one.mean:.3f}",
                    value=f"{other.mean:.3f}",
                    lines=[f"change {change_text(change)}"],
                    notes=[verdict] if verdict else [],
                )
            )
    return cards_block(cards)


def _verdict(change: Interval) -> str:
    if change.includes(0.0):
        return "the interval holds 0: no change was shown"
    return "less toxic" if change.mean < 0 else "more toxic"


def _numbers_table(result: ToxicityResult) -> Markup:
    tables = []
    for name, groups in result.metrics.items():
        rows = [
            [f"{group} prompts", str(one.prompts), *(interval_text(getattr(one, metric)) for metric in MEASURED)]
            for group, one in groups.items()
        ]
        header = ["prompts", "number", *(LABELS[metric] for metric in MEASURED)]
        caption = f"{name}, toxic from {result.thresholds[name]:g} on"
        tables.append(table_block(header, rows, caption=caption))
    return Markup("").join(tables) + text_block(f"{EXPLAINED}\n\n{split_text(result)}", quiet=True)


def split_text(result: ToxicityResult) -> str:
    """What parts toxic from other prompts, as a sentence."""
    if not result.split_by:
        return "The prompts are not split: the data does not say how toxic they are, and they were not scored."
    if result.split_by == "data":
        return "A prompt is toxic if the data gives it a toxicity of 0.5 or more."
    threshold = result.thresholds[result.split_by]
    return f"A prompt is toxic if {result.split_by} scores its text {threshold:g} or more."


def _comparison_table(comparison: ToxicityComparison) -> Markup:
    tables = []
    for name, groups in comparison.changes.items():
        rows = []
        for group, changes in groups.items():
            before, after = (one.metrics[name][group] for one in (comparison.base, comparison.tuned))
            for metric in MEASURED[:4]:
                texts = [interval_text(getattr(one, metric)) for one in (before, after)]
                rows.append([LABELS[metric], group, str(before.prompts), *texts, change_text(changes[metric])])
        header = ["metric", "prompts", "number", "base", "tuned", "change"]
        caption = f"{name}, toxic from {comparison.base.thresholds[name]:g} on"
        tables.append(table_block(header, rows, caption=caption))
    note = f"{EXPLAINED} The change is paired: tuned less base on the same prompts.\n\n{split_text(comparison.base)}"
    return Markup("").join(tables) + text_block(note, quiet=True)


def _charts(result: ToxicityResult) -> list[Histogram]:
    """Of every scorer prompts against responses, and responses to toxic against those to other prompts."""
    charts = []
    for name, scores in result.scores.items():
        sides = [("Prompts and responses", "prompts", result.prompt_scores.get(name), ("prompts", "responses"), scores)]
        if {"toxic", "non-toxic"} <= result.groups.keys():
            calm, toxic = (scores[result.groups[group]].ravel() for group in ("non-toxic", "toxic"))
            sides.append(("Responses by prompt", "split", calm, ("non-toxic prompts", "toxic prompts"), toxic))
        for title, file, before, labels, after in sides:
            if before is not None and np.isfinite(before).any() and np.isfinite(after).any():
                charts.append(
                    Histogram(
                        title=f"{title}, {name}",
                        name=f"{file} {name}",
                        before=before,
                        after=after.ravel(),
                        x_label="score",
                        labels=labels,
                    )
                )
    return charts


def _extremes(result: ToxicityResult) -> Markup:
    """The most and the least toxic responses by the first scorer, each list closed until it is asked for."""
    name = result.scorers[0]
    flat = result.scores[name].ravel()
    order = np.argsort(np.nan_to_num(flat, nan=-np.inf), kind="stable")
    order = order[np.isfinite(flat[order])]
    most, least = order[::-1][:MOST_SAMPLES], order[:MOST_SAMPLES]
    lists = [
        details_block(
            f"The {len(rows)} {what} toxic responses by {name}; they may offend",
            samples_block(_samples(result, rows.tolist(), name), identifier=what, searchable=False),
        )
        for what, rows in (("most", most), ("least", least))
        if len(rows)
    ]
    return Markup("").join(lists)


def _samples(result: ToxicityResult, rows: Sequence[int], name: str) -> list[PageSample]:
    k, scores = result.samples_per_prompt, result.scores[name].ravel()
    return [
        PageSample(
            prompt=_short(result.prompts[row // k]),
            sides=[("response", _short(result.responses[row]), f"{name} {scores[row]:.3f}")],
        )
        for row in rows
    ]


def _changed_most(comparison: ToxicityComparison) -> Markup:
    """Prompts whose mean score changed most, in both directions, each with the highest-scored completion of either
    side; closed until asked for."""
    name, k = comparison.base.scorers[0], comparison.base.samples_per_prompt
    sides = (("base", comparison.base), ("tuned", comparison.tuned))
    change = comparison.tuned.per_prompt(name)["mean_toxicity"] - comparison.base.per_prompt(name)["mean_toxicity"]
    order = np.argsort(np.nan_to_num(change), kind="stable")
    lists = []
    for what, rows in (("less", order[:MOST_SAMPLES]), ("more", order[::-1][:MOST_SAMPLES])):
        chosen = [row for row in rows.tolist() if (change[row] < 0 if what == "less" else change[row] > 0)]
        samples = [
            PageSample(
                prompt=_short(comparison.base.prompts[row]), sides=[_highest(one, row, label) for label, one in sides]
            )
            for row in chosen
        ]
        if samples:
            shown = "" if k == 1 else f", by the mean of {k} completions, with the highest-scored of each model"
            title = f"{len(samples)} prompts that became {what} toxic by {name}{shown}; they may offend"
            lists.append(details_block(title, samples_block(samples, identifier=what, searchable=False)))
    return Markup("").join(lists)


def _highest(result: ToxicityResult, row: int, label: str) -> tuple[str, str, str]:
    """A side of a sample: the highest-scored completion of a prompt, and its score beside the mean of all."""
    name, k = result.scorers[0], result.samples_per_prompt
    scores = result.scores[name][row]
    best = int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))
    said = f"{name} {scores[best]:.3f}" if k == 1 else f"{name} {scores[best]:.3f}, mean {np.nanmean(scores):.3f}"
    return label, _short(result.responses[row * k + best]), said


def _settings(result: ToxicityResult, title: str = "") -> Markup:
    settings: dict[str, Any] = redact_values(dict(result.settings))
    block = code_block(dump_yaml(settings))
    return details_block(title, block) if title else block


def _short(text: str) -> str:
    cut = f" ... (cut here: {len(text)} characters)" if len(text) > MOST_CHARACTERS else ""
    return redact(text[:MOST_CHARACTERS]) + cut
