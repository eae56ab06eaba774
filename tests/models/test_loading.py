"""Models load from every kind of source, without dropout and without running what a folder asks for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer
from tropism.errors import ModelError
from tropism.models.loading import ModelConfig, load_model
from tropism.models.saving import save_plain

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "tiny-llama")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | fields))


# Sources.


def test_a_folder_loads_in_eval_mode(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert loaded.source == str(folder)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    torch.testing.assert_close(logits(loaded.model), logits(FAMILIES["llama"]()), atol=1e-5, rtol=0)
    assert (loaded.tokens.pad_id, loaded.tokens.eos_ids, loaded.tokens.bos_id) == (0, (2,), 1)


def test_objects_in_memory_are_used_as_they_are() -> None:
    model, tokenizer = FAMILIES["gpt2"](), tiny_tokenizer()
    loaded = load_model((model, tokenizer))
    assert loaded.model is model and loaded.tokenizer is tokenizer
    assert load_model(loaded) is loaded


def test_a_real_model_loads(stories: Path) -> None:
    loaded = load_model(str(stories))
    assert (loaded.tokens.bos_id, loaded.tokens.eos_ids, loaded.tokens.pad_id) == (1, (1,), 2)


@pytest.mark.parametrize("source", [42, ("model", "tokenizer"), (FAMILIES["gpt2"](),)])
def test_other_objects_are_refused(source: Any) -> None:
    with pytest.raises(ModelError, match="a model is a hub id"):
        load_model(source)


def test_dtype_and_device_can_be_chosen(folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(folder), dtype="bfloat16", device="cpu"))
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.device.type == "cpu"
    with pytest.raises(ModelError, match="device is 'gpu'"):
        load_model(ModelConfig(name=str(folder), device="gpu"))
    with pytest.raises(ModelError, match="dtype is 'int8'"):
        ModelConfig(name=str(folder), dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, tmp_path: Path) -> None:
    save_plain(FAMILIES[family](), tiny_tokenizer(), tmp_path / "model")
    gradients = []
    for checkpointing in (False, True):
        model = load_model(ModelConfig(name=str(tmp_path / "model"), gradient_checkpointing=checkpointing)).model
        model.train()
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-6)


# Dropout.


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
    ],
)
@pytest.mark.parametrize("from_folder", [True, False])
def test_dropout_is_off_even_in_train_mode(
    family: str, fields: dict[str, Any], from_folder: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, **fields)
    expected = logits(model)
    if from_folder:
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        loaded = load_model(ModelConfig(name=str(tmp_path), attention="eager")).model
    else:
        loaded = load_model((model, tiny_tokenizer())).model
    loaded.train()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert not any(module.p for module in loaded.modules() if isinstance(module, nn.Dropout))


def test_dropout_inside_an_adapter_is_off() -> None:
    adapted = get_peft_model(FAMILIES["llama"](), LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    model = load_model((adapted, tiny_tokenizer())).model
    expected = logits(model)
    model.train()
    assert torch.equal(logits(model), expected)


# Special tokens.


@pytest.mark.parametrize(
    ("declared", "generation_eos", "eos_ids", "pad"),
    [
        ({}, None, (2,), 0),
        ({}, [2, 4], (2, 4), 0),
        ({}, 4, (2, 4), 0),
        ({"pad": False}, None, (2,), 2),
        ({"pad": False, "eos": False}, [4, 3], (4, 3), 4),
        ({"pad": False, "eos": False}, None, (), 0),
    ],
)
def test_special_tokens(
    declared: dict[str, bool],
    generation_eos: Any,
    eos_ids: tuple[int, ...],
    pad: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = FAMILIES["llama"]()
    model.generation_config.eos_token_id = generation_eos
    rows = model.get_input_embeddings().weight.shape[0]
    with caplog.at_level(logging.WARNING, logger="tropism"):
        loaded = load_model((model, tiny_tokenizer(**declared)))
    assert (loaded.tokens.eos_ids, loaded.tokens.pad_id) == (eos_ids, pad)
    assert ("no eos" in caplog.text) == (not eos_ids)
    assert model.get_input_embeddings().weight.shape[0] == rows


def test_a_model_without_bos_has_none() -> None:
    assert load_model((FAMILIES["llama"](), tiny_tokenizer(bos=False))).tokens.bos_id is None


def test_a_vocabulary_larger_than_the_embeddings_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"38 tokens .* 37 only"):
        load_model((FAMILIES["llama"](), tokenizer))


# What cannot be loaded.


def test_a_missing_folder_names_the_closest(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder .*tiny-lama; the closest is .*tiny-llama$"):
        load_model(str(folder.parent / "tiny-lama"))
    with pytest.raises(ModelError, match=r"no file .*; the closest is .*tiny-llama$"):
        load_model(str(folder.parent / "tiny-llama.gguf"))


def test_a_folder_that_is_no_model_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(str(run))
    (run / "weights.gguf").touch()
    with pytest.raises(ModelError, match=r"give the file: .*weights.gguf"):
        load_model(str(run))
    shutil.copytree(folder, run / "model")
    with pytest.raises(ModelError, match=r"its model is in .*run/model"):
        load_model(str(run))
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        load_model(str(folder / "config.json"))


def test_a_hub_id_without_network_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r'(?s)someone/some-model.*HF_HUB_OFFLINE.*"demo"'):
        load_model("someone/some-model")


def test_an_encoder_decoder_that_does_not_say_how_its_decoder_begins_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration names no decoder_start_token_id"):
        load_model(str(tmp_path))
    config.decoder_start_token_id = 0
    assert load_model((T5ForConditionalGeneration(config), tiny_tokenizer())).tokens.eos_ids


def test_a_classifier_is_refused_instead_of_getting_a_random_head(tmp_path: Path) -> None:
    config = FAMILIES["llama"]().config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification; a causal LM is needed"):
        load_model(str(tmp_path))
    edit(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelError, match=r"lm_head.weight would be random"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("file", "content"), [("config.json", "{"), ("model.safetensors", "{"), ("config.json", "{}")])
def test_damaged_files_name_the_folder(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match="tiny-llama"):
        load_model(str(folder))


# Folders that ask for code or for files outside.


def test_code_named_in_a_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    reference = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    edit(
        folder / "config.json",
        auto_map=reference,
        _attn_implementation_internal="someone/kernel",
        attn_implementation="someone/kernel",
        trust_remote_code=True,
    )
    edit(folder / "tokenizer_config.json", auto_map=reference)
    model = load_model(str(folder)).model
    assert type(model) is LlamaForCausalLM
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(model.config, "auto_map")

    edit(folder / "config.json", model_type="evil")
    with pytest.raises(ModelError, match=r"'evil'.*trust_remote_code"):
        load_model(str(folder))
    assert not witness.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors"])
def test_a_weight_index_cannot_leave_the_folder(folder: Path, name: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(FAMILIES["llama"]().state_dict(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ModelError, match="outside its folder"):
        load_model(str(folder))


# Adapter folders.


def test_an_adapter_with_more_than_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=r"merge it into its base"):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_whose_base_is_gone_says_so(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"no folder .*tiny-llama"):
        load_model(str(tmp_path / "adapter"))
