"""Every setting trains something, its model keeps the names of its weights, and steps are told as passes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import ALL_SETTINGS, PARTIAL_SETTINGS, SEQ2SEQ_SETTINGS, Setting, assemble, execute, make_recipe
from tropism.config import Recipe
from tropism.errors import ConfigError, ModelError
from tropism.models.saving import save_plain
from tropism.training.config import TrainerConfig
from tropism.training.optimizer import build_optimizer

SFT = Setting("sft", False, "llama")


def frozen_model(family: str) -> tuple[Any, Any]:
    """A model whose every weight was frozen by whoever had it before."""
    return tiny_model(family, seed=3).requires_grad_(False), tiny_tokenizer(add_eos=family in ("t5", "bart"))


@pytest.mark.parametrize("setting", ALL_SETTINGS + PARTIAL_SETTINGS + SEQ2SEQ_SETTINGS, ids=str)
def test_pitfall_25_no_setting_trains_nothing(setting: Setting, tmp_path: Path) -> None:
    """The source's fine_tune(optimized=False) froze all weights, and its optimizer held none."""
    assembly = assemble(setting, tmp_path / "run", model=frozen_model(setting.family))
    held = [p for group in assembly.trainer.optimizer.param_groups for p in group["params"]]
    assert held and all(parameter.requires_grad for parameter in held)
    trained = {id(p) for name, p in assembly.policy.named_parameters() if p.requires_grad}
    assert {id(parameter) for parameter in held} == trained


def test_pitfall_25_an_optimizer_without_weights_is_an_error() -> None:
    frozen = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ModelError, match="no weight of the model is trainable, so training would change nothing"):
        build_optimizer(frozen, TrainerConfig())


def names_in(folder: Path) -> set[str]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "setting",
    [
        SFT,
        Setting("sft", True, "llama"),
        Setting("sft", True, "gpt2"),
        Setting("sft", False, "llama", train_layers=1),
        Setting("sft", False, "llama", train_layers=0),
        Setting("ppo", False, "gpt2"),
        Setting("sft", True, "bart"),
    ],
    ids=str,
)
def test_pitfall_25_an_exported_model_has_the_keys_of_its_base(setting: Setting, tmp_path: Path) -> None:
    """The source's output head ended in a Sequential, so that its key was renamed, and it was random when loaded."""
    model = tiny_model(setting.family, seed=3)
    save_plain(model, tiny_tokenizer(), tmp_path / "base")
    changes: dict[str, Any] = {"model": (model, tiny_tokenizer(add_eos=setting.two_sided))}
    assembly = execute(assemble(setting, tmp_path / "run", total_steps=1, **changes), export=True)
    names = names_in(assembly.folder.path / "model")
    assert names == names_in(tmp_path / "base")
    head = type(assembly.policy.language_model.get_output_embeddings())
    assert head is nn.Linear


def test_pitfall_25_steps_are_told_as_passes_over_the_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The source's max_steps hid that its epochs were never reached."""
    with caplog.at_level(logging.INFO, logger="tropism"):
        assemble(SFT, tmp_path / "sft", total_steps=9)
        assemble(Setting("grpo", False, "llama"), tmp_path / "grpo", total_steps=9, prompts_per_step=2)
    told = [record.getMessage() for record in caplog.records if "passes over" in record.getMessage()]
    assert told == [
        "total_steps 9 x prompts_per_step 4: 6 passes over 6 texts",
        "total_steps 9 x prompts_per_step 2: 3 passes over 6 prompts",
    ]


def test_pitfall_25_there_is_one_number_of_steps(tmp_path: Path) -> None:
    """No second setting that another one hides: epochs are no field of a recipe."""
    values = {"model": "x/y", "algorithm": "sft", "data": "texts.txt", "total_steps": 200}
    with pytest.raises(ConfigError, match="epochs"):
        Recipe.from_mapping({**values, "num_train_epochs": 3})
    assembly = assemble(SFT, tmp_path / "run", total_steps=9)
    execute(assembly)
    assert assembly.trainer.counts.updates == 9 and assembly.trainer.counts.samples == 36
    assert torch.isfinite(torch.cat([p.flatten() for p in assembly.policy.parameters()])).all()
    assert make_recipe(SFT, tmp_path / "other").total_steps == 4
