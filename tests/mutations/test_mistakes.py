from __future__ import annotations

from pathlib import Path

import pytest

import tropism
from mutations.mistakes import MISTAKES, Mistake

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_can_still_be_made(mistake: Mistake) -> None:
    """Its text stands in the source exactly once, and its tests exist; ``make mutants`` runs them."""
    source = (Path(tropism.__file__).parent / mistake.file).read_text(encoding="utf-8")
    assert source.count(mistake.right) == 1
    assert mistake.wrong != mistake.right
    assert mistake.tests and all((TESTS / path).exists() for path in mistake.tests)


def test_every_mistake_has_its_own_name() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
