"""The recipe that makes a model less toxic: the sign of its reward, and a signal where probabilities hardly differ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tropism import Recipe
from tropism.rewards import RewardHarness
from tropism.rewards.registry import make_reward
from tropism.types import RewardInputs

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "grpo-less-toxic.yaml"
TEXTS = [
    "a lovely day in the garden",
    "you are a silly fool and a liar",
    "the committee met on Monday",
    "shut up, you pig",
]


def test_the_recipe_rewards_what_the_scorer_finds_less_toxic() -> None:
    pytest.importorskip("profanity_check")
    reward = Recipe.from_file(RECIPE).reward
    assert reward is not None
    inputs = RewardInputs(
        prompts=[""] * 4, completions=list(TEXTS), completion_ids=[[1]] * 4, finish_reasons=["eos"] * 4, columns={}
    )
    given = RewardHarness(reward).score(inputs).totals.tolist()
    p = make_reward("profanity", {})(completions=TEXTS)
    assert given == pytest.approx([-math.log(one / (1 - one)) for one in p], rel=1e-4)
    assert sorted(range(4), key=lambda row: given[row]) == sorted(range(4), key=lambda row: -p[row])
    assert max(p) > 0.3 > min(p)
