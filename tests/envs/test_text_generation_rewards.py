"""Rewards of the token-level environment, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tropism import Sampling, TextGenerationEnv, TextPolicy
from tropism.errors import ConfigError, RewardError, TropismError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.types import Prompt

pytest.importorskip("gymnasium")

A, B, C = 5, 6, 7
"""Token ids of the letters a, b and c."""


def count_a(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def per_token(completion_ids: list[list[int]]) -> list[list[float]]:
    """A tenth of each token's place, from 1."""
    return [[(place + 1) / 10 for place in range(len(ids))] for ids in completion_ids]


def model() -> tuple[Any, Any]:
    return tiny_model("llama"), tiny_tokenizer()


def make(reward: Any = count_a, items: Any = ("hello",), **options: Any) -> TextGenerationEnv:
    return TextGenerationEnv(model(), list(items), reward, **{"max_new_tokens": 3, **options})


def saying(*returned: Any, samples: int = 1, tokens: int = 3, reward: Any = None) -> TextGenerationEnv:
    """An environment whose ``get_reward`` says one thing after the other; ``heard`` notes its arguments."""

    class Saying(TextGenerationEnv):
        heard: list[Any] = []  # noqa: RUF012

        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            self.heard.append((input_item, predicted_list, finish))
            said = returned[min(len(self.heard), len(returned)) - 1]
            if isinstance(said, Exception):
                raise said
            return said

    env = Saying(model(), ["hello"], reward, max_new_tokens=tokens, compare_sample=samples)
    env.reset()
    return env


# At any token --------------------------------------------------------------------------------------------------------


def test_get_reward_is_asked_after_every_token() -> None:
    env: Any = saying(1, 2, 4)
    rewards = [env.step(token)[1] for token in (A, B, C)]
    assert rewards == [1.0, 2.0, 4.0]
    assert all(type(reward) is float for reward in rewards)
    assert env.heard == [
        ("hello", [["a"]], False),
        ("hello", [["a", "b"]], False),
        ("hello", [["a", "b", "c"]], True),
    ]
    assert env.token_rewards == [[1.0, 2.0, 4.0]]


def test_a_reward_function_is_asked_once_at_the_end_and_sees_what_a_trainer_shows_it() -> None:
    seen: list[dict[str, Any]] = []

    def look(**given: Any) -> list[float]:
        seen.append(given)
        return [2.5]

    items = [{"prompt": "hello", "answer": "yes", "more": 3}, {"input": "ab", "answer": "no"}]
    env = make(look, items)
    env.reset(options={"item": 0})
    assert [env.step(token)[1] for token in (A, B, EOS_ID)] == [0.0, 0.0, 2.5]
    (given,) = seen
    assert given["prompts"] == ["hello"]
    assert given["completions"] == ["ab"]
    assert given["completion_ids"] == [[A, B, EOS_ID]]
    assert given["finish_reasons"] == ["eos"]
    assert (given["answer"], given["more"]) == (["yes"], [3])
    env.reset(options={"item": 1})
    env.step(EOS_ID)
    assert (seen[1]["prompts"], seen[1]["answer"], seen[1]["more"]) == (["ab"], ["no"], [None])


def test_a_reward_per_token_counts_at_each_token_and_arrives_at_the_end() -> None:
    env = make({"place": per_token, "a": (count_a, 10.0)})
    env.reset()
    rewards = [float(env.step(token)[1]) for token in (A, B, A)]
    assert rewards == pytest.approx([0.0, 0.0, 0.1 + 0.2 + 0.3 + 20.0])
    assert env.token_rewards == [pytest.approx([0.1, 0.2, 0.3 + 20.0])]


def test_shaping_and_a_reward_of_the_whole_add_up() -> None:
    env = saying(1, 2, 4, reward={"place": per_token, "a": count_a})
    rewards = [float(env.step(token)[1]) for token in (A, A, B)]
    assert rewards == pytest.approx([1.0, 2.0, 4.0 + 0.6 + 2.0])
    assert env.token_rewards == [pytest.approx([1.1, 2.2, 4.3 + 2.0])]


def test_the_environment_and_a_trainer_reward_the_same_tokens_equally() -> None:
    """Completions of the sampler, acted token by token."""
    policy = TextPolicy.load(model())
    tokenizer = policy.tokenizer
    prompts = [Prompt(text=text, ids=tuple(tokenizer(text)["input_ids"])) for text in ("hello", "ab. cd")]
    sampling = Sampling(max_new_tokens=8, stop=(".",))
    sampled = policy.sampler.generate(policy.policy, prompts, sampling, 2, key=StreamKey(seed=0))
    reward = RewardConfig.of(
        {"terms": {"place": {"use": per_token, "weight": 3.0}, "a": {"use": count_a}}, "clip": 1.0}
    )
    rows = [prompt for prompt in prompts for _ in range(2)]
    inputs = Transcriber(tokenizer, (".",))(sampled, rows)
    expected = RewardHarness(reward).score(inputs).by_token(sampled.completion_lengths, sampled.completion_ids.shape[1])
    env = TextGenerationEnv(policy, [p.text for p in prompts], reward, max_new_tokens=8, stop=".", compare_sample=2)
    for index in range(2):
        env.reset(options={"item": index})
        completions = sampled.completion_ids[2 * index : 2 * index + 2]
        total = 0.0
        for tokens in completions.T:
            if any(reason is None for reason in env.finish_reasons):
                total += float(env.step(tokens)[1])
        for row in range(2):
            length = int(sampled.completion_lengths[2 * index + row])
            assert env.token_rewards[row] == pytest.approx(expected[2 * index + row, :length].tolist())
            assert env._info()["predicted_str"][row] == inputs.completions[2 * index + row]
        assert env.finish_reasons == list(sampled.finish_reasons[2 * index : 2 * index + 2])
        assert total == pytest.approx(sum(map(sum, env.token_rewards)))


