"""``report.html`` of a comparison: what was gained, how sure one can be, and what the methods write, side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tropism.comparing.cautions import cautions, headlines
from tropism.comparing.charts import (
    RewardChart,
    colours_of,
    distribution_chart,
    frontier_chart,
    training_chart,
)
from tropism.comparing.frontier import over_training
from tropism.comparing.results import Comparison
from tropism.comparing.table import PAIRS_HEADER, pair_rows, setting_text, table_header, table_notes, table_rows
from tropism.evaluation.charts import Chart, blocks, pictures
from tropism.evaluation.pages import (
    PageSample,
    PageSection,
    code_block,
    list_block,
    samples_block,
    table_block,
    text_block,
    write_page,
)

MOST_PROMPTS = 100
"""Held-out prompts whose completions are on the page."""
MOST_CHARACTERS = 4000
"""Of a prompt or completion."""
BOUGHT = 6
"""Columns of the table that stand above the rest of it, since a page is not as wide as all of them."""
TEXTS = "Texts and cost"
HOW_SURE = (
    "Each p is Student's, over prompts and seeds, corrected by Holm over all pairs of this table: among methods that "
    "are equal, one or more false finds have a chance of at most 5 %. Not significant does not mean equal."
)
FRONTIER = (
    "To the right is further from the base model, up is more reward. Lines are methods over training (mean over seeds) "
    "or over the values of a setting, points are what was measured in the end, with 95 % intervals both ways. The "
    "dashed line is the best of n samples of the base model, at the largest KL that it can have, ln n - (n - 1) / n."
)


def write_page_of(comparison: Comparison) -> Path:
    """Write ``report.html``, and its charts to ``plots/``, over older ones.

    Raises:
        DataError: a run folder of the comparison is damaged.
        StorageError: the page or a picture cannot be written.
    """
    results, colours = comparison.results, colours_of(comparison)
    against_kl = frontier_chart(comparison.frontier, colours)
    front: list[Chart] = [against_kl] if against_kl is not None else []
    rewards: list[Chart] = []
    if any(math.isfinite(row.reward.mean) for row in results.rows):
        rewards.append(RewardChart(comparison=comparison, colours=colours))
    for chart in (
        training_chart(over_training(comparison, kl=False), colours),
        distribution_chart(comparison, colours),
    ):
        if chart is not None:
            rewards.append(chart)
    found = cautions(comparison)
    sections = [
        PageSection(title="Results", body=_results(comparison)),
        *_section(
            "How sure",
            table_block(PAIRS_HEADER, pair_rows(results.pairs), note=HOW_SURE),
            bool(results.pairs),
        ),
        *_section("Reward against KL", blocks(front) + text_block(FRONTIER, quiet=True), bool(front)),
        *_section("Rewards", blocks(rewards), bool(rewards)),
        *_section("Cautions", list_block(found, kind="cautions"), bool(found)),
        *_section("Samples", _samples(comparison), bool(comparison.methods)),
        *_section("Settings that were chosen", _choices(comparison), any(row.settings for row in results.rows)),
        PageSection(title="Plan", body=code_block(_plan(comparison))),
    ]
    return write_page(
        comparison.folder / "report.html",
        title=f"Comparison {comparison.name}",
        lead=list_block(headlines(comparison)),
        counters=_counters(comparison),
        sections=sections,
        pictures=pictures([*front, *rewards]),
    )


def _section(title: str, body: Markup, wanted: bool) -> list[PageSection]:
    return [PageSection(title=title, body=body)] if wanted else []


def _counters(comparison: Comparison) -> list[tuple[str, str]]:
    section = comparison.plan["compare"]
    rows = comparison.results.rows
    budget = [
        (name, f"{section[name]:,}")
        for name in ("completions", "seconds")
        if isinstance(section.get(name), int | float)
    ]
    return [
        ("methods", str(len([row for row in rows if row.name != "base"]))),
        ("seeds", str(max((len(row.seeds) for row in rows), default=0))),
        ("held-out prompts", str(len(comparison.prompts))),
        *[(f"budget ({name})", text) for name, text in budget],
    ]


def _results(comparison: Comparison) -> Markup:
    results = comparison.results
    if not results.rows:
        return text_block("No cell is finished yet.")
    header, rows, notes = table_header(results), table_rows(results), list_block(table_notes(results))
    bought = table_block(header[:BOUGHT], [row[:BOUGHT] for row in rows])
    texts = table_block([header[0], *header[BOUGHT:]], [[row[0], *row[BOUGHT:]] for row in rows], caption=TEXTS)
    return bought + texts + notes


def _samples(comparison: Comparison) -> Markup:
    """The first sample of the first seed of every method, prompt by prompt."""
    first = {name: comparison.answers(name)[0] for name in comparison.methods}
    shown = []
    for number, prompt in enumerate(comparison.prompts[:MOST_PROMPTS]):
        sides = []
        for name, samples in first.items():
            row = samples.of_prompt(number)[0]
            sides.append((name, _cut(samples.completions[row]), _score(float(samples.rewards[row]))))
        shown.append(PageSample(prompt=_cut(prompt), sides=sides))
    note = "The first completion of the first seed of each method; samples.parquet of each cell holds them all."
    return samples_block(shown, identifier="samples", note=note)


def _score(reward: float) -> str:
    return f"reward {reward:.2f}" if math.isfinite(reward) else "unscored"


def _cut(text: str) -> str:
    shown = text.strip(" ")
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]} ... (cut: {len(shown)} characters)"


def _choices(comparison: Comparison) -> Markup:
    """What was tried on training prompts, and what was taken."""
    rows: list[list[str | float | Markup]] = []
    for name, cells in comparison.methods.items():
        for cell in cells:
            taken = cell.facts.get("settings")
            if taken:
                tried = cell.facts.get("choices") or []
                rows.append([name, float(cell.seed), setting_text(taken), "; ".join(map(_tried, tried))])
    note = "Chosen on training prompts, within the budget; tried: mean reward of each."
    return table_block(("method", "seed", "taken", "tried"), rows, note=note)


def _tried(one: Any) -> str:
    if not isinstance(one, dict):
        return str(one)
    reward = one.get("reward")
    settings = {name: value for name, value in one.items() if name not in ("reward", "completions")}
    return f"{setting_text(settings)}: {reward:.3f}" if isinstance(reward, float) else setting_text(settings)


def _plan(comparison: Comparison) -> str:
    path = comparison.folder / "compare.yaml"
    return path.read_text(encoding="utf-8", errors="replace")[:100_000]
