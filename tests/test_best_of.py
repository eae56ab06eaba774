"""``TextPolicy.best_of``: the best of the completions that ``generate`` gives, by any reward."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tropism.best_of import BestCompletion
from tropism.errors import ConfigError, RewardError
from tropism.generation import TextPolicy

PROMPTS = ["a cat", "the big dog", "oh"]


@pytest.fixture(scope="module")
def policy() -> TextPolicy:
    return TextPolicy.load((tiny_model("llama", seed=3), tiny_tokenizer(chat=True)))


def early(completions: list[str]) -> list[float]:
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]


def test_the_best_of_what_generate_gives(policy: TextPolicy) -> None:
    found = policy.best_of(PROMPTS, early, n=5, seed=4, max_new_tokens=7)
    texts = policy.generate(PROMPTS, n=5, seed=4, max_new_tokens=7)
    assert [one.prompt for one in found] == PROMPTS
    for place, one in enumerate(found):
        mine = texts[5 * place : 5 * place + 5]
        assert one.rewards == pytest.approx(early(mine), abs=1e-6)
        assert one.completion == max(mine, key=lambda text: early([text])[0])  # max takes the first of equals
        assert one.reward == max(one.rewards)
    (alone,) = policy.best_of("a cat", early, n=1, seed=4, max_new_tokens=7)
    assert alone.completion == policy.generate("a cat", seed=4, max_new_tokens=7)[0]


def test_more_completions_are_never_worse(policy: TextPolicy) -> None:
    rewards = [policy.best_of("a cat", early, n=n, max_new_tokens=7)[0].reward for n in (1, 2, 4, 8, 16)]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0]


def test_rewards_see_columns_ids_and_reasons_and_are_summed_unclipped(policy: TextPolicy) -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[str], **named: Any) -> list[float]:
        seen.update(named)
        return [float(len(text)) for text in completions]

    records = [{"prompt": "a cat", "answer": "one"}, {"prompt": "oh", "answer": "two"}]
    config = {"terms": {"length": {"use": reward, "weight": 2.0}}, "clip": 0.5, "scale": "running"}
    first, second = policy.best_of(records, config, n=3, max_new_tokens=5)
    assert seen["answer"] == ["one"] * 3 + ["two"] * 3
    assert len(seen["completion_ids"]) == len(seen["finish_reasons"]) == 6
    assert first.reward == 2.0 * len(first.completion) and second.reward == 2.0 * len(second.completion)


def test_chats_are_answered_in_text(policy: TextPolicy) -> None:
    chat = [{"role": "user", "content": "a cat"}]
    seen: list[Any] = []

    def reward(completions: list[Any]) -> list[float]:
        seen.extend(completions)
        return [float(len(messages[0]["content"])) for messages in completions]

    (best,) = policy.best_of([chat], reward, n=3, max_new_tokens=5)
    assert seen[0][0]["role"] == "assistant" and best.prompt == chat
    assert isinstance(best.completion, str) and best.reward == len(best.completion)


def test_completions_without_an_opinion_are_passed_over(policy: TextPolicy) -> None:
    def reward(completions: list[str]) -> list[float | None]:
        return [None if place == 1 else -float(place) for place, _ in enumerate(completions)]

    (best,) = policy.best_of("a cat", reward, n=3, max_new_tokens=5)
    assert best.reward == 0.0 and math.isnan(best.rewards[1]) and best.rewards[2] == -2.0
    assert isinstance(best, BestCompletion)

    def silent(prompts: list[str]) -> list[float | None]:
        return [None if prompt == "oh" else 1.0 for prompt in prompts]

    with pytest.raises(RewardError, match=r"any of the 2 completions of prompt 2 \('oh'\)"):
        policy.best_of(PROMPTS, silent, n=2, max_new_tokens=5)


def test_what_cannot_work_is_refused_before_anything_is_sampled() -> None:
    policy = TextPolicy.load((tiny_model("llama", seed=3), tiny_tokenizer()))
    policy.sampler.generate = lambda *_, **__: pytest.fail("sampled")  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="n must be at least 1"):
        policy.best_of("a cat", early, n=0)
    with pytest.raises(ConfigError, match="no_such_reward"):
        policy.best_of("a cat", "no_such_reward")
    with pytest.raises(ConfigError, match="allow"):
        policy.best_of("a cat", "rewards.py:warm")
