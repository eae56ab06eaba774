"""The example loops against ``tropism.train``: two independent ways to the same numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tropism import GRPO, PPO, LoRA, Sampling, TrainerConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = ["a cat", "the big dog", "oh", "is it so, my friend?", "we ran", "no"]
STEPS = 3
RATE = 1e-3


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def letter_e(completions: list[str]) -> list[float]:
    return [text.count("e") / max(1, len(text)) for text in completions]


def fresh(source: str, folder: Path) -> Any:
    """A model to train: a tiny random one with its tokenizer, or the real small one."""
    return (tiny_model("llama", seed=3), tiny_tokenizer()) if source == "tiny" else str(folder)


def by_library(model: Any, algorithm: Any, run: Path, lora: LoRA | None) -> tuple[Any, dict[str, list[float]]]:
    result = tropism.train(
        model,
        algorithm,
        data=PROMPTS,
        reward=letter_e,
        run=run,
        total_steps=STEPS,
        prompts_per_step=4,
        seed=5,
        sampling=Sampling(max_new_tokens=12),
        lora=lora,
        trainer=TrainerConfig(learning_rate=RATE, progress=False),
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    collects = [row for row in rows if row["kind"] == "collect"]
    updates = [row for row in rows if row["kind"] == "update"]
    epochs = len(updates) // STEPS
    last = updates[epochs - 1 :: epochs]
    losses = [sum(v for k, v in row.items() if k.startswith("loss/") and k != "loss/total") for row in last]
    return result.policy.policy, {
        "reward": [row["reward/mean"] for row in collects],
        "sequence_kl": [row["policy/sequence_kl"] for row in collects],
        "loss": losses,
    }


def assert_equal_training(
    example: tuple[Any, list[dict[str, float]]], library: tuple[Any, dict[str, list[float]]]
) -> None:
    policy, history = example
    expected_policy, expected = library
    for name, values in expected.items():
        # A KL near 0 is a difference of sums of log-probs, of which fp32 keeps five digits after the point.
        absolute = 1e-5 if name == "sequence_kl" else 1e-6
        assert [row[name] for row in history] == pytest.approx(values, rel=1e-5, abs=absolute), name
    ours, theirs = policy.state_dict(), expected_policy.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3)
        assert error < 1e-5, f"{name} differs by {error:.2g} of its norm"


CASES = [("tiny", None), ("tiny", LoRA(rank=4)), ("stories", None)]


@pytest.mark.parametrize(("source", "lora"), CASES)
def test_the_grpo_loop_is_the_grpo_of_the_library(
    source: str, lora: LoRA | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("stories") if source == "stories" else tmp_path
    settings: dict[str, Any] = {"group_size": 4, "kl_coef": 0.1}
    example = load("grpo_loop").train(
        fresh(source, folder),
        PROMPTS,
        letter_e,
        steps=STEPS,
        seed=5,
        prompts_per_step=4,
        learning_rate=RATE,
        max_new_tokens=12,
        lora=lora,
        **settings,
    )
    library = by_library(fresh(source, folder), GRPO(**settings), tmp_path / "run", lora)
    assert_equal_training(example, library)


@pytest.mark.parametrize(("source", "lora"), CASES)
def test_the_ppo_loop_is_the_ppo_of_the_library(
    source: str, lora: LoRA | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("stories") if source == "stories" else tmp_path
    settings: dict[str, Any] = {"group_size": 4, "kl_coef": 0.1, "num_epochs": 2}
    example = load("ppo_loop").train(
        fresh(source, folder),
        PROMPTS,
        letter_e,
        steps=STEPS,
        seed=5,
        prompts_per_step=4,
        learning_rate=RATE,
        max_new_tokens=12,
        lora=lora,
        **settings,
    )
    library = by_library(fresh(source, folder), PPO(**settings), tmp_path / "run", lora)
    assert_equal_training(example, library)


def test_the_loops_change_the_model(tmp_path: Path) -> None:
    """Otherwise equal weights would say nothing."""
    policy, _ = load("grpo_loop").train(
        fresh("tiny", tmp_path), PROMPTS, letter_e, steps=1, prompts_per_step=4, group_size=4, max_new_tokens=12
    )
    before = tiny_model("llama", seed=3).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_the_loops_of_both_methods_draw_the_same_first_samples(tmp_path: Path) -> None:
    shared = {"steps": 1, "seed": 9, "prompts_per_step": 3, "group_size": 2, "max_new_tokens": 8}
    _, one = load("grpo_loop").train(fresh("tiny", tmp_path), PROMPTS, letter_e, **shared)
    _, other = load("ppo_loop").train(fresh("tiny", tmp_path), PROMPTS, letter_e, **shared)
    assert one[0]["reward"] == other[0]["reward"]
    assert one[0]["sequence_kl"] == pytest.approx(0, abs=1e-4)


def test_the_custom_rewards_are_logged_under_their_names(tmp_path: Path) -> None:
    example = load("custom_reward")
    result = example.train(
        (tiny_model("llama", seed=3), tiny_tokenizer()),
        steps=1,
        run=tmp_path / "run",
        trainer=TrainerConfig(progress=False),
    )
    assert {"reward/mentions", "reward/calm", "mentions/any"} <= result.metrics.keys()


def test_a_custom_reward_counts_the_words_of_its_own_record() -> None:
    logged: dict[str, float] = {}
    shares = load("custom_reward").mentions(
        ["warm sun", "bread", ""], [["sun", "warm"], ["salt", "bread"], ["sea"]], logged.__setitem__
    )
    assert shares == [1.0, 0.5, 0.0]
    assert logged == {"mentions/any": pytest.approx(2 / 3)}
