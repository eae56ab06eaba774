"""Checkpoints as plain models: what a run would have ended with, had it ended there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tiny_runs import JUDGED_APART, TEXTS, Setting, assemble, execute, logged
from tropism.errors import ConfigError, ModelError
from tropism.export import export_model
from tropism.generation import save_policy
from tropism.models.policy import Policy
from tropism.training.config import CheckpointConfig, EvaluationConfig

SETTINGS = [
    Setting("sft", False, "llama"),
    Setting("ppo", True, "gpt2"),
    Setting("rloo", False, "gpt2", train_layers=0),
    Setting("conditioned", False, "gpt2"),
    Setting("quark", True, "gpt2"),
    Setting("ilql", True, "gpt2"),
    Setting("reward-model", False, "llama"),
]
EVERY = {"checkpoints": CheckpointConfig(every=1, keep=9), "evaluation": EvaluationConfig(every=1)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.export_checks.GREEDY", 1)


def base_of(setting: Setting, folder: Path) -> Path:
    """The model that a run starts from, as a folder that its recipe can name."""
    rows = VOCABULARY + 3 * (setting.method == "conditioned")
    save_policy(Policy(tiny_model(setting.family, seed=3, vocab_size=rows)), tiny_tokenizer(), None, folder / "base")
    return folder / "base"


def run_to(setting: Setting, run: Path, base: Path, *, steps: int, **changes: Any) -> None:
    execute(assemble(setting, run, model=str(base), total_steps=steps, normalise=None, **changes), export=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_checkpoint_is_what_a_shorter_run_ends_with(setting: Setting, tmp_path: Path) -> None:
    base = base_of(setting, tmp_path)
    targets = 0.5 if setting.method == "conditioned" else None
    run_to(setting, tmp_path / "long", base, steps=2, trainer=EVERY)
    run_to(setting, tmp_path / "short", base, steps=1)
    export = export_model(tmp_path / "long", tmp_path / "out", step=1, targets=targets)
    expected = export_model(tmp_path / "short", tmp_path / "expected", targets=targets)
    assert export.step == 1 and export.checkpoint is not None and export.checkpoint.startswith("step-000001-")
    assert export.targets == expected.targets
    last = export_model(tmp_path / "long", tmp_path / "last", targets=targets)
    one, other, later = (weights(x.folder) for x in (export, expected, last))
    assert one.keys() == other.keys()
    # bit for bit, as an interrupted run is exact
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], later[name]) for name in one), "the last step changed nothing"
    command = f"tropism export long {'--target-reward 0.5 ' if targets else ''}"
    card = (export.folder / "README.md").read_text()
    assert command in card and "--step 1 --out out" in card


def test_the_best_of_a_run(tmp_path: Path) -> None:
    """The best is a step before the last: a far too large learning rate, and a loss that is to be large."""
    setting = Setting("sft", False, "llama")
    base = base_of(setting, tmp_path)
    kept = CheckpointConfig(every=1, keep=9, best_metric="eval/loss", best_mode="max")
    trainer = {"checkpoints": kept, "evaluation": EvaluationConfig(every=1), "learning_rate": 0.1}
    run_to(setting, tmp_path / "run", base, steps=4, trainer=trainer, eval_data=TEXTS[:2])
    losses = {row["step"]: row["eval/loss"] for row in logged(tmp_path / "run", "evaluation")}
    best = max(losses, key=lambda step: losses[step])
    assert 0 < best < 4
    export = export_model(tmp_path / "run", tmp_path / "out", best=True)
    assert (export.step, export.checkpoint) == (best, "best")
    by_step = export_model(tmp_path / "run", tmp_path / "by step", step=best)
    one, other = weights(export.folder), weights(by_step.folder)
    assert all(torch.equal(one[name], other[name]) for name in one)
    card = (export.folder / "README.md").read_text()
    assert "tropism export run --best --out out" in card
    assert f"| {best} |" in card and "| 4 |" not in card, "evaluations of later steps are no part of it"


def test_what_cannot_be_taken(tmp_path: Path) -> None:
    setting = Setting("ppo", True, "gpt2")
    base = base_of(setting, tmp_path)
    run = tmp_path / "run"
    run_to(setting, run, base, steps=2, trainer=EVERY)
    with pytest.raises(ConfigError, match=r"no checkpoint after step 7, or export a checkpoint: --step 1, --step 2$"):
        export_model(run, tmp_path / "out", step=7)
    with pytest.raises(ConfigError, match=r"has no best/.*--step 1, --step 2$"):
        export_model(run, tmp_path / "out", best=True)
    # an unfinished run has checkpoints all the same
    shutil.rmtree(run / "model")
    export_model(run, tmp_path / "unfinished", step=1)
    # the base is gone, has moved, or is another
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"what the run .* started from cannot be loaded(.|\n)*--base MODEL"):
        export_model(run, tmp_path / "out", step=1)
    again = export_model(run, tmp_path / "again", step=1, base=tmp_path / "moved")
    one, other = weights(again.folder), weights(tmp_path / "unfinished")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ModelError, match=r"are not those that the run .* started from"):
        export_model(run, tmp_path / "out", step=1, base=(tiny_model("gpt2", seed=4), tiny_tokenizer()))
    damaged = next(iter(sorted((run / "checkpoints").iterdir()))) / "policy.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")
    with pytest.raises(ModelError, match="was changed"):
        export_model(run, tmp_path / "out", step=1, base=tmp_path / "moved")
    assert not (tmp_path / "out").exists()


def test_a_model_from_python_has_to_be_given_again(tmp_path: Path) -> None:
    setting = Setting("dpo", True, "llama")
    execute(assemble(setting, tmp_path / "run"), export=True)
    with pytest.raises(ConfigError, match=r"was given tuple of 2 given from Python.*--base MODEL"):
        export_model(tmp_path / "run", tmp_path / "out", step=4)
    model = (tiny_model("llama", seed=3), tiny_tokenizer())
    export_model(tmp_path / "run", tmp_path / "out", step=4, base=model)
    with torch.no_grad():
        ids = torch.tensor([[5, 9, 11, 7]])
        folders = (tmp_path / "out", tmp_path / "run" / "model")
        one, other = (AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits for folder in folders)
    assert torch.equal(one, other)


def test_a_reward_model_of_a_checkpoint_has_the_scale_of_training(tmp_path: Path) -> None:
    setting = Setting("reward-model", True, "gpt2")
    base = base_of(setting, tmp_path)
    run_to(setting, tmp_path / "run", base, steps=2, trainer=EVERY, eval_data=JUDGED_APART)
    export = export_model(tmp_path / "run", tmp_path / "out", step=1)
    assert "its scores have no known scale: compare them with each other alone" in export.notes
    assert "the adapter is merged into the weights" in export.notes
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["normalised"] is None
