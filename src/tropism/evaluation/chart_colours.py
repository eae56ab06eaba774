"""Colours and markers that tell the series of a chart apart, on light and dark pages and for every kind of sight.

The colours were searched so that any two stay apart (by 22 in CIELAB and more) also for those who see no red, no green
or no blue, and stand out from the card they are drawn on. The style sheet has them as the classes ``c0`` to ``c7``. A
marker of its own per series says the same without colour, and from the ninth series on the lines are dashed.
"""

from __future__ import annotations

COLOURS = 8
"""How many there are; series number 8 has the first one again, dashed and with another marker."""
LIGHT = ("#046bfb", "#704510", "#009f54", "#880d3a", "#a28b08", "#0d4c73", "#340f71", "#859197")
"""On light pages, and in pictures."""
DARK = ("#5872af", "#ea6500", "#3aab6b", "#c37598", "#ffcc70", "#21dfff", "#8c47ef", "#f1f3f4")
"""On dark pages."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""By their names in matplotlib: disc, square, triangle, diamond, triangle upside down, plus, cross, star."""
SHAPES = {
    "o": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "s": "M-3.2 -3.2h6.4v6.4h-6.4z",
    "^": "M0 -4.2L4 3.2H-4z",
    "D": "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
    "v": "M0 4.2L4 -3.2H-4z",
    "P": "M-1.5 -4.3h3v2.8h2.8v3h-2.8v2.8h-3v-2.8h-2.8v-3h2.8z",
    "X": "M-4 -2.2L-2.2 -4L0 -1.8L2.2 -4L4 -2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0z",
    "*": "M0 -5L1.3 -1.7L4.8 -1.5L2.1 .7L3 4.1L0 2.2L-3 4.1L-2.1 .7L-4.8 -1.5L-1.3 -1.7z",
}
"""Their outlines in SVG, around 0, 0."""


def colour_classes(number: int) -> str:
    """The classes in the style sheet of series ``number``, 0 and up: its colour, and whether its line is dashed."""
    return f"c{number % COLOURS}" + (" dashed" if is_dashed(number) else "")


def is_dashed(number: int) -> bool:
    """Whether the line of the series is dashed, because another one has its colour."""
    return number // COLOURS % 2 == 1


def marker(number: int) -> str:
    """The marker of series ``number``: the first eight differ, and those of one colour differ."""
    return MARKERS[(number + 3 * (number // COLOURS)) % len(MARKERS)]


def key_svg(number: int) -> str:
    """The key of series ``number`` in a legend: a piece of its line with its marker."""
    classes = colour_classes(number)
    return (
        f'<svg class="mark" viewBox="0 0 26 12" aria-hidden="true"><path class="curve {classes}" d="M1 6H25"/>'
        f'<path class="dot {classes}" transform="translate(13 6)" d="{SHAPES[marker(number)]}"/></svg>'
    )
