"""The vector environment: many prompts of any lengths in one decode, each as if it were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import EOS_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tropism import TextGenerationEnv, TextGenerationVectorEnv
from tropism.errors import ConfigError, DataError, RewardError, TropismError
from tropism.models.sampling_model import SamplingModel

gymnasium = pytest.importorskip("gymnasium")

A, B, C = 5, 6, 7
"""Token ids of the letters a, b and c."""
ITEMS = ["a", "hello there", "bc", "some words, and then a few more", "d"]


def count_a(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def make(family: str = "llama", items: Any = ITEMS, reward: Any = count_a, **options: Any) -> TextGenerationVectorEnv:
    options = {"num_envs": 3, "max_new_tokens": 5, **options}
    return TextGenerationVectorEnv((tiny_model(family), tiny_tokenizer()), list(items), reward, **options)


def random_actions(random: np.random.Generator, rows: int) -> Any:
    """Every fourth token or so is an eos."""
    actions = random.integers(3, VOCABULARY, size=rows)
    return np.where(random.random(rows) < 0.25, EOS_ID, actions)


@torch.no_grad()
def assert_observes(env: TextGenerationVectorEnv, model: Any, observed: Any) -> None:
    """As one uncached pass of plain transformers over each text by itself."""
    for place in range(env.num_envs):
        prompt, completion = env.prompt_ids[place], env.completions[place]
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *completion]])
            given = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start, output_hidden_states=True)
            hidden = given.decoder_hidden_states[-1][0, -1]
        else:
            given = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
            hidden = given.hidden_states[-1][0, -1]
        np.testing.assert_allclose(observed[place], hidden.numpy(), atol=1e-4)
        if env.finish_reasons[place] is None:
            torch.testing.assert_close(env.logits()[place], given.logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "falcon_alibi", "t5", "bart"])
def test_rows_of_any_length_observe_what_each_would_alone(family: str) -> None:
    model, random = tiny_model(family), np.random.default_rng(0)
    env = TextGenerationVectorEnv((model, tiny_tokenizer()), ITEMS, count_a, num_envs=4, max_new_tokens=6)
    observed, _ = env.reset(seed=1)
    assert_observes(env, model, observed)
    for _ in range(18):
        observed, *_ = env.step(random_actions(random, 4))
        assert observed in env.observation_space
        assert_observes(env, model, observed)


def test_it_does_what_environments_of_one_do() -> None:
    """Driven with the same items and tokens, past several ends."""
    env = make(reward={"a": count_a, "place": lambda completion_ids: [[1.0] * len(ids) for ids in completion_ids]})
    alone = TextGenerationEnv(
        (tiny_model("llama"), tiny_tokenizer()), ITEMS, env._completing._judge._harness.config, max_new_tokens=5
    )
    random = np.random.default_rng(3)
    places = env.num_envs
    env.reset(seed=2)
    record: list[list[Any]] = [[(env.items[place], None)] for place in range(places)]
    for _ in range(25):
        actions = random_actions(random, places)
        observed, rewards, terminations, truncations, infos = env.step(actions)
        for place in range(places):
            said = (
                observed[place],
                rewards[place],
                bool(terminations[place]),
                bool(truncations[place]),
                infos["predicted_str"][place],
                env.token_rewards[place],
            )
            began = infos["predicted"][place] == []
            record[place].append((env.items[place], None) if began else (int(actions[place]), said))
    assert sum(said is None for row in record for _, said in row) > 10  # ends and new beginnings
    for row in record:
        for action, said in row:
            if said is None:
                alone.reset(options={"item": action})
                continue
            observed, reward, terminated, truncated, info = alone.step(action)
            np.testing.assert_allclose(said[0], observed, atol=1e-4)
            assert said[1:] == (reward, terminated, truncated, info["predicted_str"][0], alone.token_rewards[0])


def test_a_completion_that_ended_begins_anew_in_the_next_step() -> None:
    env = make(items=["a"], num_envs=2, max_new_tokens=3)
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    first, _ = env.reset()
    _, rewards, terminations, truncations, infos = env.step([EOS_ID, A])
    assert (terminations.tolist(), truncations.tolist()) == ([True, False], [False, False])
    assert infos["finish_reason"].tolist() == ["eos", None]
    observed, rewards, terminations, truncations, infos = env.step([A, A])
    np.testing.assert_allclose(observed[0], first[0], atol=1e-5)
    assert (terminations.tolist(), truncations.tolist()) == ([False, False], [False, False])
    assert env.completions == [[], [A, A]] == infos["predicted"].tolist()
    _, rewards, terminations, truncations, _ = env.step([B, A])
    assert (terminations.tolist(), truncations.tolist()) == ([False, False], [False, True])
    assert rewards.tolist() == [0.0, 3.0]
    env.step([B, B])
    assert env.completions == [[B, B], []]
    assert rewards.dtype == np.float64 and terminations.dtype == np.bool_


def test_a_step_is_one_decode_and_what_begins_together_is_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    hidden_states, decode = SamplingModel.hidden_states, SamplingModel.decode

    def read(self: Any, ids: Any, mask: Any, *rest: Any) -> Any:
        taken.append(("read", mask.sum(1).tolist()))
        return hidden_states(self, ids, mask, *rest)

    def step(self: Any, ids: Any, cache: Any) -> Any:
        taken.append(("decode", ids.numel()))
        return decode(self, ids, cache)

    monkeypatch.setattr(SamplingModel, "hidden_states", read)
    monkeypatch.setattr(SamplingModel, "decode", step)
    env = make(items=["ab"], num_envs=3)
    del taken[:]
    env.reset(options={"items": [0, "abcd", 0]})
    env.step([A, A, A])
    env.step([EOS_ID, EOS_ID, A])
    env.step([A, A, A])
    env.step([EOS_ID, EOS_ID, EOS_ID])
    env.step([A, A, A])
    assert taken == [
        ("read", [2, 4]),  # the prompt that two share once
        ("decode", 3),
        ("decode", 3),
        ("decode", 1),
        ("read", [2]),
        ("decode", 3),
        ("read", [2]),
    ]


def test_weights_that_change_are_seen_in_rows_of_any_length() -> None:
    model, random = tiny_model("llama"), np.random.default_rng(0)
    env = TextGenerationVectorEnv((model, tiny_tokenizer()), ITEMS, count_a, num_envs=4, max_new_tokens=6)
    env.reset(seed=1)
    for _ in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.98)
        observed, *_ = env.step(random_actions(random, 4))
        going = [place for place in range(4) if env.finish_reasons[place] is None]
        for place in going:
            ids = torch.tensor([[*env.prompt_ids[place], *env.completions[place]]])
            with torch.no_grad():
                hidden = model.base_model(ids).last_hidden_state[0, -1]
            np.testing.assert_allclose(observed[place], hidden.numpy(), atol=1e-4)


def test_a_prompt_longer_than_all_before_finds_room() -> None:
    model = tiny_model("llama")
    env = TextGenerationVectorEnv((model, tiny_tokenizer()), ["a"], count_a, num_envs=2, max_new_tokens=4)
    env.reset()
    env.step([B, C])
    observed, _ = env.reset(options={"items": ["x" * 50, "ab"]})
    assert_observes(env, model, observed)
    for _ in range(3):
        observed, *_ = env.step([B, C])
        assert_observes(env, model, observed)


def test_a_subclass_rewards_each_completion_by_itself() -> None:
    heard: list[Any] = []

    class Shaped(TextGenerationVectorEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            heard.append((input_item["by"], predicted_list, finish))
            return [float(len(predicted_list[0]))]

    items = [{"input": "ab", "by": "us"}, {"input": "c", "by": "them"}]
    env = Shaped((tiny_model("llama"), tiny_tokenizer()), items, num_envs=2, max_new_tokens=2)
    env.reset(options={"items": [0, 1]})
    assert env.step([A, EOS_ID])[1].tolist() == [1.0, 1.0]
    assert env.step([B, A])[1].tolist() == [2.0, 0.0]
    assert heard == [("us", [["a"]], False), ("them", [["<eos>"]], True), ("us", [["a", "b"]], True)]


def test_equal_seeds_give_equal_episodes() -> None:
    def play(env: TextGenerationVectorEnv, seed: int) -> list[Any]:
        random = np.random.default_rng(0)
        env.reset(seed=seed)
        found = [list(env.items)]
        for _ in range(20):
            env.step(random_actions(random, 3))
            found.append(list(env.items))
        return found

    env = make()
    first = play(env, 5)
    assert play(env, 5) == first == play(make(seed=9), 5)
    assert play(env, 6) != first


def test_ids_are_observed_and_gymnasiums_wrappers_work() -> None:
    env = make(observation="ids")
    observed, _ = env.reset(options={"items": ["ab", "c", "ab"]})
    assert observed == ((A, B), (C,), (A, B))
    assert env.step([A, B, C])[0] == ((A, B, A), (C, B), (A, B, C))
    assert env.step([A, B, C])[0] in env.observation_space
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(make(items=["a"], max_new_tokens=2))
    wrapped.reset()
    wrapped.step([A, A, B])
    *_, infos = wrapped.step([A, B, B])
    assert infos["episode"]["r"].tolist() == [2.0, 1.0, 0.0]
    assert infos["episode"]["l"].tolist() == [2, 2, 2]
    wrapped.close()


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_envs must be a whole number"):
        make(num_envs=0)
    with pytest.raises(ConfigError, match="subclass that overrides get_reward"):
        make(reward=None)
    env = make()
    with pytest.raises(TropismError, match=r"call reset\(\) first"):
        env.step([A, A, A])
    with pytest.raises(ConfigError, match="2 items for 3 environments"):
        env.reset(options={"items": [0, 1]})
    with pytest.raises(ConfigError, match="the option 'items' alone, not 'item'"):
        env.reset(options={"item": 1})
    with pytest.raises(DataError, match="the item has no prompt"):
        env.reset(options={"items": [0, {"answer": 1}, 0]})
    env.reset()
    for actions in (A, [A, A], [A, A, VOCABULARY], [A, A, 0.5]):
        with pytest.raises(TropismError, match="the action"):
            env.step(actions)
    assert env.completions == [[], [], []]


def test_a_failed_reward_ends_all_and_reset_begins_anew() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("score")

    env = make(reward=broken)
    env.reset()
    env.step([A, A, A])
    with pytest.raises(RewardError, match="broken"):
        env.step([A, EOS_ID, A])
    with pytest.raises(TropismError, match=r"call reset\(\)"):
        env.step([A, A, A])
    env.reset()
    env.step([A, A, A])
