"""The rows of a run, counted by hand."""

from __future__ import annotations

import pytest

from tropism.algorithms import DPO, GRPO, KTO, RewardConditioned
from tropism.preferences import Opinion, Pair
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


def test_a_pair_is_one_row_with_its_prompt_twice() -> None:
    pairs = [
        Pair(prompt_ids=(1, 2), chosen_ids=(3, 4, 5), rejected_ids=(6,)),
        Pair(prompt_ids=(1,), chosen_ids=(3,), rejected_ids=(6, 7)),
    ]
    rows = rows_of(pairs, DPO(), Sampling(max_new_tokens=10), prompts_per_step=2, held_out=0)
    assert (rows.count, rows.mean_tokens, rows.longest_tokens, rows.sampled) == (2, 6.5, 8, 0)
    assert rows.trained_share == pytest.approx(7 / 13)


def test_an_opinion_is_a_text() -> None:
    opinions = [Opinion(prompt_ids=(1, 2), completion_ids=(3, 4, 5), liked=True)]
    rows = rows_of(opinions, KTO(), Sampling(max_new_tokens=10), prompts_per_step=2, held_out=0)
    assert (rows.mean_tokens, rows.trained_share) == (5.0, 0.6)
