from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from tropism.errors import StorageError
from tropism.evaluation import chart_colours
from tropism.evaluation.pages import (
    PageCard,
    PageSample,
    PageSection,
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
    write_page,
)

HOSTILE = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='alert(1)' x=\"\udc80"
SVG = '<svg viewBox="0 0 1 1"><title>t</title></svg>'


class Page(HTMLParser):
    """Elements, texts of the two inline elements, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inline = {"script": "", "style": ""}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inline:
            self.inline[self.open[-1]] += data


def every_block(text: str) -> list[Markup]:
    """Each kind of block, with the same text wherever there is one."""
    return [
        text_block(text),
        list_block([text]),
        list_block([text], kind="cautions"),
        code_block(text),
        details_block(text, text_block(text)),
        chips_block([(text, text)]),
        cards_block([PageCard(title=text, value=text, before=text, unit=text, lines=[text], notes=[text])]),
        charts_block([chart_block(text, SVG, legend=[(text, text), ("c9", text)])]),
        table_block([text, text, text], [[text, 1.0, text]], note=text, caption=text),
        samples_block([PageSample(prompt=text, sides=[(text, text, text)], label=text)], identifier=text, note=text),
    ]


def write(path: Path, text: str = "plain") -> Page:
    sections = [PageSection(title=text, body=block, anchor=text) for block in every_block(text)]
    write_page(path, title=text, sections=sections, lead=text_block(text), counters=[(text, text)])
    return Page(path.read_text(encoding="utf-8"))


def test_one_file_that_fetches_and_runs_nothing_foreign(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html")
    for _, attributes in page.elements:
        assert not {"src", "style", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_policy_allows_the_own_style_and_script_alone(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html")
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = {
        name: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for name, text in page.inline.items()
    }
    assert rules["default-src"] == "'none'"
    assert (rules["script-src"], rules["style-src"]) == (hashes["script"], hashes["style"])


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    plain, page = write(tmp_path / "plain.html"), write(tmp_path / "hostile.html", HOSTILE)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    names = [sorted(attributes) for _, attributes in page.elements]
    assert names == [sorted(attributes) for _, attributes in plain.elements]
    assert page.inline == plain.inline


@pytest.mark.parametrize(("count", "links"), [(3, 0), (4, 4), (7, 7)])
def test_contents_from_four_sections_on(tmp_path: Path, count: int, links: int) -> None:
    sections = [PageSection(title="Same title", body=text_block("a")) for _ in range(count)]
    page = Page(write_page(tmp_path / "p.html", title="t", sections=sections).read_text())
    targets = [a["href"] for tag, a in page.elements if tag == "a"]
    anchors = [f"#{a['id']}" for tag, a in page.elements if tag == "section"]
    assert len(targets) == links and len(set(anchors)) == count
    assert targets == anchors[:links]


def test_pictures_lie_beside_the_page(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", title="t", sections=[], pictures={"reward.png": b"\x89PNG"})
    assert (tmp_path / "plots" / "reward.png").read_bytes() == b"\x89PNG"


def test_pictures_that_a_page_no_longer_has_go(tmp_path: Path) -> None:
    """Only those that this page has written: neither those of other pages nor what a user has put there."""
    png, plots = b"\x89PNG", tmp_path / "plots"
    write_page(tmp_path / "p.html", title="t", sections=[], pictures={"old.png": png, "both.png": png, "new.png": png})
    write_page(tmp_path / "q.html", title="t", sections=[], pictures={"both.png": png})
    (plots / "mine.png").write_bytes(png)
    (tmp_path / "outside.png").write_bytes(png)
    listed = plots / ".p-pictures.json"
    listed.write_text(json.dumps([*json.loads(listed.read_text()), "../outside.png", ".hidden", 3]))
    write_page(tmp_path / "p.html", title="t", sections=[], pictures={"new.png": png})
    assert {one.name for one in plots.glob("[!.]*")} == {"both.png", "mine.png", "new.png"}
    assert (tmp_path / "outside.png").exists()
    write_page(tmp_path / "p.html", title="t", sections=[])
    assert {one.name for one in plots.glob("[!.]*")} == {"both.png", "mine.png"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/p\.html cannot be written"):
        write_page(tmp_path / "nowhere" / "p.html", title="t", sections=[])


def test_cells_keep_their_exact_numbers() -> None:
    table = table_block(["name", "reward", "note"], [["a", 0.123456, "x"], ["b", float("nan"), Markup("<b>y</b>")]])
    assert '<th scope="row">a</th><td data-name="reward" data-value="0.123456">0.1235</td>' in table
    assert '<td data-name="reward"></td><td data-name="note"><b>y</b></td>' in table
    assert 'class="wide"' in table and 'class="wide"' not in table_block(["a", "b"], [["c", 1.0]])
    assert ">12,346</td>" in table_block(["a", "b"], [["c", 12345.6]])
    assert ">-0.25</td>" in table_block(["a", "b"], [["c", -0.25]])
    with pytest.raises(ValueError, match="row 1 of the table has 1 cells where the header names 2"):
        table_block(["a", "b"], [["c", 1.0], ["d"]])


def test_paragraphs_and_empty_lists() -> None:
    assert text_block("one\ntwo\n\nthree & four").count("<p>") == 2
    assert "three &amp; four" in text_block("three & four")
    assert list_block([]) == ""


def test_what_came_after_training_is_marked() -> None:
    sides = [("before", "a", "0.1"), ("after", "b", Markup("<b>0.2</b>")), ("at 0.7", "c", "")]
    block = samples_block([PageSample(prompt="p", sides=sides)], searchable=False)
    assert re.findall(r'<div class="(side[^"]*)"><p class="quiet">([^<]*)', block) == [
        ("side", "before, 0.1"), ("side after", "after, "), ("side after", "at 0.7"),
    ]  # fmt: skip
    assert "after, <b>0.2</b>" in block and "<input" not in block
    chosen = samples_block([PageSample(prompt="", sides=sides, marked=[0])])
    assert chosen.count("side after") == 1 and 'class="filter"' in chosen and "1 of 1" in chosen


# Colours --------------------------------------------------------------------------------------------------------------


SIGHT = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
"""What is seen of linear red, green and blue: Machado, Oliveira and Fernandes 2009, severity 1."""


def linear(colour: str) -> np.ndarray:
    """[3] linear red, green and blue of a colour in sRGB."""
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    """Relative luminance, https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    return float(linear(colour) @ (0.2126, 0.7152, 0.0722))


