"""What is exported is what was trained, and the reference is what training started from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import tiny_model
from tiny_runs import ALL_SETTINGS, PARTIAL_SETTINGS, SETTINGS, Setting, assemble, execute, sample, weights_of
from tropism.models.reference import Reference
from tropism.models.saving import merged_weights
from tropism.training.checkpoint import list_checkpoints, read_checkpoint

IDS = torch.tensor([[5, 9, 11, 7, 3, 30, 2, 8], [1, 2, 2, 36, 20, 6, 6, 4]])


@pytest.mark.parametrize("setting", [s for s in ALL_SETTINGS + PARTIAL_SETTINGS if s.trains_policy], ids=str)
def test_exported_model_has_the_logits_of_the_trained_one(setting: Setting, tmp_path: Path) -> None:
    assembly = execute(assemble(setting, tmp_path / "run"), export=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        trained = assembly.policy.model(input_ids=IDS).logits
        exported = loaded(input_ids=IDS).logits
        original = tiny_model(setting.family, seed=3)(input_ids=IDS).logits
    assert float((trained - exported).abs().max()) < 1e-5
    assert float((trained - original).abs().max()) > 1e-3, "nothing was trained"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("a cat")["input_ids"] == assembly.loaded.tokenizer("a cat")["input_ids"]


@pytest.mark.parametrize("setting", [s for s in SETTINGS + PARTIAL_SETTINGS if s.trains_policy], ids=str)
def test_reference_never_moves(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    reference = assembly.reference or Reference(assembly.policy)
    rollouts = sample(assembly)
    with torch.no_grad(), reference.active() as model:
        before = model(**rollouts.inputs).logprobs
    execute(assembly)
    with torch.no_grad(), reference.active() as model:
        after = model(**rollouts.inputs).logprobs
    with torch.no_grad():
        own = assembly.policy(**rollouts.inputs).logprobs
    assert torch.equal(before, after)
    assert not torch.equal(own, after)


def test_reference_of_a_run_that_starts_from_an_adapter_is_that_adapter(tmp_path: Path) -> None:
    first = execute(assemble(Setting("sft", True, "llama"), tmp_path / "sft"))
    start = merged_weights(first.loaded.model)  # type: ignore[arg-type]
    second = assemble(
        Setting("grpo", False, "llama"), tmp_path / "grpo", model=(first.loaded.model, first.loaded.tokenizer)
    )
    assert second.reference is not None and second.reference.kind == "adapter"
    execute(second)
    plain = tiny_model("llama", seed=3)
    plain.load_state_dict(start)
    with torch.no_grad(), second.reference.active() as model:
        logits = model.model(input_ids=IDS).logits
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        trained = second.policy.model(input_ids=IDS).logits
    assert float((logits - expected).abs().max()) < 1e-5
    assert float((trained - expected).abs().max()) > 1e-3


def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    assembly = assemble(Setting("ppo", True, "gpt2"), tmp_path / "run")
    before = weights_of(assembly)
    after = weights_of(execute(assembly))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name or name.startswith("value_head") for name in moved)


@pytest.mark.parametrize("setting", PARTIAL_SETTINGS, ids=str)
def test_only_the_last_block_is_trained_and_saved(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    before = weights_of(assembly)
    after = weights_of(execute(assembly))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    top = ("model.transformer.h.1.", "model.transformer.ln_f.", "value_head.", "conditioning.", "q_heads.")
    assert {name for name, p in assembly.policy.named_parameters() if p.requires_grad} == {
        name for name in before if name.startswith(top) and not name.startswith("q_heads.targets.")
    }
    assert "model.transformer.ln_f.weight" in moved and all(name.startswith(top) for name in moved)
    tensors = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).tensors
    assert all(name.startswith(top) for part in ("policy", "optimizer") for name in tensors[part])
    assert tensors["policy"].keys() >= moved
