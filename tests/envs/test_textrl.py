"""The facade's environment and actor, and what TextRL itself gets wrong there."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import EOS_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tiny_textrl import ITEMS, LettersEnv, make_actor, make_env, play_episode
from tropism.envs.textrl import TextRLActor, TextRLEnv
from tropism.errors import ConfigError, DataError, ModelError, RewardError, TropismError

A_ID = tiny_tokenizer().convert_tokens_to_ids("a")
B_ID = tiny_tokenizer().convert_tokens_to_ids("b")


# Environment ----------------------------------------------------------------------------------------------------------


def test_reset_gives_a_row_of_hidden_states_per_sample() -> None:
    env = make_env(compare_sample=3)
    obs = env.reset(ITEMS[0])
    assert obs.shape == (3, 32) and obs.dtype == torch.float32
    ids = torch.tensor([env.tokenizer("a cat")["input_ids"]])
    expected = env.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert torch.allclose(obs[1], expected, atol=1e-5)


def test_a_step_is_that_of_the_old_gym() -> None:
    env = make_env(compare_sample=2)
    env.reset(ITEMS[0])
    obs, reward, done, info = env.step([A_ID, B_ID])
    assert obs.shape == (2, 32)
    assert reward.tolist() == [1.0, 0.0] and done is False
    assert info == {"predicted_str": ["a", "b"]}
    _, reward, done, _ = env.step(torch.tensor([EOS_ID, B_ID]))
    assert done is False and reward.tolist() == [0.0, 0.0]
    _, reward, done, _ = env.step(np.array([0, EOS_ID]))
    assert done is True
    # What an ended sample earns at the end counts, since it is said only there.
    assert reward.tolist() == [10.0, 10.0]


def test_one_sample_takes_a_number_or_a_list() -> None:
    env = make_env(compare_sample=1)
    for action in (A_ID, [A_ID], torch.tensor([A_ID]), torch.tensor(A_ID)):
        env.reset(ITEMS[0])
        obs, reward, _, _ = env.step(action)
        assert obs.shape == (1, 32) and reward.tolist() == [1.0]


def test_the_reward_sees_the_item_as_it_was_given() -> None:
    seen: list[Any] = []

    class Watching(TextRLEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            seen.append((input_item, [list(tokens) for tokens in predicted_list], finish))
            return 0

    env = make_env(Watching, observation_input=[["a cat", "label"]], max_length=2)
    env.reset()
    env.step([A_ID, B_ID])
    env.step([B_ID, B_ID])
    item = ["a cat", "label"]
    assert seen == [(item, [["a"], ["b"]], False), (item, [["a", "b"], ["b", "b"]], True)]
    env.reset("oh")
    env.step([A_ID, B_ID])
    assert seen[-1][0] == {"input": "oh"}


def test_the_prompt_hook_makes_the_prompt_when_an_episode_begins() -> None:
    class Asking(LettersEnv):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.before = "is it "

        def gat_obs_input(self, input_item: Any) -> str:
            return self.before + input_item["animal"]

    env = make_env(Asking, observation_input=[{"animal": "a cat"}])
    env.reset()
    assert env.prompt_ids == env.tokenizer("is it a cat")["input_ids"]


def test_a_random_item_comes_from_a_generator_of_the_environment() -> None:
    def begun(seed: int) -> list[list[int]]:
        env = make_env(observation_input=["a", "b", "c", "d"], seed=0, max_length=2)
        env._random = np.random.default_rng(seed)
        found = []
        for _ in range(12):
            env.reset()
            found.append(env.prompt_ids)
        return found

    assert begun(1) == begun(1) != begun(2)
    assert len({tuple(ids) for ids in begun(1)}) == 4


@pytest.mark.parametrize(
    "item",
    [{"label": "x"}, {"input": None}, [], [3], 7, {"input": 7}],
    ids=["none", "null", "empty", "ids", "7", "number"],
)
def test_an_item_without_a_prompt_is_refused(item: Any) -> None:
    with pytest.raises(DataError, match="prompt"):
        make_env(observation_input=[item]).reset()


def test_no_items_at_all() -> None:
    env = make_env(observation_input=[])
    with pytest.raises(DataError, match="reset\\(item\\)"):
        env.reset()
    assert env.reset("a cat").shape == (2, 32)
    with pytest.raises(DataError, match="list of items"):
        make_env(observation_input="a cat")


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ModelError, match="transformers model"):
        LettersEnv("gpt2", tiny_tokenizer(), ITEMS)


def test_a_step_after_the_end_and_before_the_begin() -> None:
    env = make_env(max_length=1)
    with pytest.raises(ConfigError, match="reset"):
        env.step([A_ID, A_ID])
    env.reset()
    env.step([A_ID, A_ID])
    with pytest.raises(TropismError, match="over"):
        env.step([A_ID, A_ID])


@pytest.mark.parametrize("action", [[VOCABULARY, 0], [-1, 0], [0], [0.5, 0.5], "ab"])
def test_an_action_out_of_the_vocabulary(action: Any) -> None:
    env = make_env()
    env.reset()
    with pytest.raises(TropismError, match=r"token id|no token"):
        env.step(action)


def test_the_separator_ends_a_completion() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.sep_token = "<user>"
    env = LettersEnv(tiny_model("gpt2"), tokenizer, ITEMS, compare_sample=1, max_length=6)
    env.reset()
    _, _, done, _ = env.step(tokenizer.sep_token_id)
    assert done


# Actor ----------------------------------------------------------------------------------------------------------------


def test_predict_takes_the_most_likely_tokens_or_samples() -> None:
    env = make_env(max_length=5)
    greedy = make_actor(env).predict(ITEMS[0])
    ids = torch.tensor([env.tokenizer("a cat")["input_ids"]])
    plain = env.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    expected = env.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert greedy == [expected, expected]
    sampled = make_actor(env, act_deterministically=False).predict(ITEMS[0])
    assert len(sampled) == 2 and len(set(sampled)) == 2


def test_predict_stops_after_so_many_tokens_and_asks_no_reward() -> None:
    class Strict(LettersEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            return [float(input_item["label"] == "x")] * 2

    actor = make_actor(make_env(Strict), act_deterministically=False)
    assert all(len(text) <= 3 for text in actor.predict("a cat", max_episode_len=3))


def test_top_k_of_one_is_the_most_likely_token() -> None:
    env = make_env(max_length=5)
    assert make_actor(env, act_deterministically=False, top_k=1).predict("oh") == make_actor(env).predict("oh")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"compare_sample": 3}, "compare_sample"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_actor(make_env(), **settings)


def test_blocks_are_named_once_or_twice_but_not_differently() -> None:
    env = make_env(unfreeze_layer_from_past=1)
    assert make_actor(env).unfreeze_layer_from_past == 1
    assert make_actor(env, unfreeze_layer_from_past=1).unfreeze_layer_from_past == 1
    with pytest.raises(ConfigError, match="same number"):
        make_actor(env, unfreeze_layer_from_past=2)
    with pytest.raises(ModelError, match="2 transformer blocks"):
        make_actor(make_env(), unfreeze_layer_from_past=3)


def test_the_actor_belongs_to_the_environments_model() -> None:
    env = make_env()
    with pytest.raises(ConfigError, match="another model"):
        TextRLActor(env, tiny_model("gpt2"), env.tokenizer)


@pytest.mark.parametrize(
    "settings",
    [{"update_interval": 0}, {"minibatch_size": 0}, {"lr": 0.0}, {"gamma": 2.0}, {"epochs": 0}, {"kl_coef": -1.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_learner_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"."):
        make_actor(make_env()).agent_ppo(**settings)


def test_an_unknown_optimizer() -> None:
    with pytest.raises(ConfigError, match="sgd or adamw"):
        make_actor(make_env(), optimizer="adafactor").agent_ppo()


# Pitfalls of TextRL ---------------------------------------------------------------------------------------------------


def test_pitfall_11_an_environment_that_rewards_nothing_makes_no_agent() -> None:
    """TextRL's README trains ``TextRLEnv`` itself, whose reward is always 0."""
    actor = make_actor(make_env(TextRLEnv))
    with pytest.raises(ConfigError, match="does not override get_reward"):
        actor.agent_ppo()
    assert len(actor.predict("a cat")) == 2