def cielab(rgb: np.ndarray) -> np.ndarray:
    """[3] CIELAB under D65 of linear red, green and blue."""
    to_xyz = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
    xyz = np.array(to_xyz) @ rgb.clip(0, 1) / (0.95047, 1, 1.08883)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("colours", [chart_colours.LIGHT, chart_colours.DARK], ids=["light", "dark"])
def test_colours_differ_for_every_sight(sight: str, colours: tuple[str, ...]) -> None:
    seen = [cielab(np.array(SIGHT[sight]) @ linear(colour)) for colour in colours]
    assert min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(seen, 2)) > 20


@pytest.mark.parametrize(("colours", "card"), [(chart_colours.LIGHT, "#ffffff"), (chart_colours.DARK, "#1d2127")])
def test_colours_of_series_stand_out_from_the_page(colours: tuple[str, ...], card: str) -> None:
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(card)))
        assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2.1, 1.4.11


def test_the_style_sheet_has_the_colours(tmp_path: Path) -> None:
    style = write(tmp_path / "p.html").inline["style"]
    for colours in (chart_colours.LIGHT, chart_colours.DARK):
        for number, colour in enumerate(colours):
            assert f"--c{number}: {colour};" in style


def test_sixteen_series_look_different() -> None:
    looks = {(chart_colours.colour_classes(number), chart_colours.marker(number)) for number in range(16)}
    assert len(looks) == 16
    assert len({chart_colours.marker(number) for number in range(8)}) == 8
    for number in range(8):
        assert chart_colours.marker(number) != chart_colours.marker(number + 8)


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, tropism.evaluation.pages; "
        "print([m for m in ('matplotlib', 'jinja2', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
