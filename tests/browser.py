"""Pages in a real browser: what they say about themselves once they are laid out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = 1280, 375

_BOXES = """() => {
  const picked = 'h1, h2, h3, .counters, .contents, .card, figure, .pair, .scroll, .cautions li, pre, .heat';
  const shown = [...document.querySelectorAll(picked)].filter(one => one.checkVisibility());
  const found = [];
  shown.forEach((one, place) => {
    const a = one.getBoundingClientRect();
    shown.slice(place + 1).forEach(other => {
      if (one.contains(other) || other.contains(one)) return;
      const b = other.getBoundingClientRect();
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && tall > 1) found.push(one.textContent.slice(0, 40) + ' | ' + other.textContent.slice(0, 40));
    });
  });
  return found;
}"""

_LABELS = """() => {
  const found = [];
  document.querySelectorAll('svg.chart').forEach(svg => {
    if (!svg.checkVisibility()) return;
    const card = svg.closest('figure').getBoundingClientRect();
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([text, a], place) => {
      if (a.left < card.left || a.right > card.right || a.bottom > card.bottom) found.push('cut: ' + text);
      boxes.slice(place + 1).forEach(([other, b]) => {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && tall > 3) found.push(text + ' | ' + other);
      });
    });
  });
  return found;
}"""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A page that stands open."""

    page: Any
    """Playwright's page."""
    requests: list[str] = field(default_factory=list)
    """Every address that was asked for, the page's own too."""
    errors: list[str] = field(default_factory=list)
    """Errors of the page and of the console, such as what the content security policy refused."""

    def count(self, selector: str) -> int:
        """How many elements there are that can be seen."""
        return sum(1 for one in self.page.locator(selector).all() if one.is_visible())

    def overlaps(self) -> list[str]:
        """Pairs of blocks that lie over each other, and labels of charts that do or that are cut."""
        return [*self.page.evaluate(_BOXES), *self.page.evaluate(_LABELS)]

    def is_too_wide(self) -> bool:
        """Whether the page scrolls sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def column(self, table: int, number: int) -> list[str]:
        """The texts of one column of a table, from the top."""
        cells = f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows].map(row => row.cells[{number}])"
        texts: list[str] = self.page.evaluate(f"{cells}.map(cell => cell.textContent.trim())")
        return texts


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; the test skips where there is none or where playwright is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Any, path: Path, *, width: int = DESKTOP, scheme: str = "light") -> Iterator[Visit]:
    """Open a page of the disk in a window of so many pixels, ``light`` or ``dark``."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = Visit(page=context.new_page())
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.page.on(
        "console", lambda message: opened.errors.append(message.text) if message.type in ("error", "warning") else None
    )
    try:
        opened.page.goto(path.resolve().as_uri())
        yield opened
    finally:
        context.close()
