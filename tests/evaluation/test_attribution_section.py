"""Heat maps on a page: shades, signs that are not colours alone, and text that is markup."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tropism.evaluation.attribution_files import AttributedSample, Attribution, read_samples, write_samples
from tropism.evaluation.attribution_section import attribution_section, heat_block, level_of
from tropism.evaluation.run_folder import RunData


def made(scores: tuple[float, ...] = (1.0, -0.5, math.nan), **fields: object) -> Attribution:
    given: dict[str, object] = {
        "of": "reward",
        "what": "reward x",
        "method": "occlusion",
        "pieces": ("a", " <i>", " c"),
        "parts": ("prompt", "completion", "completion"),
        "scores": scores,
        "value": 0.25,
        "unit": "reward",
    }
    return Attribution(**given | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "level"),
    [(1.0, "p5"), (0.99, "p5"), (0.5, "p3"), (0.11, "p1"), (0.09, ""), (0.0, ""), (-0.3, "n2"), (math.nan, "")],
)
def test_shades(score: float, level: str) -> None:
    assert level_of(score, 1.0) == level
    assert level_of(score, 0.0) == ""


def test_a_map() -> None:
    one = made()
    block = str(heat_block(one.pieces, one.scores, parts=one.parts))
    assert '<b class="p5" title="+1">a</b>' in block
    assert '<span class="quiet">|</span> <b class="n3" title="-0.5"> &lt;i&gt;</b>' in block
    assert '<b title="unscored"> c?</b>' in block


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    whole = made((1.0, -0.5, 0.0), baseline=0.5, gap=0.0, rows=("t",), matrix=((0.5, 0.25, -1.0),))
    sample = AttributedSample(label="Best", step=3, prompt="a", completion=" <i> c", reward=0.25, maps=(whole,))
    write_samples(tmp_path, [sample, sample])
    assert read_samples(tmp_path) == [sample, sample]
    write_samples(tmp_path, [sample])
    assert read_samples(tmp_path) == [sample]


def test_the_section(tmp_path: Path) -> None:
    assert attribution_section(RunData(folder=tmp_path)) == []
    one = made((1.0, -0.5, 0.0), baseline=-1.75, gap=0.5, rows=("t",), matrix=((0.5, 0.25, -1.0),))
    sample = AttributedSample(label="Best", step=3, prompt="a<", completion=" c", reward=math.nan, maps=(one, made()))
    write_samples(tmp_path, [sample])
    (section,) = attribution_section(RunData(folder=tmp_path))
    body = str(section.body)
    assert "Best: step 3, reward unscored" in body and "a&lt;" in body
    assert "add up to 2" in body and "miss it by 0.5" in body
    assert "for each token of the completion" in body and body.count("all scores") == 2
