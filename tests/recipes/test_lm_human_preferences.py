"""The recipes of lm-human-preferences: the source's numbers, and the reward model that is trained with the policy.

That each of them runs, test_recipes.py says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tropism.algorithms import PPO
from tropism.cli import main
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.safe_yaml import parse_yaml, read_yaml
from tropism.schema import dump_yaml

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "lm-human-preferences"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the source's table says of a task: its texts, its reward model, its policy."""

    length: int
    prefix: str = ""
    suffix: str = ""
    start: str | None = None
    end: str | None = None
    response: int
    truncate: str
    after: int
    temperature: float
    labels: str
    num_train: int
    reward_batch: int
    reward_rate: float
    rollout_batch: int
    policy_batch: int
    policy_rate: float
    kl_coef: float
    adaptive: tuple[float, int] | None
    whiten: bool


STYLE: dict[str, Any] = {
    "length": 64,
    "start": ".",
    "end": ".",
    "response": 24,
    "truncate": ".",
    "after": 16,
    "temperature": 0.7,
    "num_train": 4992,
    "reward_batch": 32,
    "reward_rate": 5e-5,
    "rollout_batch": 512,
    "policy_batch": 512,
    "policy_rate": 1e-5,
    "kl_coef": 0.15,
    "adaptive": (6.0, 10_000),
    "whiten": True,
}
SUMMARY: dict[str, Any] = {
    "response": 75,
    "truncate": "\n",
    "after": 55,
    "num_train": 46_000,
    "reward_batch": 16,
    "reward_rate": 2.5e-5,
    "rollout_batch": 128,
    "policy_batch": 32,
    "policy_rate": 2e-6,
    "adaptive": None,
    "whiten": False,
}
# The articles that stand in for the source's hold no line breaks, which its texts end at.
ARTICLE: dict[str, Any] = {"length": 500, "prefix": "Article:\n\n", "suffix": "\n\nTL;DR:", "end": "."}
TASKS = {
    "sentiment": Task(**STYLE, labels="sentiment/offline_5k.json"),
    "descriptiveness": Task(**STYLE, labels="descriptiveness/offline_5k.json"),
    "cnndm": Task(**SUMMARY, **ARTICLE, temperature=0.5, labels="cnndm/online_45k.json", kl_coef=0.01),
    # The posts that stand in for the source's end in its suffix, of about 6 tokens, and begin with forum and title.
    "tldr": Task(**SUMMARY, length=512, temperature=0.7, labels="tldr/online_45k.json", kl_coef=0.03),
}
EPISODES = 1_000_000


def recipe_of(task: str, kind: str) -> Recipe:
    return Recipe.from_file(FOLDER / f"{task}-{kind}.yaml")


def test_there_are_two_recipes_of_each_task() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        f"{task}-{kind}.yaml" for task in TASKS for kind in ("reward", "policy")
    )


@pytest.mark.parametrize("kind", ["reward", "policy"])
@pytest.mark.parametrize("task", TASKS)
def test_texts_and_samples_are_those_of_the_source(task: str, kind: str) -> None:
    wanted, recipe = TASKS[task], recipe_of(task, kind)
    data = recipe.data if kind == "policy" else recipe.normalise and recipe.normalise.data
    assert isinstance(data, DataConfig) and data.prepare is not None
    prepare = data.prepare
    assert (prepare.length, prepare.prefix, prepare.suffix) == (wanted.length, wanted.prefix, wanted.suffix)
    assert (prepare.start_text, prepare.end_text) == (wanted.start, wanted.end)
    sampling, truncation = recipe.sampling, recipe.sampling.truncation
    assert (sampling.max_new_tokens, sampling.temperature) == (wanted.response, wanted.temperature)
    assert (sampling.top_k, sampling.top_p, sampling.min_new_tokens) == (0, 1.0, 0)
    assert truncation is not None
    assert (truncation.token, truncation.after, truncation.beyond) == (wanted.truncate, wanted.after, "train")
    assert (recipe.seed, recipe.model.name) == (1, "openai-community/gpt2")  # the source's 124M
    assert recipe.model.dtype == "float32"  # small steps of bfloat16 weights are lost to rounding
    trainer = recipe.trainer
    assert (trainer.schedule, trainer.warmup_steps, trainer.max_grad_norm) == ("linear", 0, None)
    assert (trainer.optimizer.eps, trainer.optimizer.weight_decay) == (1e-5, 0.0)


@pytest.mark.parametrize("task", TASKS)
def test_reward_models_have_the_source_s_numbers(task: str) -> None:
    wanted, recipe = TASKS[task], recipe_of(task, "reward")
    assert recipe.algorithm.name == "reward-model" and recipe.lora is None
    assert (recipe.data.path, recipe.data.limit) == (f"labels/{wanted.labels}", wanted.num_train)
    assert (recipe.prompts_per_step, recipe.trainer.learning_rate) == (wanted.reward_batch, wanted.reward_rate)
    assert recipe.total_steps * wanted.reward_batch == wanted.num_train  # one epoch, which the batch divides
    settings = recipe.normalise
    assert settings is not None and settings.policy == recipe.model.name
    assert (settings.samples, settings.before, settings.after) == (256, True, True)
    assert (
        recipe.sampling.batch_size == 128 <= wanted.rollout_batch
    )  # how many rows are sampled at once changes nothing


