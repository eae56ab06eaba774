"""The one table of a comparison, as text, CSV and Markdown, and that of all pairs of methods."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from tropism.comparing.cautions import cautions, headlines, p_text, verdict_text
from tropism.comparing.difference import Difference
from tropism.comparing.measures import Measures, Results
from tropism.comparing.results import BASE, Comparison
from tropism.evaluation.number_texts import change_text, interval_text, number_text
from tropism.evaluation.result_files import csv_table
from tropism.evaluation.statistics import Interval

WIDTH = 200
"""Characters of a terminal that the text fits in."""
PAIRS_HEADER = ("pair", "difference [95 %]", "p", "p (Holm)", "significant", "seeds", "prompts")


def table_header(results: Results) -> list[str]:
    """The names of the columns of ``table_rows``."""
    return [
        "method",
        "seeds",
        "held-out reward [95 %]",
        "to the base",
        *([f"beats {results.against}"] if results.against != BASE else ["beats the base"]),
        "KL (nats)",
        "length",
        "distinct-1, -2",
        "perplexity",
        *(["toxicity"] if results.toxicity_scorer else []),
        "eos",
        "seconds",
        "completions",
        "tokens",
    ]


def table_rows(results: Results) -> list[list[str]]:
    """One row per method as text, in the order of the plan."""
    return [
        [
            row.name,
            str(len(row.seeds)),
            interval_text(row.reward),
            change_text(row.to_base.mean if row.to_base else None),
            verdict_text(row.to_other),
            kl_text(row),
            number_text(row.length, ".1f"),
            f"{number_text(row.distinct_1, '.0%')}, {number_text(row.distinct_2, '.0%')}",
            number_text(row.perplexity, ".4g"),
            *([number_text(row.toxicity.mean, ".3f") if row.toxicity else ""] if results.toxicity_scorer else []),
            number_text(row.eos, ".0%"),
            number_text(row.seconds, ",.0f"),
            _spent(row),
            number_text(row.tokens, ",.0f"),
        ]
        for row in results.rows
    ]


def kl_text(row: Measures) -> str:
    """``4.81 [4.60, 5.02]``, ``<= 1.82`` for a bound, empty where not measured."""
    if not math.isfinite(row.kl.mean):
        return ""
    if row.bounded:
        return f"<= {row.kl.mean:.2f}"
    return "0" if row.name == BASE else interval_text(row.kl)


def _spent(row: Measures) -> str:
    spent = number_text(row.completions, ",.0f")
    return f"{spent} + {row.per_answer:,.0f}/answer" if row.per_answer > 1 else spent


def pair_rows(pairs: Sequence[Difference]) -> list[list[str]]:
    """One row per pair as text, as ``PAIRS_HEADER`` names them."""
    return [
        [
            f"{one.first} - {one.second}",
            change_text(one.mean),
            p_text(one.p) if one.tested else "",
            p_text(one.adjusted) if one.tested else "",
            ("yes" if one.significant else "no") if one.tested else verdict_text(one),
            str(one.seeds),
            str(one.prompts),
        ]
        for one in pairs
    ]


def table_notes(results: Results) -> list[str]:
    """What the columns are, in sentences that stand under the table."""
    others = max(0, sum(row.to_other is not None for row in results.rows))
    against = "the base" if results.against == BASE else results.against
    corrected = f", corrected by Holm over {others} comparisons" if others > 1 else ""
    notes = [
        f"beats {against}: p by Student's t over prompts and seeds{corrected}.",
        f"KL: sequence KL to the base: {_estimators(results)}.",
        "perplexity: of the completions under the base model. seconds, completions, tokens: spent in training, a seed.",
    ]
    if results.toxicity_scorer:
        notes.append(f"toxicity: {results.toxicity_scorer}, mean over completions.")
    else:
        notes.append(f"toxicity is left out: {results.toxicity_reason.rstrip('.')}.")
    chosen = [f"{row.name} {_chosen(row)}" for row in results.rows if row.settings]
    return [*notes, f"Chosen: {'; '.join(chosen)}."] if chosen else notes


def _estimators(results: Results) -> str:
    """Each estimator, and of which methods where there are several."""
    methods: dict[str, list[str]] = {}
    for row in results.rows:
        if row.name != BASE and math.isfinite(row.kl.mean):
            methods.setdefault(row.kl_estimator, []).append(row.name)
    if len(methods) < 2:
        return next(iter(methods), "not measured")
    return "; ".join(f"{estimator} ({', '.join(names)})" for estimator, names in methods.items())


def _chosen(row: Measures) -> str:
    """What was chosen, once where all seeds chose the same."""
    texts = {seed: setting_text(found) for seed, found in row.settings.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} (seed {seed})" for seed, text in texts.items())


def setting_text(found: Any) -> str:
    """``target 0.84, guidance 2``; what is no mapping as it is."""
    if not isinstance(found, dict):
        return str(found)
    return ", ".join(f"{name} {one:.4g}" if isinstance(one, float) else f"{name} {one}" for name, one in found.items())


# The forms ------------------------------------------------------------------------------------------------------------


def as_text(comparison: Comparison) -> str:
    """Headlines, both tables and every note as plain text, up to ``WIDTH`` characters wide."""
    from rich import box  # here, so that importing the package stays fast
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    results = comparison.results
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        color_system=None,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )

    def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for place, name in enumerate(header):
            table.add_column(Text(name), justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)

    for sentence in headlines(comparison):
        console.print(sentence)
    if results.rows:
        show(table_header(results), table_rows(results))
        for note in table_notes(results):
            console.print(note)
    if len(results.pairs) > 1:
        show(PAIRS_HEADER, pair_rows(results.pairs))
    for caution in cautions(comparison):
        console.print(f"! {caution}")
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def as_markdown(comparison: Comparison) -> str:
    """Both tables with their notes, for a page."""
    results = comparison.results
    parts = [_markdown(table_header(results), table_rows(results)), *[f"- {note}" for note in table_notes(results)]]
    if len(results.pairs) > 1:
        parts += ["", _markdown(PAIRS_HEADER, pair_rows(results.pairs))]
    found = cautions(comparison)
    if found:
        parts += ["", *[f"- {_plain(caution)}" for caution in found]]
    return "\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] + ["---:"] * (len(header) - 1)), *map(line, rows)]) + "\n"


def _plain(text: str) -> str:
    """In one line, and no markup of a page."""
    return " ".join(text.split()).replace("<", "\\<")


def as_csv(results: Results) -> bytes:
    """One row per method, numbers to the last bit; empty where there is no number."""
    header = ["method", "seeds"]
    header += _ends("reward") + _ends("to_base") + _ends("to_other")
    header += ["to_other_p", "to_other_p_holm", "to_other_significant", *_ends("kl"), "kl_estimator"]
    plain = [
        "length",
        "distinct_1",
        "distinct_2",
        "perplexity",
        "eos",
        "seconds",
        "completions",
        "tokens",
        "per_answer",
    ]
    header += [*_ends("toxicity"), *plain]
    rows = []
    for row in results.rows:
        test = row.to_other
        rows.append(
            [
                row.name,
                len(row.seeds),
                *_numbers(row.reward),
                *_numbers(row.to_base.mean if row.to_base else None),
                *_numbers(test.mean if test else None),
                *_test(test),
                *_numbers(row.kl),
                row.kl_estimator,
                *_numbers(row.toxicity),
                *[getattr(row, name) for name in plain],
            ]
        )
    return csv_table(header, rows)


def pairs_csv(pairs: Sequence[Difference]) -> bytes:
    """One row per pair of methods."""
    header = ["first", "second", *_ends("difference"), "degrees", "p", "p_holm", "significant", "seeds", "prompts"]
    return csv_table(
        header,
        [
            [one.first, one.second, *_numbers(one.mean), one.degrees, *_test(one), one.seeds, one.prompts]
            for one in pairs
        ],
    )


def _test(one: Difference | None) -> list[Any]:
    """p, adjusted p and verdict."""
    if one is None:
        return [math.nan, math.nan, ""]
    return [one.p, one.adjusted, str(one.significant).lower() if one.tested else ""]


def _ends(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def _numbers(interval: Interval | None) -> list[float]:
    return [math.nan] * 3 if interval is None else [interval.mean, interval.low, interval.high]
