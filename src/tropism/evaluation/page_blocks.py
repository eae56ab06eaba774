"""The blocks that pages are built of. Text is escaped here; what comes out is markup.

``Markup.format`` escapes every argument that is no markup itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from tropism.evaluation.chart_colours import key_svg

NARROW = 2
"""Columns up to which a table stays a table on a phone; a row of more becomes a block."""
_EMPTY = Markup("")
_COLOUR = re.compile(r"c(\d+)")


@dataclass(frozen=True, kw_only=True)
class PageSample:
    """One prompt and its completions side by side."""

    prompt: str
    sides: Sequence[tuple[str, str, str]]
    """Label, text and score as text, such as ``("before", "It rained.", "reward 0.21")``; the score may be markup."""
    label: str = ""
    """Stands above the prompt."""
    marked: Sequence[int] | None = None
    """Which sides have the colour of what came after training; all but the first where None."""


@dataclass(frozen=True, kw_only=True)
class PageCard:
    """One figure that stands out."""

    title: str
    value: str
    before: str = ""
    """The value before, small and with an arrow."""
    unit: str = ""
    drawn: str = ""
    """A picture below the value, as SVG text."""
    lines: Sequence[str] = ()
    """Sentences below; markup is left as it is."""
    notes: Sequence[str] = ()
    """The same, less prominent."""
    level: Literal["", "unknown", "low", "high", "extreme"] = ""
    """How worrying the value is."""


def text_block(text: str, *, quiet: bool = False) -> Markup:
    """Paragraphs, which empty lines part; ``quiet`` ones are small and grey."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return _joined(Markup("<p{}>{}</p>\n").format(_class("quiet" if quiet else ""), part) for part in paragraphs)


def list_block(items: Sequence[str], *, kind: Literal["plain", "cautions"] = "plain") -> Markup:
    """A list; ``cautions`` stand out. Nothing where there are no items."""
    if not items:
        return _EMPTY
    return Markup('<ul class="{}">\n{}</ul>\n').format(kind, _joined(Markup("<li>{}</li>\n").format(i) for i in items))


def code_block(text: str) -> Markup:
    """Text as it is, such as a recipe or a command."""
    return Markup('<pre tabindex="0">{}</pre>\n').format(text)


def details_block(summary: str, body: Markup) -> Markup:
    """A block that is closed until its summary is clicked."""
    return Markup("<details><summary>{}</summary>\n{}</details>\n").format(summary, body)


def chips_block(chips: Sequence[tuple[str, str]]) -> Markup:
    """Short words, each with a note."""
    items = (Markup('<li><b>{}</b> <span class="quiet">{}</span></li>\n').format(*chip) for chip in chips)
    return Markup('<ul class="chips">\n{}</ul>\n').format(_joined(items))


def cards_block(cards: Sequence[PageCard]) -> Markup:
    """Figures that stand out, side by side where there is room."""
    return Markup('<div class="cards">\n{}</div>\n').format(_joined(_card(card) for card in cards))


def _card(card: PageCard) -> Markup:
    before = Markup("<small>{} →</small> ").format(card.before) if card.before else _EMPTY
    unit = Markup(" <small>{}</small>").format(card.unit) if card.unit else _EMPTY
    parts = [
        Markup("<div{}><h3>{}</h3>\n").format(_class("card", card.level), card.title),
        Markup('<p class="big">{}{}{}</p>\n').format(before, card.value, unit),
        Markup(card.drawn),
        *(Markup("<p>{}</p>\n").format(line) for line in card.lines if line),
        *(Markup('<p class="quiet">{}</p>\n').format(note) for note in card.notes if note),
    ]
    return _joined([*parts, Markup("</div>\n")])


def chart_block(title: str, svg: str, *, legend: Sequence[tuple[str, str]] = ()) -> Markup:
    """One figure of ``charts_block``.

    Args:
        title: stands above the picture.
        svg: what a function of ``svg_charts`` returned.
        legend: class of the key and text: ``train``, ``eval``, ``before``, ``after``, ``rule``, ``limit``, or ``c0``,
            ``c1``, ... for the series with that colour.
    """
    entries = _joined(Markup("<span>{}{}</span> ").format(_key(name), text) for name, text in legend)
    return Markup("<figure><figcaption><h3>{}</h3>{}</figcaption>\n{}</figure>\n").format(
        title,
        Markup('<div class="legend">{}</div>').format(entries) if legend else _EMPTY,
        Markup(svg),
    )


