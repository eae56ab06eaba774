"""Every method learns a toy task in seconds, with all weights and with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_runs import JUDGED_APART, LIKED, PAIRED, PROMPTS, SETTINGS, Setting, early_letters, logged, make_recipe
from tropism.build import run_recipe
from tropism.rewards import RewardConfig
from tropism.training.config import EvaluationConfig

pytestmark = pytest.mark.learning

HELD_OUT = ["a cat ran.", "the mat is no dog.", "is it a dog?"]
HELD_OUT_SCORED = [
    {"prompt": "a cat", "completion": " ran.", "reward": 0.3},
    {"prompt": "the mat", "completion": " is no dog.", "reward": 0.8},
    {"prompt": "is it", "completion": " a dog?", "reward": 1.1},
]


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.on_policy], ids=str)
def test_reward_rises(setting: Setting, tmp_path: Path) -> None:
    changes = {"num_epochs": 2, "minibatch_size": None, "group_size": 8, "kl_coef": 0.01}
    recipe = make_recipe(
        setting,
        tmp_path / "run",
        algorithm=setting.with_algorithm(**changes),
        reward=RewardConfig.of(early_letters),
        eval_data=PROMPTS * 8,
        total_steps=15,
        prompts_per_step=3,
        trainer={"learning_rate": 2e-2 if setting.adapter else 5e-3},
    )
    result = run_recipe(recipe)
    before, after = (row["eval/reward"] for row in logged(result.path, "evaluation"))
    assert before < 0.5
    assert after > before + 0.25
    assert result.policy.generate("a cat", max_new_tokens=3)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.algorithm.reads != "prompts"], ids=str)
def test_held_out_loss_falls(setting: Setting, tmp_path: Path) -> None:
    held_out: dict[str, list[Any]] = {
        "demonstrations": HELD_OUT,
        "scored": HELD_OUT_SCORED,
        "comparisons": JUDGED_APART,
        "episodes": HELD_OUT_SCORED,
        "pairs": [{**item, "prompt": f"so {item['prompt']}"} for item in PAIRED],
        "opinions": [{**item, "prompt": f"so {item['prompt']}"} for item in LIKED],
    }
    recipe = make_recipe(
        setting,
        tmp_path / "run",
        eval_data=held_out[setting.algorithm.reads],
        total_steps=15,
        trainer={"learning_rate": 1e-2, "evaluation": EvaluationConfig(every=5)},
    )
    result = run_recipe(recipe)
    # Values begin at zero, as far from those of unseen texts as these are; six texts teach nothing about others.
    part = "eval/loss/awac" if setting.algorithm.reads == "episodes" else "eval/loss"
    losses = [row[part] for row in logged(result.path, "evaluation")]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
