"""Self-contained pages: one frame, one style sheet and one script for every report.

A page loads nothing, and its content security policy allows only the style sheet and script that are written into it,
so that a completion holding markup can neither run nor fetch anything even if an escape were missed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from tropism.evaluation.charts import file_stem
from tropism.evaluation.page_blocks import (
    PageCard,
    PageSample,
    cards_block,
    chart_block,
    charts_block,
    chips_block,
    code_block,
    details_block,
    list_block,
    samples_block,
    table_block,
    text_block,
)
from tropism.evaluation.result_files import write_files
from tropism.storage import writing

__all__ = [
    "PageCard",
    "PageSample",
    "PageSection",
    "cards_block",
    "chart_block",
    "charts_block",
    "chips_block",
    "code_block",
    "details_block",
    "list_block",
    "page_html",
    "samples_block",
    "table_block",
    "text_block",
    "write_page",
]

TEMPLATES = Path(__file__).parent / "templates"
CONTENTS_FROM = 4
"""Sections from which on a page begins with a list of them."""
PICTURES = "plots"
"""The folder beside a page in which its pictures lie."""
LISTED = "-pictures.json"
"""Ends the name of the hidden file among the pictures that lists those of a page."""
NOTHING = Markup("")


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """One part of a page, under its heading."""

    title: str
    body: Markup
    """Made by the functions for blocks, so already escaped."""
    anchor: str = ""
    """What a link to the section ends with; derived from the title where empty."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Its charts once more as PNG files, by name (``charts.pictures`` makes them)."""


def write_page(
    path: str | Path,
    *,
    title: str,
    sections: Sequence[PageSection],
    lead: Markup = NOTHING,
    counters: Sequence[tuple[str, str]] = (),
    pictures: Mapping[str, bytes] | None = None,
) -> Path:
    """Write one self-contained page, over an older one.

    Args:
        path: the page, ``.../report.html``; its folder must exist.
        title: the heading of the page.
        sections: what stands on it, in order; from 4 on there is a list of contents.
        lead: what stands above the first section.
        counters: names and values that stand in one line below the heading.
        pictures: PNG files by name, which are written to ``plots/`` beside the page with those of the sections.

    Returns:
        ``path``.

    Raises:
        StorageError: the page or a picture cannot be written; an older page is as it was.
    """
    path = Path(path)
    page = page_html(title=title, sections=sections, lead=lead, counters=counters).encode("utf-8", errors="replace")
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}.html")
    with writing(path, needed=len(page)):
        try:
            unfinished.write_bytes(page)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    files = {name: content for section in sections for name, content in section.pictures.items()}
    _write_pictures(path, {**files, **(pictures or {})})
    return path


def _write_pictures(page: Path, pictures: Mapping[str, bytes]) -> None:
    """The pictures of a page beside it; those of an earlier one that it lacks go, and no other file does."""
    folder = page.parent / PICTURES
    known = folder / f".{page.stem}{LISTED}"
    earlier = _listed(known)
    if not pictures and not earlier:
        return
    write_files(folder, {**pictures, known.name: json.dumps(sorted(pictures), indent=1).encode()})
    others = {name for one in folder.glob(f".*{LISTED}") if one != known for name in _listed(one)}
    with writing(folder):
        for name in earlier - others - pictures.keys():
            (folder / name).unlink(missing_ok=True)


def _listed(file: Path) -> set[str]:
    """The pictures that a list names; none where there is no list. Names that lead elsewhere are left out."""
    try:
        names = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    plain = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return {name for name in plain if re.fullmatch(r"[\w@=.-]+\.png", name, re.ASCII) and not name.startswith(".")}


def page_html(
    *,
    title: str,
    sections: Sequence[PageSection],
    lead: Markup = NOTHING,
    counters: Sequence[tuple[str, str]] = (),
) -> str:
    """The text of the page that ``write_page`` writes; half of a surrogate pair may be in it."""
    import jinja2  # here, so that importing the package stays fast

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js.j2"))
    anchored = list(zip(_anchors(sections), sections, strict=True))
    return environment.get_template("page.html.j2").render(
        title=title,
        counters=counters,
        lead=lead,
        sections=anchored,
        contents=anchored if len(anchored) >= CONTENTS_FROM else [],
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _anchors(sections: Sequence[PageSection]) -> list[str]:
    """One per section, letters, digits and hyphens, no two alike."""
    anchors: list[str] = []
    for section in sections:
        wanted = file_stem(section.anchor or section.title)
        anchor, number = wanted, 2
        while anchor in anchors:
            anchor, number = f"{wanted}-{number}", number + 1
        anchors.append(anchor)
    return anchors


def _hash(text: str) -> str:
    """The source expression by which a content security policy allows one inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
