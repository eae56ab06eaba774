"""Recipes of reward models: what is refused before anything is trained, and how they are written and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tiny_reward_models import encoder_tokenizer, tiny_encoder
from tiny_runs import JUDGED, PROMPTS, Setting, assemble, make_recipe
from tropism.build import Assembly, run_recipe
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.errors import ConfigError, DataError, ModelError, TropismError
from tropism.models.loading import ModelConfig
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.normalisation import Normalisation

FULL = Setting("reward-model", False, "llama")
RATED = [{"prompt": "a cat", "completion": text, "rating": float(len(text))} for text in (" sat.", " ran on.", "?")]


def bert() -> Any:
    return tiny_encoder("bert", seed=3), encoder_tokenizer()


# Refused before anything is trained -----------------------------------------------------------------------------------

PROMPTLESS = [{key: value for key, value in item.items() if key != "prompt"} for item in JUDGED]
WRONG: dict[str, tuple[Callable[[], dict[str, Any]], type[TropismError], str]] = {
    "an encoder without a policy": (
        lambda: {"model": bert(), "normalise": Normalisation(samples=8)},
        ConfigError,
        "normalise.policy is not named, .* it cannot: BertFor.* writes no text; .* Name the policy that",
    ),
    "an encoder as policy": (
        lambda: {"normalise": Normalisation(samples=8, policy=bert())},
        ModelError,
        "normalise.policy: BertForSequenceClassification has no output embedding, so it writes no text",
    ),
    "no prompts to complete": (
        lambda: {"data": PROMPTLESS},
        ConfigError,
        "the judgements have no prompts to sample completions of; name some: normalise.data",
    ),
    "no room for completions": (
        lambda: {"sampling": Sampling(max_new_tokens=64)},
        ConfigError,
        "max_new_tokens=64 leaves no room for a prompt in the model's context of 64",
    ),
    "a step larger than the data": (
        lambda: {"prompts_per_step": 7},
        ConfigError,
        "prompts_per_step is 7, but there are only 6 judgements to train on",
    ),
    "an empty completion": (
        lambda: {"data": [{**JUDGED[0], "completions": ["a", "", "b"]}]},
        DataError,
        r"completion 1 is empty",
    ),
    "a choice out of range": (lambda: {"data": [{**JUDGED[0], "choice": 3}]}, DataError, "choice"),
    "held-out data of another kind": (
        lambda: {"eval_data": RATED},
        ConfigError,
        "data holds judgements of the kind 'choice', and eval_data of the kind 'rating'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_training(name: str, tmp_path: Path) -> None:
    changes, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run_recipe(make_recipe(FULL, tmp_path / "run", **changes()))
    assert not (tmp_path / "run").exists()


def test_an_encoder_in_a_folder_does_not_write_the_completions_either(tmp_path: Path) -> None:
    model, tokenizer = bert()
    model.bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"reward model's own body would have to write .* it cannot: "):
        run_recipe(make_recipe(FULL, tmp_path / "run", model=str(tmp_path / "bert")))
    assert not (tmp_path / "run").exists()


def test_a_limit_that_the_data_cannot_fill_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in JUDGED))
    with pytest.raises(DataError, match=r"judged.jsonl holds 6 judgements, fewer than the limit of 7; lower it"):
        assemble(FULL, tmp_path / "run", data=DataConfig(path=str(path), limit=7))
    size = make_recipe(FULL, tmp_path / "run").prompts_per_step
    assembly: Any = assemble(FULL, tmp_path / "run", data=DataConfig(path=str(path), limit=size))
    assert len(assembly.trainer.source.stream.items) == size
    with pytest.raises(ConfigError, match=rf"data.limit is {size + 1}, which prompts_per_step={size} does not divide"):
        assemble(FULL, tmp_path / "run", data=DataConfig(path=str(path), limit=size + 1))


def test_settings_of_another_method_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward-model takes no reward; leave it out"):
        make_recipe(FULL, tmp_path / "run", reward=RewardConfig.of("length"))
    with pytest.raises(ConfigError, match="reward-model takes no train_layers; leave it out"):
        make_recipe(FULL, tmp_path / "run", train_layers=1)
    with pytest.raises(ConfigError, match="normalise is for reward models; ppo trains a policy: leave it out"):
        make_recipe(Setting("ppo", False, "llama"), tmp_path / "run", normalise=Normalisation())


# The recipe -----------------------------------------------------------------------------------------------------------

MAPPING: dict[str, Any] = {
    "model": "body",
    "algorithm": "reward-model",
    "data": "judged.jsonl",
    "normalise": {"policy": {"name": "policy", "dtype": "float32"}, "data": {"path": "books.jsonl", "limit": 3}},
}


def test_policy_and_prompts_of_the_scale_are_written_and_read_as_those_of_a_run(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping(MAPPING)
    assert recipe.normalise is not None
    assert recipe.normalise.policy == ModelConfig(name="policy", dtype="float32")
    assert recipe.normalise.data == DataConfig(path="books.jsonl", limit=3)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_file(tmp_path / "recipe.yaml") == recipe
    given = make_recipe(
        FULL, tmp_path / "run", normalise=Normalisation(policy=(tiny_model("llama"), tiny_tokenizer()), data=[*PROMPTS])
    )
    assert "policy: <tuple of 2 given from Python>\n  data: <list of 6 given from Python>" in given.to_yaml()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"nam": "x"}}, r"normalise\.policy\.nam: unknown key; did you mean 'name'"),
        ({"data": {"path": "x", "limits": 3}}, r"normalise\.data\.limits: unknown key; did you mean 'limit'"),
        ({"policy": {"name": "x", "trust_remote_code": True}}, "does not run the code of a model's authors"),
        ({"sample": 3}, r"normalise\.sample: unknown key; did you mean 'samples'"),
    ],
)
def test_wrong_settings_of_the_scale_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_mapping({**MAPPING, "normalise": change})


def test_assemblies_of_other_methods_are_not_affected(tmp_path: Path) -> None:
    assert type(assemble(Setting("sft", False, "llama"), tmp_path / "run")) is Assembly
