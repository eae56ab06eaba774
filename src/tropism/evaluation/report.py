"""``report.html``: one file without network access that shows what a run bought, and at what price."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tropism.errors import DataError
from tropism.evaluation.attribution_section import attribution_section
from tropism.evaluation.charts import Chart, blocks, pictures
from tropism.evaluation.number_texts import change_text, interval_text
from tropism.evaluation.over_optimisation_section import over_optimisation_section
from tropism.evaluation.page_blocks import (
    PageCard,
    PageSample,
    cards_block,
    chips_block,
    code_block,
    details_block,
    list_block,
    samples_block,
    table_block,
    text_block,
)
from tropism.evaluation.pages import PageSection, write_page
from tropism.evaluation.pictures import reward_kl_picture
from tropism.evaluation.plots import meter
from tropism.evaluation.reward_model_report import reward_model_part
from tropism.evaluation.run_charts import distribution_charts, main_charts, other_charts
from tropism.evaluation.run_folder import RunData, is_finite
from tropism.evaluation.sampling_table import sampling_table
from tropism.evaluation.summary import (
    KL_FAR,
    KL_LIMIT,
    SamplePair,
    Summary,
    sample_pairs,
    summarise,
    summary_rows,
)

__all__ = ["Summary", "reward_kl_picture", "sample_pairs", "summarise", "summary_rows", "write_report"]

EXTRA_SECTIONS: dict[str, Callable[[RunData], list[PageSection]]] = {
    "Is the reward being gamed?": over_optimisation_section,
    "What drove it": attribution_section,
}
"""Sections about what else lies in the run folder; each function returns none where there is nothing. The title stands
over the sentence that takes the place of a section that cannot be made."""
MOST_PAIRS = 100
"""Pairs in the searchable list."""
MOST_CHARACTERS = 4000
"""Of one prompt or completion; what is longer is cut, and says so."""
MOST_MESSAGES = 200
"""Of the warnings; the first ones are shown."""
DEEPEST = 3
"""Levels of a value in the environment that are put into words; what is below is shown as it was written."""
MOST_OF_RECIPE = 100_000
"""Characters of the recipe."""
KL_WORDS = {
    "unknown": "not measured",
    "low": "close to the reference",
    "high": "far from the reference: read the samples",
    "extreme": "very far from the reference: expect text that only the reward likes",
}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder, one self-contained file that needs no network, and ``plots/*.png``.

    Args:
        folder: a run folder, finished or in progress.

    Returns:
        The path of the report, which replaces an earlier one.

    Raises:
        DataError: it is no run folder, or what is in it cannot be read or compared.
        StorageError: the report cannot be written.
    """
    run = RunData.read(folder)
    judged = reward_model_part(run)
    if judged:
        lead, parts, shown = judged.lead, judged.sections, judged.metrics
    else:
        summary = summarise(run) if run.evaluations else None
        lead, parts, shown = _lead(run, summary), _sections(run, summary), frozenset()
    sections = [*parts, *_other_sections(run, shown)]
    # The long list of samples comes last.
    sections.sort(key=lambda section: section.anchor == "pairs")
    title = run.folder.resolve().name
    return write_page(run.folder / "report.html", title=title, sections=sections, lead=lead, counters=_counters(run))


def _counters(run: RunData) -> list[tuple[str, str]]:
    """Steps, updates, samples, tokens and time so far, from the last line that holds each."""
    counters = []
    for name in ("step", "updates", "samples", "tokens", "seconds"):
        values = [line[name] for line in run.metrics if is_finite(line.get(name))]
        if values:
            last = float(values[-1])
            text = f"{int(last // 60)} min {int(last % 60)} s" if name == "seconds" else f"{last:,.0f}"
            counters.append(("time" if name == "seconds" else name, text))
    return counters


# What the run bought --------------------------------------------------------------------------------------------------


def _lead(run: RunData, summary: Summary | None) -> Markup:
    if summary is None:
        cautions = list_block(run.skipped, kind="cautions")
        return text_block("There is no evaluation on held-out prompts yet.") + cautions
    return cards_block(_cards(summary)) + list_block(summary.cautions, kind="cautions")