@pytest.mark.parametrize("reward", [1, 1.0, np.float64(1), torch.tensor(1.0), [1, 1], (1.0, 1.0), torch.ones(2)])
def test_pitfall_12_rewards_may_be_numbers_lists_and_tensors(reward: Any) -> None:
    class Fixed(TextRLEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            return reward

    env = make_env(Fixed, max_length=3)
    agent = make_actor(env).agent_ppo(update_interval=100)
    total, steps = play_episode(agent, env)  # which adds up rewards, beginning with 0
    assert total.shape == (2,) and total.max() == steps
    assert sum(map(sum, agent.learner.episodes[0].rewards)) == pytest.approx(total.sum())


@pytest.mark.parametrize("reward", [[1], [1, 2, 3], "much", None, [float("nan"), 0], [[1, 1]]])
def test_pitfall_12_rewards_of_another_kind_are_refused(reward: Any) -> None:
    class Fixed(TextRLEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            return reward

    env = make_env(Fixed)
    env.reset()
    with pytest.raises(RewardError, match="get_reward"):
        env.step([A_ID, A_ID])


def test_pitfall_13_compare_sample_may_be_named_in_the_actor_and_predict_takes_text() -> None:
    env = make_env(compare_sample=2)
    actor = make_actor(env, compare_sample=2)
    assert actor.predict("a cat") == actor.predict({"input": "a cat"}) == actor.predict(["a cat"])


def test_pitfall_14_completions_have_exactly_the_tokens_asked_for() -> None:
    env = make_env(max_length=3, compare_sample=2)
    env.reset()
    done, steps = False, 0
    while not done:
        _, _, done, _ = env.step([A_ID, B_ID])
        steps += 1
    assert steps == 3 and env.completions == [[A_ID] * 3, [B_ID] * 3]
    assert env.env_max_length == 3


def test_pitfall_16_the_token_acted_is_the_token_seen() -> None:
    """The ids stay as they are; TextRL decodes and encodes them again."""
    tokenizer = tiny_tokenizer()
    pieces = [tokenizer.bos_token_id, A_ID, tokenizer.pad_token_id]
    env = LettersEnv(tiny_model("llama"), tokenizer, ITEMS, compare_sample=1, max_length=9)
    env.reset()
    for token in pieces:
        env.step(token)
    assert env.completions == [pieces]
    ids = torch.tensor([[*env.prompt_ids, *pieces]])
    assert torch.allclose(env.logits(), env.model(input_ids=ids).logits[:, -1], atol=1e-4)


def test_pitfall_17_sampling_is_the_default_in_training_alone() -> None:
    env = make_env(max_length=6)
    actor = make_actor(env)
    agent = actor.agent_ppo(update_interval=1000)
    assert len(set(actor.predict("a cat"))) == 1
    play_episode(agent, env, "a cat")
    assert agent.learner.episodes[0].rollouts.behaviour_logprobs.min() < 0
    completions = [env.completions[0]]
    play_episode(agent, env, "a cat")
    assert env.completions[0] != completions[0]


def test_pitfall_17_a_repetition_penalty_gives_numbers() -> None:
    env = make_env(max_length=12)
    agent = make_actor(env, repetition_penalty=2.0, top_k=5, top_p=0.9).agent_ppo(update_interval=1, kl_coef=0.1)
    for _ in range(3):
        play_episode(agent, env)
    assert all(bool(p.isfinite().all()) for p in env.policy.parameters())
    assert dict(agent.get_statistics())["n_updates"] == 60


def test_pitfall_18_the_model_stays_where_it_is() -> None:
    env = make_env()
    actor = make_actor(env, gpu_id=0)
    agent = actor.agent_ppo(update_interval=1, epochs=1)
    play_episode(agent, env)
    assert {p.device.type for p in env.policy.parameters()} == {"cpu"}


def test_pitfall_18_a_tied_head_is_trained_without_the_input_embedding(caplog: pytest.LogCaptureFixture) -> None:
    env = make_env(family="gpt2")
    assert env.model.lm_head.weight is env.model.transformer.wte.weight
    before = env.reset("a cat").clone()
    inputs = env.model.transformer.wte.weight.clone()
    with caplog.at_level(logging.INFO, logger="tropism"):
        actor = make_actor(env, optimizer="adamw")
    assert "was tied to the input embedding" in caplog.text
    agent = actor.agent_ppo(update_interval=1, epochs=2, lr=1e-2)
    head = env.model.lm_head.weight.clone()
    for _ in range(2):
        play_episode(agent, env)
    assert not torch.equal(env.model.lm_head.weight, head)
    assert torch.equal(env.model.transformer.wte.weight, inputs)
    # The final norm follows the blocks, so what enters it is what the observation was made of.
    blocks = {name for name, p in env.model.named_parameters() if p.requires_grad}
    assert blocks == {"lm_head.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert env.reset("a cat").shape == before.shape


def test_pitfall_18_tied_blocks_stay_tied_below_and_frozen() -> None:
    env = make_env(family="gpt2")
    make_actor(env, unfreeze_layer_from_past=1)
    trained = {name for name, p in env.model.named_parameters() if p.requires_grad}
    assert env.model.lm_head.weight is env.model.transformer.wte.weight
    assert "transformer.wte.weight" not in trained
    assert all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in trained)


def test_pitfall_19_actions_follow_the_ids_of_a_vocabulary_with_holes() -> None:
    env = make_env()
    vocabulary = env.tokenizer.get_vocab()
    shown = {token: i for token, i in vocabulary.items() if i != A_ID}
    env.tokenizer.get_vocab = lambda: shown
    actions = env.actions
    assert len(actions) == VOCABULARY and actions[A_ID] == "" and actions[B_ID] == "b" and actions[EOS_ID] == "<eos>"


def test_pitfall_19_logging_stays_as_it_was() -> None:
    before = logging.root.manager.disable
    make_actor(make_env()).agent_ppo()
    assert logging.root.manager.disable == before < logging.CRITICAL


@pytest.mark.parametrize("items", [[0, 1, 2], [np.array(0), np.array(1), np.array(2)]], ids=["numbers", "arrays"])
def test_items_may_be_numbers(items: list[Any]) -> None:
    class Numbered(TextRLEnv):
        def gat_obs_input(self, input_item: Any) -> str:
            return ("abc", "xyz", "hello")[int(input_item)]

    env = Numbered(tiny_model("gpt2"), tiny_tokenizer(), items, max_length=4)
    for index in (1, 0, 2):
        env.reset(items[index])
        assert env.tokenizer.decode(env.prompt_ids) == ("abc", "xyz", "hello")[index]