# Several samples -----------------------------------------------------------------------------------------------------


def test_each_sample_has_its_own_rewards_and_the_step_their_sum() -> None:
    env = saying([1, 10], [2, 20], np.array([4.0, 40.0]), samples=2)
    found = [env.step([A, B]) for _ in range(3)]
    assert [reward for _, reward, *_ in found] == [11.0, 22.0, 44.0]
    assert [info["rewards"] for *_, info in found] == [[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]
    assert env.token_rewards == [[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]


def test_a_sample_that_ended_is_heard_again_at_the_finish_alone() -> None:
    """What is said of it in between is about no new token; what is said at the end is about the whole of it."""
    env = saying([1, 1], [2, 2], [4, 4], samples=2)
    found = [env.step([EOS_ID, A])[1:] for _ in range(3)]
    assert [reward for reward, *_ in found] == [2.0, 2.0, 8.0]
    assert [info["rewards"] for *_, info in found] == [[1.0, 1.0], [0.0, 2.0], [4.0, 4.0]]
    assert env.token_rewards == [[5.0], [1.0, 2.0, 4.0]]


def test_a_reward_function_judges_each_sample_when_it_ends() -> None:
    calls: list[list[str]] = []

    def judge(completions: list[str]) -> list[float]:
        calls.append(list(completions))
        return [len(text) + 1.0 for text in completions]

    env = make(judge, compare_sample=3)
    env.reset()
    found = [env.step(actions)[4]["rewards"] for actions in ([A, A, EOS_ID], [EOS_ID, A, B], [A, A, B])]
    assert found == [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]
    assert calls == [[""], ["a"], ["aaa"]]
    assert env.token_rewards == [[0.0, 2.0], [0.0, 0.0, 4.0], [1.0]]
    env.reset()
    assert env.step([A, EOS_ID, EOS_ID])[4]["rewards"] == [0.0, 1.0, 1.0]
    del calls[:]
    env.step([A, A, A])
    assert env.step([A, A, A])[4]["rewards"] == [4.0, 0.0, 0.0]
    assert calls == [["aaa"]]


def test_samples_that_end_together_are_judged_in_one_call() -> None:
    calls: list[list[str]] = []

    def judge(completions: list[str]) -> list[float]:
        calls.append(list(completions))
        return count_a(completions)

    env = make(judge, compare_sample=3, max_new_tokens=1)
    env.reset()
    assert env.step([B, A, EOS_ID])[4]["rewards"] == [0.0, 1.0, 0.0]
    assert calls == [["b", "a", ""]]


# What get_reward may return ------------------------------------------------------------------------------------------

ONE = (2, 2.0, True, np.float32(2), np.array(2), torch.tensor(2.0), [2], (2.0,), np.array([2]), torch.tensor([2.0]))
BOTH = (2, np.float64(2), torch.tensor(2), [2, 2.0], (2, 2), np.array([2, 2]), torch.tensor([2.0, 2.0]))


def test_pitfall_12_numbers_lists_arrays_and_tensors_are_rewards() -> None:
    env = saying(*ONE, tokens=len(ONE))
    assert [env.step(A)[1] for _ in ONE] == [1.0 if said is True else 2.0 for said in ONE]
    env = saying(*BOTH, samples=2, tokens=len(BOTH))
    assert [env.step([A, B])[4]["rewards"] for _ in BOTH] == [[2.0, 2.0]] * len(BOTH)
    env = saying([None, 3], samples=2)
    assert env.step([A, B])[4]["rewards"] == [0.0, 3.0]  # None is no opinion


@pytest.mark.parametrize(
    ("samples", "returned", "message"),
    [
        (2, [0], "returned 1 rewards for 2 samples.*A number by itself would count for every sample"),
        (2, [1, 2, 3], "returned 3 rewards for 2 samples"),
        (1, [], "returned 0 rewards for 1 samples"),
        (2, torch.zeros(1), "returned 1 rewards for 2 samples"),
        (1, None, r"returned None; .*is a `return` missing"),
        (1, "good", "returned a str"),
        (2, {"a": 1}, "returned a dict"),
        (2, [1.0, math.nan], "returned NaN"),
        (1, math.inf, "returned inf"),
        (2, np.zeros((2, 1)), "returned a list of 1 for one sample"),
        (2, ["1", "2"], "returned the str '1'"),
        (1, UnboundLocalError("reward is not set"), "raised UnboundLocalError: reward is not set"),
    ],
)
def test_pitfall_12_a_reward_of_the_wrong_length_or_type_is_refused(samples: int, returned: Any, message: str) -> None:
    env = saying(0, returned, samples=samples)
    action = A if samples == 1 else [A, B]
    env.step(action)
    with pytest.raises(RewardError, match=f"get_reward, after token 2 of 'hello'.*{message}"):
        env.step(action)
    with pytest.raises(TropismError, match=r"call reset\(\)"):
        env.step(action)
    env.reset()


def test_a_failed_reward_function_names_itself_and_reset_begins_anew() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("score")

    env = make(broken, max_new_tokens=1)
    env.reset()
    with pytest.raises(RewardError, match=r"broken.*KeyError"):
        env.step(A)
    observed, _ = env.reset()
    assert observed in env.observation_space


def test_an_environment_that_rewards_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="subclass that overrides get_reward"):
        make(None)
