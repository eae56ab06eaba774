"""Saved folders load without this library and compute the same; the live model is never touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer
from tropism.errors import ModelError, StorageError
from tropism.models.loading import load_model
from tropism.models.lora import LoRA, add_lora
from tropism.models.saving import replacing, save_adapter, save_plain, verify_plain

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    output: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return output


def train_a_little(model: PeftModel) -> None:
    """Give the adapter weights that change the outputs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_equal(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    save_plain(model, tiny_tokenizer(), tmp_path / "model")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)

    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(load_model(str(tmp_path / "model")).model), logits(model), atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("abc").input_ids == [5, 6, 7]
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_merged_into_a_copy(family: str, tmp_path: Path) -> None:
    model = add_lora(FAMILIES[family](), LoRA(rank=4), seed=0)
    untrained = logits(model)
    train_a_little(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    assert (expected - untrained).abs().max() > 0.1

    save_plain(model, tiny_tokenizer(), tmp_path / "model")

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert verify_plain(model, tmp_path / "model", IDS) <= 1e-5


def test_verify_plain_sees_another_model(tmp_path: Path) -> None:
    save_plain(tiny_model("llama", seed=1), tiny_tokenizer(), tmp_path / "model")
    assert verify_plain(tiny_model("llama", seed=0), tmp_path / "model", IDS) > 0.1


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_tied_embeddings_stay_tied_and_others_apart(family: str, tied: bool, tmp_path: Path) -> None:
    save_plain(add_lora(FAMILIES[family](), LoRA(rank=2), seed=0), tiny_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.tie_word_embeddings == tied


def test_a_bfloat16_model_is_rounded_once(tmp_path: Path) -> None:
    base: Any = FAMILIES["llama"]()
    model = add_lora(base.to(torch.bfloat16), LoRA(rank=4), seed=0)
    train_a_little(model)
    save_plain(model, tiny_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)

    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    by_hand = (layer.base_layer.weight.float() + delta).bfloat16()
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.model.layers[0].self_attn.q_proj.weight, by_hand, atol=0, rtol=2**-8)


@pytest.mark.parametrize("fields", [{"do_sample": False, "temperature": 0.5}, {"do_sample": False, "num_beams": 0}])
def test_an_invalid_generation_config_does_not_prevent_saving(fields: dict[str, object], tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    save_plain(model, tiny_tokenizer(), tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 2


def test_an_invalid_generation_config_keeps_every_token_that_it_names(tmp_path: Path) -> None:
    model = tiny_model("bart")
    wanted = {"decoder_start_token_id": 3, "forced_bos_token_id": 5, "forced_eos_token_id": 2, "suppress_tokens": [7]}
    for name, value in {**wanted, "num_beams": 0}.items():
        setattr(model.generation_config, name, value)
    save_plain(model, tiny_tokenizer(), tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in wanted} == wanted


def test_the_saved_configuration_names_no_code_path_or_quantisation(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.config.name_or_path = str(tmp_path / "secret")
    model.config.quantization_config = {"quant_method": "gguf"}
    save_plain(model, tiny_tokenizer(), tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    assert not any(word in text for word in ("quantization_config", "auto_map", "attn_implementation", "secret"))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    model: Any = FAMILIES["llama"]()
    model.is_quantized = True
    with pytest.raises(ModelError, match="quantised"):
        save_plain(model, tiny_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_plain(tiny_model("llama", seed=seed), tiny_tokenizer(), tmp_path / "model")
        (tmp_path / "model" / f"by-seed-{seed}").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "by-seed-0").exists()
    assert verify_plain(tiny_model("llama", seed=1), tmp_path / "model", IDS) <= 1e-5


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()

    def write_half() -> None:
        with replacing(tmp_path / "model") as folder:
            (folder / "new").touch()
            raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        write_half()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_writing_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(ModelError, match="is a file"):
        save_plain(FAMILIES["llama"](), tiny_tokenizer(), tmp_path / "model")


def test_an_adapter_folder_loads_on_its_base(tmp_path: Path) -> None:
    save_plain(FAMILIES["gpt2"](), tiny_tokenizer(), tmp_path / "base")
    base = load_model(str(tmp_path / "base")).model
    assert isinstance(base, PreTrainedModel)
    model = add_lora(base, LoRA(rank=4), seed=0)
    train_a_little(model)
    expected = logits(model)

    save_adapter(model, tmp_path / "adapter")

    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = load_model(str(tmp_path / "adapter"))
    assert isinstance(loaded.model, PeftModel)
    assert torch.equal(logits(loaded.model), expected)
    trainable = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
