"""docs/reliability.md: every promise names tests, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def rows(text: str) -> list[list[str]]:
    """Cells of every table row but the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    below = [index + 1 for index, row in enumerate(cells) if set(row[0]) <= set("-: ")]
    return [row for index, row in enumerate(cells) if index not in {i - 1 for i in below} | {i - 2 for i in below}]


def test_every_promise_names_tests_that_exist() -> None:
    table = rows(PAGE.read_text(encoding="utf-8"))
    assert len(table) > 40
    for row in table:
        found = TEST.findall(row[-1])
        assert found, f"no test is named for: {row[0]}"
        for path, name in found:
            file = ROOT / path
            assert file.is_file(), path
            assert not name or re.search(rf"^def {name}\(", file.read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_promise_of_the_specification_has_a_line(shared: Path) -> None:
    promised = {row[0] for row in rows((shared / "spec" / "promises.md").read_text(encoding="utf-8"))}
    kept = {row[0] for row in rows(PAGE.read_text(encoding="utf-8"))}
    assert promised - kept == set()
