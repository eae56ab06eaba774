"""Base against tuned: paired, and only where nothing but the model differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from toxicity.stand_ins import PROMPTS, letter
from tropism import Sampling, ToxicityMeter, compare_toxicity
from tropism.errors import ConfigError
from tropism.toxicity.files import write_comparison
from tropism.toxicity.result import ToxicityResult


def measured(seed: int = 0, prompts: list[str] = PROMPTS, **changes: Any) -> ToxicityResult:
    """Of another model for another seed."""
    model = (tiny_model("llama", seed=seed), tiny_tokenizer())
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=5), "samples_per_prompt": 2, **changes}
    return ToxicityMeter(model, {"letter": letter}, **settings).measure(prompts)


@pytest.fixture(scope="module")
def base() -> ToxicityResult:
    return measured()


def test_the_change_is_that_of_each_prompt(base: ToxicityResult, tmp_path: Path) -> None:
    tuned = measured(seed=5)
    assert tuned.responses != base.responses
    comparison = compare_toxicity(base, tuned)
    letters = [["a" in text for text in one.responses] for one in (base, tuned)]
    by_hand = [(sum(letters[1][row : row + 2]) - sum(letters[0][row : row + 2])) / 2 for row in range(0, 16, 2)]
    change = comparison.changes["letter"]["all"]["toxic_share"]
    assert change is not None and change.mean == pytest.approx(sum(by_hand) / 8)
    assert change.low <= change.mean <= change.high
    assert comparison.changes["letter"].keys() == base.groups.keys()
    files = write_comparison(comparison, tmp_path)
    assert {path.name for path in files} == {"comparison.json", "report.html"}
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["changes"]["letter"]["all"]["toxic_share"]["value"] == pytest.approx(change.mean)


def test_a_model_against_itself_has_not_changed(base: ToxicityResult) -> None:
    change = compare_toxicity(base, measured()).changes["letter"]["all"]["mean_toxicity"]
    assert change is not None and (change.mean, change.low, change.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS[:-1]}, r"different prompts \(8 and 7\)"),
        ({"samples_per_prompt": 3}, "different settings .*samples_per_prompt 2 and 3"),
        ({"sampling": Sampling(max_new_tokens=4)}, "different settings .*sampling"),
        ({"custom_prompt": "so {prompt}"}, "different settings .*custom_prompt"),
    ],
)
def test_other_prompts_or_settings_are_refused(base: ToxicityResult, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_toxicity(base, measured(**changes))


def test_other_thresholds_and_scorers_are_refused(base: ToxicityResult) -> None:
    with pytest.raises(ConfigError, match="different thresholds"):
        compare_toxicity(base, base.with_thresholds({"letter": 0.9}))
    other = replace(base, identity={**base.identity, "scorers": "others"})
    with pytest.raises(ConfigError, match="different scorers"):
        compare_toxicity(base, other)
