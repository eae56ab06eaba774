"""A real, if very small, language model learns warm stories: the default settings of PPO and GRPO on VADER."""

from __future__ import annotations

from pathlib import Path

import pytest

import tropism
from openings import HELD_OUT, TRAIN
from tiny_runs import logged
from tropism.algorithms import AlgorithmConfig

pytestmark = [pytest.mark.slow, pytest.mark.learning]

STEPS = {"ppo": 20, "grpo": 12}
"""Steps of 16 prompts: less than a minute on two idle cores."""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", [tropism.PPO(), tropism.GRPO(group_size=8)], ids=lambda a: a.name)
def test_default_settings_raise_held_out_warmth(
    algorithm: AlgorithmConfig, seed: int, stories: Path, tmp_path: Path
) -> None:
    tropism.train(
        str(stories),
        algorithm,
        data=TRAIN,
        eval_data=HELD_OUT * 4,
        reward="vader",
        run=tmp_path / "run",
        total_steps=STEPS[algorithm.name],
        prompts_per_step=16,
        sampling=tropism.Sampling(max_new_tokens=40),
        trainer=tropism.TrainerConfig(progress=False),
        seed=seed,
    )
    before, after = (row["eval/reward"] for row in logged(tmp_path / "run", "evaluation"))
    assert before < 0.45
    assert after > 0.8
