"""The recipe field train_layers, from the recipe to what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, TEXTS, Setting, assemble, early_letters, execute, logged, stop_after, weights_of
from tropism.build import Assembly
from tropism.config import Recipe
from tropism.errors import ConfigError, ModelError
from tropism.models.lora import LoRA
from tropism.safe_yaml import parse_yaml
from tropism.training import scoring
from tropism.training.interrupt import Interrupted

PLAIN: dict[str, Any] = {"model": "demo", "data": "prompts.txt", "algorithm": "grpo", "reward": "vader"}
FULL, LAST = Setting("sft", False, "llama"), Setting("sft", False, "llama", train_layers=1)


def test_it_is_a_field_of_recipes() -> None:
    assert Recipe.from_mapping(PLAIN).train_layers is None
    recipe = Recipe.from_mapping({**PLAIN, "train_layers": 2})
    assert recipe.train_layers == 2
    assert Recipe.from_mapping(parse_yaml(recipe.to_yaml(), "recipe")) == recipe


def test_fewer_than_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_layers is -3; give a number of transformer blocks, or 0 for the"):
        Recipe.from_mapping({**PLAIN, "train_layers": -3})
    assert Recipe.from_mapping({**PLAIN, "train_layers": 0}).train_layers == 0


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


# The output head alone ------------------------------------------------------------------------------------------------


def test_pitfall_18_training_the_head_moves_no_input_embedding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tropism")
    run = execute(assemble(Setting("grpo", False, "gpt2", train_layers=0), tmp_path / "run"), export=True)
    before = tiny_model("gpt2", seed=3).state_dict()
    after = run.policy.language_model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"lm_head.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    said = [record.message for record in caplog.records if record.message.startswith("trained: ")]
    assert said == [
        "trained: transformer.ln_f (64 weights), lm_head (1,184 weights); together 1,248 of "
        f"{sum(p.numel() for p in run.policy.language_model.parameters()):,} weights, the others stay frozen. "
        "The output embedding was tied to the input embedding; it is a matrix of its own now, a copy of 1,184 weights, "
        "and the input embedding stays frozen"
    ]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert plain.config.tie_word_embeddings is False
    assert plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight
    ids = torch.tensor([[5, 9, 30, 12]])
    with torch.no_grad():
        expected = run.policy.language_model.eval()(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_training_goes_on_from_an_exported_head(tmp_path: Path) -> None:
    setting = Setting("sft", False, "gpt2", train_layers=0)
    first = execute(assemble(setting, tmp_path / "first"), export=True)
    again = assemble(setting, tmp_path / "again", model=str(tmp_path / "first" / "model"))
    assert torch.equal(again.policy.language_model.lm_head.weight, first.policy.language_model.lm_head.weight)
    execute(again)


# Frozen blocks computed once per step ---------------------------------------------------------------------------------


def passes(run: Assembly) -> list[int]:
    """Counts the passes that frozen blocks of policy and reference compute while training."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    policies = [run.policy, *([run.reference.frozen] if run.reference is not None else [])]
    for policy in policies:
        next(iter(policy.trunk.blocks[0].children())).register_forward_hook(add)
    return count


def forget(run: Assembly) -> None:
    """Let frozen blocks be computed in every pass."""
    run.policy.trunk = None
    if run.reference is not None:
        run.reference.frozen.trunk = None


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_run_is_that_with_frozen_blocks_computed_in_every_pass(method: str, layers: int, tmp_path: Path) -> None:
    setting = Setting(method, False, "gpt2", train_layers=layers)
    runs = [assemble(setting, tmp_path / name) for name in ("once", "always")]
    counts = [passes(run) for run in runs]
    forget(runs[1])
    for run in runs:
        run.run.export = lambda: None
        run.run.execute(run.recipe.total_steps, resumed=None)
    assert counts[0][0] < counts[1][0]
    assert runs[0].policy.trunk.features.states is None
    one, other = (weights_of(run) for run in runs)
    for name, weight in one.items():
        # The gradient of a key's bias is zero but for rounding, of which Adam makes whole steps.
        queries_and_values = torch.arange(96).view(3, 32)[[0, 2]].flatten()
        part = queries_and_values if name.endswith("c_attn.bias") else slice(None)
        assert torch.allclose(weight[part], other[name][part], rtol=0, atol=1e-5), name
    for kind in ("collect", "update"):
        for row, expected in zip(*(logged(tmp_path / name, kind) for name in ("once", "always")), strict=True):
            assert row == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_a_resumed_run_computes_them_anew(tmp_path: Path) -> None:
    setting = Setting("grpo", False, "gpt2", train_layers=1)
    whole = execute(assemble(setting, tmp_path / "whole"))
    stopped = assemble(setting, tmp_path / "cut")
    stop_after(stopped, 2, 15)
    with pytest.raises(Interrupted):
        execute(stopped)
    saved = sum(file.stat().st_size for file in (tmp_path / "cut" / "checkpoints").rglob("*batch*"))
    assert saved < 20_000, "what frozen blocks give is not saved"
    resumed = assemble(setting, tmp_path / "cut", resume=True)
    count = passes(resumed)
    execute(resumed)
    assert count[0] > 0
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_what_does_not_fit_is_computed_in_every_pass_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tropism")
    setting = Setting("grpo", False, "gpt2", train_layers=1)
    execute(assemble(setting, tmp_path / "kept"))
    kept = [record.message for record in caplog.records]
    assert kept.count("the 1 frozen blocks are computed once per step, and what they give is kept") == 1
    monkeypatch.setattr(scoring, "MOST_KEPT_BYTES", 1000)
    caplog.clear()
    execute(assemble(setting, tmp_path / "not"))
    said = [r.message for r in caplog.records if r.message.startswith("frozen blocks are computed in every pass")]
    assert len(said) == 1 and "more than 0.0 GB" in said[0]


def test_one_pass_over_each_row_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tropism")
    setting = Setting("grpo", False, "gpt2", train_layers=1)
    execute(assemble(setting, tmp_path / "run", algorithm=setting.with_algorithm(num_epochs=1, kl_coef=0.0)))
    assert not any("frozen blocks" in record.message for record in caplog.records)