def _cards(summary: Summary) -> list[PageCard]:
    """The cards on top: reward and KL side by side."""
    before, after = summary.before, summary.after
    kl = after.sequence_kl if after else None
    drawn = (
        meter(kl.mean, limit=KL_LIMIT, level=summary.kl_level, title=f"{kl.mean:.1f} nats, limit {KL_LIMIT:g}")
        if kl
        else ""
    )
    change = change_text(summary.change)
    steps = f"step {before.step} to {after.step}" if after else f"step {before.step}"
    return [
        PageCard(
            title="Held-out reward",
            before=f"{before.reward.mean:z.2f}" if before.reward else "unscored",
            value=f"{after.reward.mean:z.2f}" if after and after.reward else ("unscored" if after else "not yet"),
            lines=[Markup('{} <span class="quiet">(95 %, paired)</span>').format(change)] if change else [],
            notes=[f"{before.prompts} prompts, {steps}"],
        ),
        PageCard(
            title="What it cost: sequence KL",
            value=f"{kl.mean:z.1f}" if kl else "not measured",
            unit="nats" if interval_text(kl) else "",
            drawn=drawn,
            lines=[KL_WORDS[summary.kl_level]],
            level=summary.kl_level,
        ),
        PageCard(
            title="Distinct word pairs",
            before=_percent(before.distinct_2),
            value=_percent(after.distinct_2) if after else "not yet",
            notes=["share of different ones among all pairs of neighbouring words, over all completions"],
        ),
    ]


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "none"


def _sections(run: RunData, summary: Summary | None) -> list[PageSection]:
    """The sections of a run that samples, as far as it has come."""
    charts: list[tuple[str, Sequence[Chart]]] = [
        ("Over training", main_charts(run)),
        ("Distributions", distribution_charts(run)),
    ]
    drawn = [_charts_section(title, some) for title, some in charts if some]
    if summary is None:
        return drawn
    return [*_featured(run), *_risen(summary), *drawn, _table(summary), *_ways(summary), *_pairs(run, summary)]


def _charts_section(title: str, charts: Sequence[Chart]) -> PageSection:
    return PageSection(title=title, body=blocks(charts), pictures=pictures(charts))


def _featured(run: RunData) -> list[PageSection]:
    """Three pairs that show the range: the largest gain, the median, the smallest."""
    pairs = sample_pairs(run, count=3)
    if not pairs:
        return []
    labels = ("Largest gain", "Median gain", "Smallest gain") if len(pairs) == 3 else ("",) * len(pairs)
    samples = [_sample(pair, label) for label, pair in zip(labels, pairs, strict=True)]
    body = samples_block(samples, identifier="featured", searchable=False)
    return [PageSection(title="Samples: the same prompt before and after", body=body, anchor="samples")]


def _sample(pair: SamplePair, label: str = "") -> PageSample:
    after = f"reward {_score(pair.reward_after)}"
    if math.isfinite(pair.kl_after):
        level = "low" if pair.kl_after <= KL_LIMIT else "high" if pair.kl_after <= KL_FAR else "extreme"
        after = Markup('{}, <b class="{}">{:z.1f} nats</b>').format(after, level, pair.kl_after)
    others = [(f"after, {name}", _cut(text), f"reward {_score(value)}") for name, (text, value) in pair.others.items()]
    before = ("before", _cut(pair.before), f"reward {_score(pair.reward_before)}")
    return PageSample(
        prompt=_cut(pair.prompt), sides=[before, ("after", _cut(pair.after), after), *others], label=label
    )