def _key(name: str) -> Markup:
    colour = _COLOUR.fullmatch(name)
    if colour:
        return Markup(key_svg(int(colour[1])))
    return Markup("<i{}></i>").format(_class("key", name))


def charts_block(charts: Sequence[Markup], *, small: bool = False) -> Markup:
    """Figures in as many columns as there is room for; one or two alone are larger."""
    size = "small" if small else "few" if len(charts) <= 2 else ""
    return Markup("<div{}>\n{}</div>\n").format(_class("charts", size), _joined(charts))


def table_block(
    header: Sequence[str], rows: Sequence[Sequence[str | float | Markup]], *, note: str = "", caption: str = ""
) -> Markup:
    """A table that a click on a header sorts; on a phone each row of a wide one becomes a block.

    Args:
        header: one name per column; an empty one is sorted by all the same.
        rows: as many cells each. A number is shown with 4 digits, from 1,000 on without decimals, and sorted by its
            value; NaN is an empty cell. Of text that begins with a number, such as ``0.67 [0.61, 0.72]``, that number
            counts.
        note: stands below.
        caption: stands above.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} of the table has {len(row)} cells where the header names {len(header)}")
    names = _joined(Markup('<th scope="col">{}</th>').format(name) for name in header)
    body = _joined(Markup("<tr>{}</tr>\n").format(_cells(header, row)) for row in rows)
    wide = "wide" if len(header) > NARROW else ""
    table = '{}<div class="scroll"><table{}><thead><tr>{}</tr></thead><tbody>\n{}</tbody></table></div>\n{}'
    return Markup(table).format(
        Markup("<h3>{}</h3>\n").format(caption) if caption else _EMPTY,
        _class(wide),
        names,
        body,
        Markup('<p class="quiet">{}</p>\n').format(note) if note else _EMPTY,
    )


def _cells(header: Sequence[str], row: Sequence[str | float | Markup]) -> Markup:
    cells = []
    for place, (name, value) in enumerate(zip(header, row, strict=True)):
        exact, text = _EMPTY, value
        if isinstance(value, int | float):
            text = "" if math.isnan(value) else f"{value:z,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:z.4g}"
            exact = _EMPTY if math.isnan(value) else Markup(' data-value="{}"').format(repr(float(value)))
        form = '<th scope="row"{}>{}</th>' if place == 0 else '<td data-name="{2}"{0}>{1}</td>'
        cells.append(Markup(form).format(exact, text, name))
    return _joined(cells)


def samples_block(
    samples: Sequence[PageSample], *, identifier: str = "pairs", searchable: bool = True, note: str = ""
) -> Markup:
    """Prompts with their completions side by side, under a box that filters them by any words in them.

    Args:
        samples: in the order in which they are shown.
        identifier: of the list, no two on a page alike.
        searchable: whether the box is there.
        note: stands below the box.
    """
    count = Markup('<span class="quiet found" role="status">{0} of {0}</span>').format(len(samples))
    box = Markup(
        '<p><input type="search" class="filter" placeholder="filter the samples" aria-label="filter the samples" '
        'aria-controls="{}" hidden> {}</p>\n'
    ).format(identifier, count)
    return Markup('<div class="samples">\n{}{}<div id="{}">\n{}</div>\n</div>\n').format(
        box if searchable else _EMPTY,
        text_block(note, quiet=True),
        identifier,
        _joined(_sample(sample) for sample in samples),
    )


def _sample(sample: PageSample) -> Markup:
    marked = range(1, len(sample.sides)) if sample.marked is None else sample.marked
    sides = _joined(
        Markup('<div{}><p class="quiet">{}</p><p class="text" dir="auto">{}</p></div>\n').format(
            _class("side", "after" if place in marked else ""),
            Markup(", ").join(part for part in (label, score) if part),
            text,
        )
        for place, (label, text, score) in enumerate(sample.sides)
    )
    label = Markup('<p class="quiet">{}</p>\n').format(sample.label) if sample.label else _EMPTY
    prompt = Markup('<p class="text prompt" dir="auto">{}</p>\n').format(sample.prompt) if sample.prompt else _EMPTY
    return Markup('<div class="pair">{}{}<div class="sides">\n{}</div></div>\n').format(label, prompt, sides)


def _class(*names: str) -> Markup:
    """The attribute with the names that are not empty, or nothing."""
    given = " ".join(name for name in names if name)
    return Markup(' class="{}"').format(given) if given else _EMPTY


def _joined(parts: Iterable[Markup]) -> Markup:
    return _EMPTY.join(parts)
