"""Training on classifier rewards: their sign, and completions with little or nothing in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tiny_classifiers import letter_classifier
from tiny_runs import Setting, assemble, execute, logged
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling

EARLY = dict.fromkeys("abcdefghijklm", 1.0)


def columns_of(run: Path) -> dict[str, list[Any]]:
    """What the rollouts files of a run hold, all steps in one."""
    tables = [pq.read_table(path).to_pydict() for path in sorted((run / "rollouts").glob("step-*.parquet"))]
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def test_pitfall_21_training_on_the_complement_lowers_toxicity(tmp_path: Path) -> None:
    """A reward that is the label itself raises it, so the test sees a wrong sign."""
    toxicity = {}
    for complement in (True, False):
        run = tmp_path / str(complement)
        terms = {
            "toxicity": {"use": letter_classifier(EARLY, label="toxic", output="log_odds"), "weight": 0.0},
            "trained": {"use": letter_classifier(EARLY, label="toxic", output="log_odds", complement=complement)},
        }
        execute(
            assemble(
                Setting("grpo", False, "gpt2"),
                run,
                reward=RewardConfig.of({"terms": terms}),
                total_steps=12,
                trainer={"learning_rate": 3e-3},
            )
        )
        toxicity[complement] = [row["reward/toxicity"] for row in logged(run, "collect")]
    assert sum(toxicity[True][-4:]) / 4 < sum(toxicity[True][:2]) / 2 - 1.0
    assert sum(toxicity[False][-4:]) / 4 > sum(toxicity[False][:2]) / 2 + 1.0


@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.parametrize(
    ("args", "empty"),
    [
        ({}, 0.0),  # read: the eos token, which weighs nothing
        ({"eos": False}, None),  # read: nothing is left of it
        ({"empty": None}, None),
        ({"empty": -1.5}, -1.5),
    ],
    ids=["read", "nothing-to-read", "no-opinion", "number"],
)
def test_completions_of_one_token_and_of_none(
    method: str, args: dict[str, Any], empty: float | None, tmp_path: Path
) -> None:
    reward = letter_classifier({**EARLY, "<eos>": 0.0}, label="toxic", output="log_odds", complement=True, **args)
    terms = {"clean": {"use": reward}}
    assembly = assemble(
        Setting(method, False, "gpt2"),
        tmp_path / "run",
        reward=RewardConfig.of({"terms": terms}),
        total_steps=4,
        sampling=Sampling(max_new_tokens=1),
    )
    execute(assembly)
    columns = columns_of(tmp_path / "run")
    assert {len(ids) for ids in columns["completion_ids"]} == {1}
    texts = columns["completion"]
    assert 0 < sum(not text.strip() for text in texts) < len(texts)
    for text, got in zip(texts, columns["reward/clean"], strict=True):
        assert got == (-float(text in EARLY) if text.strip() else empty)


def test_a_step_of_nothing_but_empty_completions(tmp_path: Path) -> None:
    reward = letter_classifier(EARLY, label="toxic", empty=None)
    assembly = assemble(
        Setting("grpo", False, "gpt2"),
        tmp_path / "run",
        reward=RewardConfig.of(lambda prompts, completions: reward(prompts, [""] * len(prompts))),
    )
    execute(assembly)
    assert {row["reward/unscored"] for row in logged(tmp_path / "run", "collect")} == {1.0}
