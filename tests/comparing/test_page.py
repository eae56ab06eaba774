from __future__ import annotations

from pathlib import Path

import pytest

from comparing.made_up import write_cell, write_comparison, write_plan
from tropism.comparing.results import Comparison

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with everything in it, and its page."""
    folder = write_comparison(
        tmp_path_factory.mktemp("page") / "compare-toy", {"base": 0.1, "sft": 0.15, "ppo": 0.4}, prompts=21
    )
    write_cell(folder, "rft", 0, failure="the loss was not finite")
    Comparison.read(folder).write()
    return folder


def page_of(folder: Path) -> str:
    return Comparison.read(folder).write()[-1].read_text()


def test_what_the_page_shows(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    for wanted in (
        "<h1>Comparison toy</h1>",
        "ppo has the highest held-out reward",
        "Better than sft beyond chance: ppo",
        "How sure",
        "Held-out reward against KL to the base",
        "Held-out reward over training",
        "best of n of the base",
        "rft with seed 0 failed and is left out: the loss was not finite",
        "prompt 20",
        "filter the samples",
        "seeds:",
    ):
        assert wanted in text
    assert text.count('class="pair"') == 21
    assert text.count("<figure>") == 4


def test_the_charts_lie_beside_it(folder: Path) -> None:
    names = {path.name for path in (folder / "plots").glob("[!.]*")}
    assert names == {"frontier.png", "rewards.png", "reward-over-training.png", "distributions.png"}


def test_the_same_results_give_the_same_files(folder: Path) -> None:
    first = (folder / "report.html").read_text()
    pictures = {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}
    assert page_of(folder) == first
    assert {path.name: path.read_bytes() for path in (folder / "plots").iterdir()} == pictures


def test_nothing_in_texts_is_markup(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    prompts = [f"{index // 2} {HOSTILE}" for index in range(12)]
    columns = {"completion": [HOSTILE] * 12, "prompt": prompts}
    write_cell(
        folder, "sft", 0, columns=columns, settings={"target": HOSTILE}, choices=[{"target": HOSTILE, "reward": 0.5}]
    )
    write_cell(folder, "base", 0, columns={"prompt": prompts}, failure=None)
    (folder / "notes.json").write_text('["<b>bold</b>"]')
    text = page_of(folder)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text


def test_a_comparison_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    text = page_of(write_plan(tmp_path / "compare-a", ["sft"], [0]))
    assert "No method is finished yet" in text
    assert "2 cells are not there yet: base-seed0, sft-seed0." in text


def test_one_unscored_cell_has_a_page(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    write_cell(folder, "sft", 0, [[float("nan")] * 2] * 3)
    assert "6 of 6 completions of sft got no reward" in page_of(folder)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors(folder: Path, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = Path("/usr/bin/chromium")
    if not browser.is_file():
        pytest.skip("there is no Chromium at /usr/bin/chromium")
    path = folder / "report.html"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(browser), args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": width, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        assert page.locator("svg.chart").count() == 4
        assert all(page.locator("svg.chart").nth(place).bounding_box()["width"] > 200 for place in range(4))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.fill("input.filter", "prompt 20")
        assert page.locator(".pair:visible").count() == 1
        opened.close()
    assert errors == []
