"""Reports as a browser shows them: no error, nothing fetched, nothing cut, on a phone as on a desktop."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.test_reward_model_report import write_run as write_judge

from browser import DESKTOP, PHONE, chromium, visit
from tropism.evaluation.pages import PageSection, table_block, write_page
from tropism.evaluation.report import write_report

KINDS = ["finished", "in-progress", "without-evaluation", "reward-model"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Callable[[str], Path]:
    """The report of a run of a kind."""
    folders = tmp_path_factory.mktemp("runs")

    @cache
    def written(kind: str) -> Path:
        folder: Path = folders / kind
        if kind == "reward-model":
            return write_report(write_judge(folder, best=8))
        write_run(folder)
        for path in sorted((folder / "evaluations").iterdir())[1:] if kind == "in-progress" else []:
            path.unlink()
        if kind == "without-evaluation":
            shutil.rmtree(folder / "evaluations")
        return write_report(folder)

    return written


@pytest.mark.parametrize("kind", KINDS)
def test_reports_fit_phones_and_desktops(kind: str, report: Callable[[str], Path], browser: Any) -> None:
    path = report(kind)
    for width in (PHONE, DESKTOP):
        with visit(browser, path, width=width) as opened:
            opened.page.locator("summary").click()  # the other metrics too
            assert not opened.is_too_wide()
            assert opened.overlaps() == []
            assert opened.errors == []
            assert opened.requests == [path.as_uri()]


@pytest.mark.parametrize(
    ("kind", "charts", "tables", "pairs"),
    [
        # Reward, KL, frontier, 2 terms, entropy, length, throughput; distributions of reward, length and 2 terms.
        ("finished", 8 + 4, 3, 3 + 24),
        ("in-progress", 7, 3, 0),
        ("without-evaluation", 5, 2, 0),
        # Loss, accuracy, two calibrations; numbers and the model; three right and three wrong comparisons.
        ("reward-model", 4, 2, 6),
    ],
)
def test_charts_tables_and_samples_are_there(
    kind: str, charts: int, tables: int, pairs: int, report: Callable[[str], Path], browser: Any
) -> None:
    path = report(kind)
    with visit(browser, path) as opened:
        assert (opened.count("svg.chart"), opened.count("table"), opened.count(".pair")) == (charts, tables, pairs)
        for curve in opened.page.locator(".charts:not(.small) .curve").all():
            assert curve.evaluate("one => getComputedStyle(one).stroke") not in ("none", "rgb(0, 0, 0)")
    drawn = sorted(one.name for one in (path.parent / "plots").glob("[!.]*"))
    assert len(drawn) == charts and all(re.fullmatch(r"[a-z0-9-]+\.png", name) for name in drawn)


def test_the_search_filters_the_samples(report: Callable[[str], Path], browser: Any) -> None:
    with visit(browser, report("finished")) as opened:
        box = opened.page.locator("#pairs input")
        box.fill("FILM NUMBER 17 ")
        assert opened.count("#list-of-pairs .pair") == 1
        assert opened.page.locator("#pairs .found").inner_text() == "1 of 24"
        assert opened.count("#featured .pair") == 3  # which the box does not filter
        box.fill("no such words")
        assert opened.count("#list-of-pairs .pair") == 0
        box.fill("")
        assert opened.count("#list-of-pairs .pair") == 24


def test_links_of_the_contents_lead_to_their_sections(report: Callable[[str], Path], browser: Any) -> None:
    with visit(browser, report("finished")) as opened:
        links = opened.page.locator(".contents a").all()
        assert len(links) == opened.page.locator("section").count() >= 8
        links[-1].click()
        assert opened.page.url.endswith("#pairs")
        assert opened.page.locator("#pairs h2").evaluate("one => one.getBoundingClientRect().top") < 100


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_click_on_a_header_sorts(width: int, tmp_path: Path, browser: Any) -> None:
    """Text by its letters, numbers by their size, empty cells last; with the keyboard too."""
    rows: list[list[str | float]] = [
        ["ppo", "0.67 [0.61, 0.72]", 9.0, "12 %"],
        ["GRPO", "-1.5", 1234.5678, "3 %"],
        ["sft", "+10.2", float("nan"), ""],
        ["best", "2", -0.25, "100 %"],
    ]
    section = PageSection(title="t", body=table_block(["method", "reward", "seconds", "share"], rows))
    path = write_page(tmp_path / "p.html", title="t", sections=[section])
    with visit(browser, path, width=width) as opened:
        headers = opened.page.locator("thead th")
        buttons = opened.page.locator("thead button")
        assert opened.column(0, 0) == ["ppo", "GRPO", "sft", "best"]
        buttons.nth(0).click()
        assert opened.column(0, 0) == ["best", "GRPO", "ppo", "sft"]
        buttons.nth(1).click()
        assert opened.column(0, 0) == ["GRPO", "ppo", "best", "sft"]
        assert headers.nth(1).get_attribute("aria-sort") == "ascending"
        assert headers.nth(0).get_attribute("aria-sort") is None
        buttons.nth(2).focus()
        opened.page.keyboard.press("Enter")
        assert opened.column(0, 2) == ["-0.25", "9", "1,235", ""]
        opened.page.keyboard.press("Space")
        assert opened.column(0, 2) == ["1,235", "9", "-0.25", ""]
        assert headers.nth(2).get_attribute("aria-sort") == "descending"
        buttons.nth(3).click()
        assert opened.column(0, 3) == ["3 %", "12 %", "100 %", ""]


def test_dark_pages_for_those_who_ask(report: Callable[[str], Path], browser: Any) -> None:
    path = report("finished")
    found = {}
    for scheme in ("light", "dark"):
        with visit(browser, path, scheme=scheme) as opened:
            for part, name in (("body", "backgroundColor"), ("body", "color"), (".card", "backgroundColor")):
                text = opened.page.locator(part).first.evaluate(f"one => getComputedStyle(one).{name}")
                found[scheme, part, name] = sum(map(int, re.findall(r"\d+", text)[:3])) / 3
    for part in ("body", ".card"):
        assert found["dark", part, "backgroundColor"] < 50 < 240 < found["light", part, "backgroundColor"]
    assert found["dark", "body", "color"] > 200 > 60 > found["light", "body", "color"]


def test_long_words_and_hostile_names_fit_a_phone(report: Callable[[str], Path], browser: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(report("without-evaluation").parent, tmp_path / "run"))
    (folder / "environment.json").write_text('{"' + "x" * 500 + '": "' + "y" * 500 + '", "a": {"b": [1, 2]}}')
    (folder / "warnings.jsonl").write_text('{"step": 1, "message": "' + "<script>alert(1)</script>" * 40 + '"}\n')
    path = write_report(folder)
    for width in (PHONE, DESKTOP):
        with visit(browser, path, width=width) as opened:
            assert not opened.is_too_wide()
            assert opened.errors == []
            assert opened.page.locator("#environment td").last.inner_text() == "b 1, 2"
