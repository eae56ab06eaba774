from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from comparing.made_up import write_cell, write_comparison, write_plan
from tropism.comparing.cautions import cautions, headlines, p_text
from tropism.comparing.results import Comparison
from tropism.comparing.table import as_csv, as_markdown, kl_text, pairs_csv, table_header, table_rows
from tropism.comparing.toxicity import toxicity_of

MEANS = {"base": 0.1, "sft": 0.15, "ppo": 0.4, "conditioned": 0.6}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return Comparison.read(write_comparison(tmp_path / "compare-toy", MEANS))


def read_csv(content: bytes) -> dict[str, dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    return {next(iter(row.values())): row for row in rows}


def test_measures_by_hand(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0, 1])
    columns = {
        "completion": ["red blue", "red blue", "red red", "a b c"],
        "length": [2, 4, 2, 4],
        "finish_reason": ["eos", "length", "eos", "eos"],
        "sequence_kl": [1.0, 2.0, 3.0, 2.0],
        "base_logprob": [-2.0, -4.0, -6.0, -12.0],
    }
    for seed in (0, 1):
        write_cell(folder, "sft", seed, [[0.0, 1.0], [2.0, 3.0]], columns=columns, seconds=10.0 + seed, tokens=500)
    row = Comparison.read(folder).results.row("sft")
    assert row.reward.mean == 1.5
    assert row.kl.mean == 2.0
    assert row.length == 3.0
    assert row.perplexity == pytest.approx(math.exp(24 / 12))
    assert row.eos == 0.75
    assert row.distinct_1 == pytest.approx(5 / 9)  # red blue a b c of 9 words
    assert row.distinct_2 == pytest.approx(4 / 5)  # red blue twice, red red, a b, b c
    assert (row.seconds, row.completions, row.tokens, row.seeds) == (10.5, 100, 500, (0, 1))
    assert row.terms["vader"].mean == 1.5


def test_who_beats_whom(comparison: Comparison) -> None:
    results = comparison.results
    assert [row.name for row in results.rows] == list(MEANS)
    ppo = results.row("ppo")
    assert ppo.to_other is not None
    assert ppo.to_other.significant
    assert ppo.to_base is not None
    assert ppo.to_base.mean.mean == pytest.approx(0.3, abs=0.05)
    assert results.row("sft").to_other is None
    assert [(one.first, one.second) for one in results.pairs] == [
        ("ppo", "sft"),
        ("conditioned", "sft"),
        ("conditioned", "ppo"),
    ]
    assert all(one.significant for one in results.pairs)


def test_prompts_are_paired(comparison: Comparison) -> None:
    """Prompts differ by 0.3, far more than the difference's interval is wide: it is over paired differences."""
    conditioned = comparison.results.row("conditioned")
    assert conditioned.to_other is not None
    width = conditioned.to_other.mean.high - conditioned.to_other.mean.low
    assert width < 0.2 < conditioned.reward.high - conditioned.reward.low


def test_the_text_fits_and_says_what_matters(comparison: Comparison) -> None:
    text = comparison.text()
    assert max(map(len, text.splitlines())) <= 200
    for wanted in (
        "conditioned has the highest held-out reward",
        "Better than sft beyond chance: ppo",
        "beats sft",
        "conditioned - ppo",
        "24 held-out prompts and 3 seeds",
        "k1",
    ):
        assert wanted in text
    assert all(len(row) == len(table_header(comparison.results)) for row in table_rows(comparison.results))


def test_best_of_n_has_a_bound(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["best-of-n", "sft"], [0])
    bound = {
        "kl_estimator": "bound ln n - (n-1)/n",
        "kl_bound": 0.636,
        "completions_per_answer": 4,
        "settings": {"n": 4},
    }
    write_cell(folder, "best-of-n", 0, **bound)
    write_cell(folder, "sft", 0)
    write_cell(folder, "base", 0)
    comparison = Comparison.read(folder)
    rows = {row.name: row for row in comparison.results.rows}
    assert kl_text(rows["best-of-n"]) == "<= 0.64"
    assert kl_text(rows["base"]) == "0"
    assert "0 + 4/answer" in comparison.text()
    assert "k1 (sft)" in comparison.text()
    assert "bound ln n - (n-1)/n (best-of-n)" in comparison.text()


