"""The pages: what stands on them, what is closed until it is asked for, and text that is no markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tropism.toxicity.files import write_comparison, write_summary
from tropism.toxicity.result import ToxicityResult, compare_toxicity

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)>"


def result_of(scores: list[list[float]], toxicity: list[float], **changes: Any) -> ToxicityResult:
    """A measurement with the given scores; the first response is hostile."""
    n, k = len(scores), len(scores[0])
    result = ToxicityResult(
        prompts=tuple(f"prompt {number} {HOSTILE}" for number in range(n)),
        responses=(HOSTILE, *(f"response {number}" for number in range(1, n * k))),
        finish_reasons=("eos",) * (n * k),
        toxicity=np.array(toxicity),
        scores={"judge": np.array(scores)},
        prompt_scores={"judge": np.array(toxicity)},
        thresholds={"judge": 0.5},
        settings={"model": f"model {HOSTILE}", "samples_per_prompt": k},
        identity=dict.fromkeys(("model", "prompts", "scorers", "settings"), "same"),
    )
    return replace(result, **changes)


@pytest.fixture
def result() -> ToxicityResult:
    return result_of([[0.9, 0.1], [0.2, 0.3], [0.6, 0.4], [0.1, 0.1]], [0.8, 0.2, 0.6, 0.1])


def test_the_page_of_a_measurement(result: ToxicityResult, tmp_path: Path) -> None:
    write_summary(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "<img" not in page and "&lt;img src=x" in page
    assert "0.50 [" in page  # two of four prompts have a toxic completion
    assert page.count("<svg") >= 2 and "non-toxic prompts" in page
    before, _, behind = page.partition("<details>")
    assert "response 1" not in before and "response 1" in behind and "<details open" not in page
    assert {path.suffix for path in (tmp_path / "plots").glob("[!.]*")} == {".png"}


def test_the_page_of_a_comparison(result: ToxicityResult, tmp_path: Path) -> None:
    tuned = replace(result, scores={"judge": result.scores["judge"] / 2})
    write_comparison(compare_toxicity(result, tuned), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "became less toxic" in page and "became more toxic" not in page
    # By hand: every mean is halved, and the mean over prompts was (0.5 + 0.25 + 0.5 + 0.1) / 4 = 0.3375.
    assert "0.338" in page and "0.169" in page and "-0.169" in page


def test_what_changed_most_shows_what_it_is_ranked_by(result: ToxicityResult, tmp_path: Path) -> None:
    """The highest-scored completion of each side, with the mean, and not the first one."""
    base = result_of([[0.1, 0.2, 0.3]] * 4, [0.1] * 4)
    scores = np.array([[0.1, 0.2, 0.9], *[[0.1, 0.2, 0.3]] * 3])
    tuned = replace(base, scores={"judge": scores}, responses=tuple(f"tuned {number}" for number in range(12)))
    write_comparison(compare_toxicity(base, tuned), tmp_path)
    page = (tmp_path / "report.html").read_text()
    changed = page[page.index("became more toxic") :]
    assert "by the mean of 3 completions, with the highest-scored of each model" in page
    assert "response 2" in changed and "judge 0.300, mean 0.200" in changed  # by hand
    assert "tuned 2" in changed and "judge 0.900, mean 0.400" in changed
    assert "tuned 0" not in changed


def test_cautions_say_what_the_numbers_cannot(result: ToxicityResult) -> None:
    calm = replace(result, scores={"judge": np.full((4, 2), 0.1)})
    notes = " ".join(calm.cautions)
    assert "Only 4 prompts" in notes and "Only 2 toxic prompts" in notes
    assert "No response reached the threshold of judge" in notes and "0.75" in notes  # 3 / 4
    many = result_of([[0.9, 0.2]] * 100, [0.9, 0.1] * 50, responses=("text",) * 200)
    assert many.cautions == []
    one = result_of([[0.9]] * 100, [0.9, 0.1] * 50, responses=("",) * 50 + ("text",) * 50)
    assert len(one.cautions) == 2 and "single try" in one.cautions[0] and "50 of 100 responses" in one.cautions[1]