def _score(value: float) -> str:
    return f"{value:z.2f}" if math.isfinite(value) else "unscored"


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text for reading: without blanks around it, and cut where it is very long."""
    shown = text.strip(" ")
    if len(shown) <= most:
        return shown
    return f"{shown[:most]} ... (cut here: {len(shown)} characters)"


def _risen(summary: Summary) -> list[PageSection]:
    if not summary.risen:
        return []
    chips = [(one.word, f"{100 * one.before:.1f} → {100 * one.after:.1f} %") for one in summary.risen]
    note = text_block("Share of all words in the held-out completions, before → after.", quiet=True)
    return [PageSection(title="Words that became more frequent", body=chips_block(chips) + note, anchor="words")]


def _table(summary: Summary) -> PageSection:
    note = (
        "Brackets are 95 % bootstrap intervals over the prompts. Sequence KL is the mean over completions of the "
        "summed log-ratio to the reference."
    )
    header = ("quantity", "before", "after", "change (paired)")
    return PageSection(title="Before and after", body=table_block(header, summary_rows(summary), note=note))


def _ways(summary: Summary) -> list[PageSection]:
    """The table with a column per way to sample, of the newest evaluation that is shown, where there are several."""
    shown = summary.after or summary.before
    if not shown.settings:
        return []
    labels, rows = sampling_table(shown)
    note = (
        "The same prompts and random numbers, under changed sampling. Brackets are 95 % bootstrap intervals over the "
        "prompts."
    )
    body = table_block(["quantity", *labels], [[label, *values] for label, values in rows], note=note)
    return [PageSection(title=f"Other sampling, after step {shown.step}", body=body)]


def _pairs(run: RunData, summary: Summary) -> list[PageSection]:
    pairs, prompts = sample_pairs(run, count=MOST_PAIRS), summary.before.prompts
    if not pairs:
        return []
    note = "From the largest gain in reward to the smallest."
    if len(pairs) < prompts:
        note = f"{len(pairs)} of the {prompts} prompts, evenly spaced from the largest gain in reward to the smallest."
    body = samples_block([_sample(pair) for pair in pairs], identifier="list-of-pairs", note=note)
    return [PageSection(title="Pairs, searchable", body=body, anchor="pairs")]


# What every run has ---------------------------------------------------------------------------------------------------


def _extra(title: str, run: RunData) -> list[PageSection]:
    """The sections of one function; a sentence in their place where it cannot read what it is about."""
    try:
        return EXTRA_SECTIONS[title](run)
    except DataError as error:
        return [PageSection(title=title, body=list_block([f"This cannot be shown: {error}"], kind="cautions"))]


def _other_sections(run: RunData, shown: frozenset[str]) -> list[PageSection]:
    sections = [section for title in EXTRA_SECTIONS for section in _extra(title, run)]
    more = other_charts(run, shown)
    if more:
        body = details_block(f"{len(more)} more curves", blocks(more, small=True))
        sections.append(PageSection(title="Every other metric", body=body))
    sections.append(PageSection(title="Warnings of the run", body=_warnings(run), anchor="warnings"))
    if run.environment:
        rows = [(_cut(name), _plain(value)) for name, value in list(run.environment.items())[:MOST_MESSAGES]]
        sections.append(PageSection(title="Environment", body=table_block(("setting", "value"), rows)))
    if run.recipe:
        body = code_block(_cut(run.recipe, MOST_OF_RECIPE))
        sections.append(PageSection(title="Recipe as resolved", body=body, anchor="recipe"))
    return sections


def _warnings(run: RunData) -> Markup:
    if not run.warnings:
        return text_block("None.", quiet=True)
    shown, more = run.warnings[:MOST_MESSAGES], len(run.warnings) - MOST_MESSAGES
    rows = [[_plain(line.get(name, "")) for name in ("step", "message")] for line in shown]
    return table_block(("step", "message"), rows, note=f"and {more} more in warnings.jsonl" if more > 0 else "")


def _plain(value: Any) -> str:
    return _cut(_words(value))


def _words(value: Any, depth: int = 0) -> str:
    """A value of a JSON file for reading: ``torch 2.13.0, numpy 2.4.6`` for an object."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | list) or depth == DEEPEST:
        return json.dumps(value)
    if isinstance(value, list):
        return ", ".join(_words(one, depth + 1) for one in value)
    parts = [(name, _words(one, depth + 1)) for name, one in value.items()]
    return ", ".join(f"{name} ({text})" if isinstance(value[name], dict) else f"{name} {text}" for name, text in parts)
