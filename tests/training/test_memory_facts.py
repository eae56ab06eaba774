"""The rows of a run, counted by hand."""

from __future__ import annotations

import pytest

from tropism.algorithms import GRPO, RewardConditioned
from tropism.rollouts.config import Sampling
from tropism.training.memory_facts import rows_of
from tropism.types import Prompt, ScoredText


@pytest.mark.parametrize("before", [0, 3])
def test_what_stands_before_prompts_counts(before: int) -> None:
    prompts = [Prompt(text="a", ids=(1, 2)), Prompt(text="b", ids=(1, 2, 3, 4))]
    rows = rows_of(
        prompts, GRPO(group_size=2), Sampling(max_new_tokens=10), prompts_per_step=2, held_out=0, before=before
    )
    assert (rows.longest_prompt, rows.longest_tokens) == (4 + before, 14 + before)
    assert rows.mean_tokens == 13 + before
    assert rows.trained_share == pytest.approx(10 / (13 + before))


@pytest.mark.parametrize("before", [0, 3])
def test_what_stands_before_texts_counts(before: int) -> None:
    texts = [
        ScoredText(prompt_ids=(1, 2), completion_ids=(3, 4), rewards=(1.0,)),
        ScoredText(prompt_ids=(), completion_ids=(3, 4), rewards=(2.0,)),
    ]
    rows = rows_of(
        texts, RewardConditioned(), Sampling(max_new_tokens=10), prompts_per_step=2, held_out=0, before=before
    )
    assert (rows.mean_tokens, rows.longest_tokens) == (3 + before, 4 + before)
    assert rows.trained_share == pytest.approx(4 / (6 + 2 * before))