def test_few_seeds_are_said(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-a", {"base": 0.0, "sft": 0.1, "ppo": 0.9}, seeds=(0, 1))
    comparison = Comparison.read(folder)
    assert not any(one.significant for one in comparison.results.pairs)
    assert "no test: 2 of 3 seeds" in comparison.text()
    assert any("fewer than 3 seeds" in caution for caution in cautions(comparison))
    one = Comparison.read(write_comparison(tmp_path / "compare-b", {"base": 0.0, "sft": 0.1}, seeds=(0,)))
    assert any("over prompts alone, and too narrow" in caution for caution in cautions(one))


def test_a_failed_method_loses_nothing_of_the_others(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-a", MEANS)
    write_plan(folder, ["sft", "ppo", "conditioned", "grpo", "rft"], [0, 1, 2])
    write_cell(folder, "grpo", 0, failure="out of memory")
    comparison = Comparison.read(folder)
    assert [row.name for row in comparison.results.rows] == list(MEANS)
    found = cautions(comparison)
    assert "grpo with seed 0 failed and is left out: out of memory" in found
    assert "5 cells are not there yet: grpo-seed1, grpo-seed2, rft-seed0, rft-seed1, rft-seed2." in found


def test_a_baseline_that_failed_is_said(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft", "ppo"], [0])
    write_cell(folder, "sft", 0, failure="no")
    write_cell(folder, "ppo", 0)
    comparison = Comparison.read(folder)
    assert comparison.results.row("ppo").to_other is None
    assert "sft has no finished cell, so nothing is tested against it." in cautions(comparison)


def test_cautions_about_what_was_measured(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft", "ppo"], [0])
    (folder / "notes.json").write_text('["The filters make the KL biased."]')
    write_cell(folder, "base", 0)
    same = {"completion": ["good good good"] * 12, "length": [40] * 12, "sequence_kl": [31.0] * 12}
    write_cell(folder, "ppo", 0, [[math.nan, 1.0]] * 6, columns=same)
    write_cell(folder, "sft", 0, completions=50, columns={"sequence_kl": [-1.0, -1.1] * 6})
    found = "\n".join(cautions(Comparison.read(folder)))
    for wanted in (
        "6 of 12 completions of ppo got no reward",
        "ppo is 31.0 nats from the base model, far from ordinary language",
        "The KL of sft is estimated below 0 (-1.05 nats)",
        "ppo says much the same to every prompt",
        "The length under ppo went from 10 to 40 tokens",
        "Not all spent the whole budget: of 100 completions, sft (50)",
        "There are only 6 held-out prompts",
        "The filters make the KL biased.",
    ):
        assert wanted in found


def test_repeated_prompts_are_said(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    write_cell(folder, "sft", 0, columns={"prompt": ["a", "a", "b", "b", "a", "a", "c", "c", "d", "d", "e", "e"]})
    assert any("1 of 6 held-out prompts are repetitions" in one for one in cautions(Comparison.read(folder)))


def test_the_tables_as_files(comparison: Comparison) -> None:
    rows = read_csv(as_csv(comparison.results))
    assert list(rows) == list(MEANS)
    assert float(rows["ppo"]["reward"]) == comparison.results.row("ppo").reward.mean
    assert rows["ppo"]["to_other_significant"] == "true"
    assert rows["sft"]["to_other_p"] == ""
    pairs = list(csv.DictReader(io.StringIO(pairs_csv(comparison.results.pairs).decode())))
    assert [row["significant"] for row in pairs] == ["true", "true", "true"]
    assert float(pairs[0]["p"]) < float(pairs[0]["p_holm"]) < 0.05
    lines = as_markdown(comparison).splitlines()
    assert {line.count("|") for line in lines[:6]} == {lines[0].count("|")}


def test_everything_is_written(comparison: Comparison) -> None:
    written = {path.name for path in comparison.write()}
    assert written == {"table.csv", "table.md", "pairs.csv", "frontier.csv", "statistics.json", "report.html"}
    statistics = json.loads((comparison.folder / "statistics.json").read_text())
    assert [row["name"] for row in statistics["methods"]] == list(MEANS)
    assert statistics["pairs"][0]["significant"] is True
    assert len(statistics["frontier"]["over_training"]) == 3
    assert statistics["headlines"] == headlines(comparison)


def test_toxicity_by_a_metric_of_the_recipe(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    write_cell(folder, "sft", 0, columns={"metric/toxicity": np.repeat([0.1, 0.3], 6)})
    comparison = Comparison.read(folder)
    row = comparison.results.row("sft")
    assert row.toxicity is not None
    assert row.toxicity.mean == pytest.approx(0.2)
    assert "toxicity: the metric toxicity" in comparison.text()


def test_toxicity_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tropism.rewards import profanity

    def missing() -> None:
        raise profanity.ConfigError("it needs the package alt-profanity-check")

    monkeypatch.setattr(profanity, "_load", missing)
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    write_cell(folder, "sft", 0)
    comparison = Comparison.read(folder)
    assert "alt-profanity-check" in toxicity_of(comparison).reason
    assert "toxicity" not in table_header(comparison.results)
    assert "toxicity is left out" in comparison.text()


def test_toxicity_is_scored_where_the_scorer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions are scored, and prompts are not."""
    from tropism.rewards import profanity

    monkeypatch.setattr(profanity, "_load", lambda: lambda texts: [0.9 if "rude" in text else 0.1 for text in texts])
    folder = write_plan(tmp_path / "compare-a", ["sft"], [0])
    columns = {
        "completion": ["rude"] * 3 + ["kind"] * 9,
        "prompt": np.repeat([f"rude {i}" for i in range(6)], 2).tolist(),
    }
    write_cell(folder, "sft", 0, columns=columns)
    row = Comparison.read(folder).results.row("sft")
    assert row.toxicity is not None
    assert row.toxicity.mean == pytest.approx(0.3)  # (3 * 0.9 + 9 * 0.1) / 12


def test_p_as_text() -> None:
    assert [p_text(p) for p in (0.00001, 0.0213, 0.456, math.nan)] == ["< 0.001", "0.021", "0.46", ""]