@pytest.mark.parametrize("task", TASKS)
def test_policies_have_the_source_s_numbers(task: str) -> None:
    wanted, recipe = TASKS[task], recipe_of(task, "policy")
    ppo = recipe.algorithm
    assert isinstance(ppo, PPO)
    assert (recipe.prompts_per_step, ppo.group_size) == (wanted.policy_batch, 1)
    assert recipe.total_steps == -(-EPISODES // wanted.policy_batch)
    assert recipe.trainer.learning_rate == wanted.policy_rate
    assert (ppo.num_epochs, ppo.minibatch_size) == (4, None)  # noptepochs 4, nminibatches 1
    assert (ppo.clip_low, ppo.clip_high, ppo.critic.clip, ppo.critic.coef) == (0.2, 0.2, 0.2, 0.1)
    assert (ppo.gamma, ppo.lam, ppo.whiten_advantages, ppo.entropy_coef) == (1.0, 0.95, True, 0.0)
    assert (ppo.critic.rate, ppo.critic.bootstrap_truncated) == (1.0, False)
    assert (ppo.kl_coef, ppo.whiten_rewards) == (wanted.kl_coef, wanted.whiten)
    assert ppo.missing_eos.score == -1.0 and ppo.missing_eos.penalty == 0.0
    assert ppo.kl.place == "reward"
    assert ppo.kl.target == (wanted.adaptive and wanted.adaptive[0])
    assert wanted.adaptive is None or ppo.kl.horizon == wanted.adaptive[1]
    assert recipe.reward is not None
    (term,) = recipe.reward.terms.values()
    assert term.use == f"recipes/lm-human-preferences/{task}-reward.yaml" and term.weight == 1.0
    assert (recipe.reward.clip, recipe.reward.scale, recipe.reward.normalise) == (None, "none", False)


@pytest.mark.parametrize("task", TASKS)
def test_pitfall_38_every_task_builds_and_two_of_them_do_not_whiten(task: str) -> None:
    """The source's file sets a key that does not exist for cnndm and tldr, so that these cannot be started at all."""
    whitens = task in ("sentiment", "descriptiveness")
    assert PPO.preset(f"lm-human-preferences/{task}").whiten_rewards == whitens
    for kind in ("reward", "policy"):
        recipe = recipe_of(task, kind)
        assert Recipe.from_mapping(plain(recipe)) == recipe
    algorithm = recipe_of(task, "policy").algorithm
    assert algorithm == PPO.preset(f"lm-human-preferences/{task}")


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it is written and read again."""
    mapping: dict[str, Any] = parse_yaml(recipe.to_yaml(), "the recipe")
    return mapping


# train_new_model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def commanded(stories: Path, tmp_path: Path) -> Callable[..., int]:
    """``tropism train sentiment-policy.yaml`` with a reward recipe beside it, both cut down to a tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    texts = ("she was very happy.", "he was sad and cold.", "it was a big red ball.", "they ran home")
    samples = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    labels = [
        {
            "query": [50259, *samples[row % 4]],
            **{f"sample{k}": samples[(row + k) % 4] for k in range(4)},
            "best": row % 3,
        }
        for row in range(4)
    ]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    books = [{"text": f"It was day {number}. One day the cat sat. It ran."} for number in range(6)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(book) + "\n" for book in books))
    reward: dict[str, Any] = read_yaml(FOLDER / "sentiment-reward.yaml")
    reward |= {"model": str(stories), "total_steps": 1, "prompts_per_step": 2}
    reward["data"] = str(tmp_path / "labels.json")
    reward["normalise"] |= {"policy": str(stories), "samples": 4}
    reward["normalise"]["data"] |= {"path": str(tmp_path / "books.jsonl"), "limit": 6}
    reward["sampling"] |= {"max_new_tokens": 6, "truncation": {"token": ".", "after": 2, "beyond": "train"}}
    reward["trainer"]["progress"] = False
    del reward["run"]
    (tmp_path / "reward.yaml").write_text(dump_yaml(reward))

    def train(*more: str) -> int:
        arguments = [
            *("--model", str(stories), "--run", str(tmp_path / "run"), "--total_steps", "1", "--prompts_per_step", "8"),
            *("--data.path", str(tmp_path / "books.jsonl"), "--data.limit", "6", "--trainer.progress", "false"),
            *("--reward.sentiment.use", str(tmp_path / "reward.yaml")),
            *("--sampling.max_new_tokens", "6", "--sampling.truncation.after", "2"),
        ]
        return main(["train", str(FOLDER / "sentiment-policy.yaml"), *arguments, *more])

    return train


def test_the_reward_model_is_trained_first(commanded: Callable[..., int], tmp_path: Path) -> None:
    assert commanded() == 0
    reward, run = tmp_path / "run-sentiment", tmp_path / "run"
    facts = json.loads((reward / "model" / "reward_model.json").read_text())
    assert facts["normalised"]["samples"] == 4
    written = Recipe.from_file(run / "recipe.yaml")
    assert written.reward is not None and written.reward.terms["sentiment"].use == str(reward)
    updates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("reward/sentiment" in line for line in updates)
    assert (run / "model" / "config.json").is_file() and (run / "report.html").is_file()


def test_a_dry_run_trains_neither_and_writes_nothing(
    commanded: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert commanded("--dry-run") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    shown = capsys.readouterr().out
    assert f"to be trained first, in {tmp_path}/run-sentiment:" in shown
    assert shown.count("Everything checked: ready to train.") == 2
    assert f"use: {tmp_path}/reward.yaml" in shown and "judgements: 4" in shown and "prompts: 6" in shown


def test_a_dry_run_finds_what_is_wrong_with_the_reward_model(
    commanded: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps([{"query": [5], "sample0": [6], "sample1": [7], "best": 2}] * 4))
    assert commanded("--dry-run") == 2
    assert "best" in capsys.readouterr().err
    assert commanded("--sampling.temperature", "0.5", "--dry-run") == 2
    assert "sampling.temperature is 0.5 in this recipe and 0.7 in" in capsys.readouterr().err
