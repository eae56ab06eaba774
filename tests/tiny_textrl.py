"""Environments, actors and agents of the TextRL facade over tiny random models."""

from __future__ import annotations

from typing import Any

from tiny_models import tiny_model, tiny_tokenizer
from tropism.envs.textrl import TextRLActor, TextRLAgent, TextRLEnv

ITEMS = [{"input": "a cat", "label": "x"}, {"input": "oh", "label": "y"}]


class LettersEnv(TextRLEnv):
    """Every "a" is worth 1 at once, and a completion that ends by itself 10 at the end."""

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        newest = [float(tokens[-1] == "a") for tokens in predicted_list]
        ended = [10.0 * (finish and tokens[-1] == "<eos>") for tokens in predicted_list]
        return [one + other for one, other in zip(newest, ended, strict=True)]


def make_env(kind: type[TextRLEnv] = LettersEnv, *, family: str = "gpt2", seed: int = 0, **settings: Any) -> Any:
    """An environment of ``kind`` over a new tiny model; any, since subclasses of tests have further attributes."""
    model, tokenizer = tiny_model(family, seed=seed), tiny_tokenizer()
    return kind(model, tokenizer, **{"observation_input": ITEMS, "max_length": 6, **settings})


def make_actor(env: TextRLEnv, **settings: Any) -> TextRLActor:
    """An actor of the environment's own model."""
    return TextRLActor(env, env.model, env.tokenizer, **settings)


def play_episode(agent: TextRLAgent, env: TextRLEnv, item: Any = None, *, most: int | None = None) -> tuple[Any, int]:
    """One training episode in the way of TextRL's manual loop: the sum of its rewards per sample, and its steps."""
    obs = env.reset(item)
    total, t = 0, 0
    while True:
        action = agent.act(obs)
        obs, reward, done, _ = env.step(action)
        total += reward
        t += 1
        reset = t == most
        agent.observe(obs, reward, done, reset)
        if done or reset:
            return total, t
