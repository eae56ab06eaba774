"""Heat maps: which pieces of a text drove its log-prob or its reward, in a report and on a page of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from tropism.evaluation.attribution_files import AttributedSample, Attribution, read_samples
from tropism.evaluation.page_blocks import details_block, table_block, text_block
from tropism.evaluation.pages import PageSection, write_page
from tropism.evaluation.run_folder import RunData

LEVELS = 5
"""Shades of either colour."""
MOST_CHARACTERS = 4000
"""Of one completion."""
MOST_ROWS = 60
"""Tokens of a completion that have a row of their own."""
WORDS = {
    "integrated_gradients": "integrated gradients",
    "gradient_x_input": "gradient x input",
    "occlusion": "left out one by one",
}
READING = (
    "A score is how much a piece raises the number (or lowers it, below 0); point at a piece to see it. The shades of "
    "each map are shares of its largest score, so they cannot be compared between maps. Attributions explain a model "
    "roughly and are no proof: see docs/attribution.md."
)


def attribution_section(run: RunData) -> list[PageSection]:
    """The section of a run's report; none where nothing was attributed.

    Raises:
        DataError: a file of ``attribution/`` is damaged.
    """
    samples = read_samples(run.folder)
    if not samples:
        return []
    parts = [text_block(READING, quiet=True), legend_block()]
    for sample in samples:
        title = f"{sample.label}: step {sample.step}, reward {_number(sample.reward)}"
        parts += [Markup("<h3>{}</h3>\n").format(title), _completion(sample), *map(map_block, sample.maps)]
    return [PageSection(title="What drove it", body=Markup("").join(parts), anchor="attribution")]


def write_attribution(path: Path, maps: Sequence[Attribution], *, prompt: str, completion: str) -> Path:
    """A page with the maps of one completion.

    Raises:
        StorageError: it cannot be written.
    """
    texts = table_block(["", "text"], [["prompt", prompt], ["completion", completion[:MOST_CHARACTERS]]])
    body = Markup("").join([text_block(READING, quiet=True), legend_block(), *map(map_block, maps)])
    sections = [PageSection(title="Texts", body=texts), PageSection(title="Heat maps", body=body)]
    return write_page(path, title="What drove it", sections=sections)


def legend_block() -> Markup:
    """What the colours mean."""
    down = "".join(f'<b class="n{level}">{"lowers it" if level == 3 else "&nbsp;"}</b>' for level in range(5, 0, -1))
    up = "".join(f'<b class="p{level}">{"raises it" if level == 3 else "&nbsp;"}</b>' for level in range(1, 6))
    note = "underlined: below 0; ? : without it the reward has no opinion"
    return Markup('<p class="heat-key">{}<b>about 0</b>{} {}</p>\n').format(Markup(down), Markup(up), note)


def map_block(one: Attribution) -> Markup:
    """One heat map, with its numbers in a table that is closed at first."""
    facts = [f"{one.what}: {_number(one.value)} {'nats' if one.unit == 'nats' else ''}".rstrip(), WORDS.get(one.method)]
    if one.baseline is not None:
        facts.append(
            f"{_number(one.baseline)} at the baseline, so the scores add up to {_number(one.value - one.baseline)}"
        )
        if one.gap is not None and one.gap > 0.02 * abs(one.value - one.baseline):
            facts.append(f"but they miss it by {_number(one.gap)}: read them as rough")
    rows: list[list[str | float | Markup]] = [
        [piece, part, score] for piece, part, score in zip(one.pieces, one.parts, one.scores, strict=True)
    ]
    table = details_block("all scores", table_block(["piece", "where", f"score ({one.unit})"], rows))
    return Markup("").join(
        [
            text_block("; ".join(fact for fact in facts if fact), quiet=True),
            heat_block(one.pieces, one.scores, parts=one.parts),
            *(_rows_block(one) if one.matrix is not None and one.rows is not None else ()),
            table,
        ]
    )


def heat_block(pieces: Sequence[str], scores: Sequence[float], *, parts: Sequence[str] = ()) -> Markup:
    """The pieces as one text, each coloured by its score; ``|`` stands between prompt and completion."""
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
    marked = []
    for place, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        if place and parts and parts[place] == "completion" and "completion" not in parts[:place]:
            marked.append(Markup(' <span class="quiet">|</span> '))
        level = level_of(score, largest)
        shown = piece.replace("\n", "\u21b5\n") + ("" if math.isfinite(score) else "?")
        class_of = Markup(' class="{}"').format(level) if level else Markup("")
        marked.append(Markup('<b{} title="{}">{}</b>').format(class_of, _number(score, sign=True), shown))
    return Markup('<p class="heat" dir="auto">{}</p>\n').format(Markup("").join(marked))


def level_of(score: float, largest: float) -> str:
    """``p1`` to ``p5`` above 0, ``n1`` to ``n5`` below, by fifths of the largest score; empty below a tenth of it."""
    if not math.isfinite(score) or largest == 0 or abs(score) < 0.1 * largest:
        return ""
    return f"{'p' if score > 0 else 'n'}{min(LEVELS, 1 + int(LEVELS * abs(score) / largest))}"


def _rows_block(one: Attribution) -> list[Markup]:
    """The map of each token of the completion."""
    assert one.matrix is not None and one.rows is not None
    rows = [
        [row, heat_block(one.pieces, scores)]
        for row, scores in list(zip(one.rows, one.matrix, strict=True))[:MOST_ROWS]
    ]
    return [details_block("for each token of the completion", table_block(["token", "what drove it"], rows))]


def _completion(sample: AttributedSample) -> Markup:
    return Markup('<p class="text" dir="auto"><strong>{}</strong>{}</p>\n').format(
        sample.prompt[-MOST_CHARACTERS:], sample.completion[:MOST_CHARACTERS]
    )


def _number(value: float, *, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "unscored"
    return f"{value:+.3g}" if sign else f"{value:.3g}"
