"""A learner from elsewhere on the token-level environment: PPO of Stable-Baselines3 on hidden states.

The task is random walks (docs/randomwalks.md) on a small graph: a walk is a text, each token a node, and each step is
rewarded as it is taken. The language model itself stays as it is. What is trained is a policy of Stable-Baselines3 that
reads the model's hidden states and chooses tokens, as it would choose the moves of any other Gymnasium environment.

    pip install "tropism[gym]" stable-baselines3
    python examples/stable_baselines3_env.py            # about a minute on one core
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import tropism
from tropism.envs.randomwalks import RandomWalksConfig, read_graph
from tropism.envs.randomwalks_model import write_randomwalks

TASK = RandomWalksConfig(n_nodes=8, p_edge=0.25, max_length=8, seed=1)


class Walks(tropism.TextGenerationEnv):
    """A step along an edge costs 0.1, one beside the edges 0.5 and ends nothing; arriving along an edge earns 1."""

    def __init__(self, folder: Path, *, seed: int = 0) -> None:
        self.graph = read_graph(folder)
        super().__init__(
            str(folder / "model"),
            str(folder / "prompts.jsonl"),
            max_new_tokens=TASK.max_length - 1,
            stop="a",  # the goal
            seed=seed,
        )

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> float:
        """Of the newest token, which leads from the token before it to the next node."""
        *_, last, now = input_item["prompt"], *predicted_list[0]
        nodes = [ord(letter) - ord("a") if len(letter) == 1 else -1 for letter in (last, now)]
        if nodes[0] < 0 or nodes[1] not in self.graph.successors[nodes[0]]:
            return -0.5
        return 1.0 - 0.1 if now == "a" else -0.1


def mean_reward(learner: PPO, env: Any, episodes: int) -> float:
    """Of whole episodes of sampled tokens."""
    rewards, _ = evaluate_policy(learner, env, n_eval_episodes=episodes, deterministic=False)
    return float(np.mean(rewards))


def train(folder: Path, *, steps: int, places: int = 8, episodes: int = 100, seed: int = 0) -> tuple[float, float]:
    """The mean reward of an episode before and after so many tokens."""
    if not (folder / "graph.json").exists():
        write_randomwalks(folder, TASK, n_layer=2, n_embd=32, n_head=2)
    env = VecMonitor(DummyVecEnv([lambda place=place: Walks(folder, seed=seed + place) for place in range(places)]))
    learner = PPO(
        "MlpPolicy", env, n_steps=64, batch_size=128, learning_rate=1e-3, ent_coef=0.01, seed=seed, device="cpu"
    )
    before = mean_reward(learner, env, episodes)
    learner.learn(steps)
    after = mean_reward(learner, env, episodes)
    env.close()
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description="Stable-Baselines3 on the token-level environment")
    parser.add_argument("--steps", type=int, default=12_000, help="tokens to learn from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before, after = train(Path(scratch) / "walks", steps=arguments.steps, seed=arguments.seed)
    print(f"mean reward of an episode: {before:.2f} before, {after:.2f} after {arguments.steps} tokens")


if __name__ == "__main__":
    main()
