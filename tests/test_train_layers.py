"""The recipe field train_layers, from the recipe to what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, TEXTS, Setting, assemble, early_letters, execute
from tropism.config import Recipe
from tropism.errors import ConfigError, ModelError
from tropism.models.lora import LoRA
from tropism.safe_yaml import parse_yaml

PLAIN: dict[str, Any] = {"model": "demo", "data": "prompts.txt", "algorithm": "grpo", "reward": "vader"}
FULL, LAST = Setting("sft", False, "llama"), Setting("sft", False, "llama", train_layers=1)


def test_it_is_a_field_of_recipes() -> None:
    assert Recipe.from_mapping(PLAIN).train_layers is None
    recipe = Recipe.from_mapping({**PLAIN, "train_layers": 2})
    assert recipe.train_layers == 2
    assert Recipe.from_mapping(parse_yaml(recipe.to_yaml(), "recipe")) == recipe


@pytest.mark.parametrize("layers", [0, -3])
def test_fewer_than_one_is_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=f"train_layers is {layers}; it must be at least 1"):
        Recipe.from_mapping({**PLAIN, "train_layers": layers})


def test_with_lora_both_are_named() -> None:
    with pytest.raises(ConfigError, match="lora and train_layers cannot go together"):
        Recipe.from_mapping({**PLAIN, "train_layers": 1, "lora": {"rank": 4}})


def test_more_than_there_are_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="train_layers is 3, and LlamaForCausalLM has 2 transformer blocks"):
        assemble(LAST, tmp_path / "run", train_layers=3)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_an_adapter_has_no_layers_to_train(tmp_path: Path) -> None:
    adapted = assemble(FULL, tmp_path / "lora", lora=LoRA(rank=2)).loaded.model
    with pytest.raises(ConfigError, match=r"the model is an adapter.*leave train_layers out"):
        assemble(LAST, tmp_path / "run", model=(adapted, tiny_tokenizer()))


def test_train_takes_it(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    tropism.train(
        (model, tiny_tokenizer()),
        "grpo",
        data=PROMPTS,
        reward=early_letters,
        run=tmp_path / "run",
        total_steps=1,
        prompts_per_step=2,
        sampling=tropism.Sampling(max_new_tokens=4),
        train_layers=1,
        trainer=tropism.TrainerConfig(progress=False),
    )
    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    block, norm, output = model.model.layers[1], model.model.norm, model.lm_head
    assert written["trained_weights"] == sum(p.numel() for m in (block, norm, output) for p in m.parameters())


def test_the_learning_rate_is_that_of_the_whole_model(tmp_path: Path) -> None:
    whole, part = (assemble(s, tmp_path / str(s), trainer={"learning_rate": None}).trainer for s in (FULL, LAST))
    assert part.learning_rate == whole.learning_rate < 1e-3


def test_a_run_goes_on_with_the_layers_it_began_with(tmp_path: Path) -> None:
    execute(assemble(LAST, tmp_path / "run", data=TEXTS))
    with pytest.raises(ConfigError, match="cannot go on with another recipe:\n  train_layers: 1 -> null"):
        assemble(FULL, tmp_path / "run", data=TEXTS, resume=True, total_steps=8)
