"""What a reward at every token is worth: the same reward paid token by token, or as one sum at the end.

A tiny model writes 48 letters; each letter that follows its predecessor in the alphabet (a follows p) earns 1/48. Both
ways pay the same for every text, so both train towards the same; paid token by token, each letter is credited with what
it and later letters earn, and not with what was paid before it. Prints how many updates each way took to a mean of
0.45.

    python examples/token_rewards.py            # PPO and GRPO, five seeds, some minutes on a laptop
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tropism

LETTERS = "abcdefghijklmnop"
LENGTH = 48
GOAL = 0.45
"""Just below what two letters in turns earn, a habit that a reward paid as one sum does not always leave."""
WINDOW = 5
"""Steps over which the training reward is averaged."""


def token_rewards(prompts: list[str], completion_ids: list[list[int]]) -> list[list[float]]:
    """One number per token: 1/48 for a letter that follows the one before it in the alphabet."""
    rewards = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        before = [LETTERS.index(prompt), *ids]
        rewards.append(
            [float(now == (last + 1) % len(LETTERS)) / LENGTH for last, now in zip(before, ids, strict=False)]
        )
    return rewards


def summed(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
    """The same, paid at the end."""
    return [sum(paid) for paid in token_rewards(prompts, completion_ids)]


def small_model(seed: int) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """A random model of 16 letters that never ends a text by itself."""
    torch.manual_seed(seed)
    vocabulary = {letter: index for index, letter in enumerate([*LETTERS, "<pad>"])}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="<pad>")
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=LENGTH + 1,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config), tokenizer


def updates_to_goal(method: str, reward: Any, *, seed: int, steps: int) -> tuple[int | None, float]:
    """Updates until the mean reward of WINDOW steps is at the goal (None: never), and the mean of the last ones."""
    common = {"group_size": 8, "kl_coef": 0.0}
    algorithm = tropism.PPO(**common, num_epochs=1) if method == "ppo" else tropism.GRPO(**common)
    with tempfile.TemporaryDirectory() as folder:
        tropism.train(
            small_model(seed),
            algorithm,
            data=list(LETTERS),
            reward=reward,
            run=Path(folder) / "run",
            total_steps=steps,
            prompts_per_step=4,
            seed=seed,
            sampling=tropism.Sampling(max_new_tokens=LENGTH),
            trainer=tropism.TrainerConfig(learning_rate=1e-3, progress=False, preflight=False),
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    means = [number for line in lines if (number := json.loads(line).get("reward/mean")) is not None]
    smooth = [statistics.mean(means[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(means))]
    reached = next((i + 1 for i, mean in enumerate(smooth) if i + 1 >= WINDOW and mean >= GOAL), None)
    return reached, smooth[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewards at every token against their sum at the end")
    parser.add_argument("--methods", nargs="+", default=["ppo", "grpo"], choices=["ppo", "grpo"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="most updates of a run")
    options = parser.parse_args()
    for method in options.methods:
        medians = {}
        for name, reward in (("token by token", token_rewards), ("summed at the end", summed)):
            found = [updates_to_goal(method, reward, seed=seed, steps=options.steps) for seed in range(options.seeds)]
            counts = [count or options.steps for count, _ in found]
            medians[name] = statistics.median(counts)
            ends = ", ".join(f"{end:.2f}" for _, end in found)
            shown = ", ".join("never" if count is None else str(count) for count, _ in found)
            print(f"{method} {name}: {shown} updates to a reward of {GOAL}; at the end {ends}", flush=True)
        print(
            f"{method}: {medians['token by token'] / medians['summed at the end']:.2f} of the updates (medians)",
            flush=True,
        )


if __name__ == "__main__":
    main()
