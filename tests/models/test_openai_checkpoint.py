"""OpenAI's checkpoints: what TensorFlow wrote against GPT-2 by its formulas, and files that do not fit together."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bundle_writer import write_bundle
from openai_gpt2 import BIAS, CHECKPOINTS, GAIN, HEAD_BIAS, SIZES, encoder, logits, reward, variables, weights_of
from tropism.errors import ConfigError, ModelError
from tropism.foreign.tensor_bundle import TensorBundle
from tropism.models import openai_checkpoint
from tropism.models.loading import load_model
from tropism.models.openai_checkpoint import convert_openai_checkpoint
from tropism.models.reward_files import load_reward_model
from tropism.models.saving import save_plain

ENCODING = CHECKPOINTS / "gpt2"
TEXTS = ([1], [5, 33, 62, 0], [63, 1, 2, 3, 34, 60, 7, 8, 9, 40, 11, 12])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "model"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the language model, to be damaged."""
    shutil.copytree(CHECKPOINTS / "gpt2", tmp_path / "gpt2")
    return tmp_path / "gpt2"


def convert_folder(folder: str, out: Path, **options: Any) -> openai_checkpoint.Conversion:
    return convert_openai_checkpoint(CHECKPOINTS / folder, out, encoding=ENCODING, **options)


def refusal(source: Path, out: Path, error: type[Exception] = ModelError, **options: Any) -> str:
    """The message; nothing must be left behind."""
    with pytest.raises(error) as caught:
        convert_openai_checkpoint(source, out, **options)
    assert not out.exists() and not (out.parent.exists() and list(out.parent.iterdir()))
    return str(caught.value)


def rewrite(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the language model's checkpoint anew with other tensors."""
    tensors: dict[str, Any] = {name: weights_of(name, shape) for name, shape in variables("model", SIZES["gpt2"])}
    change(tensors)
    write_bundle(source, "model.ckpt", tensors)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# What comes out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "scope", "variable_scope"),
    [
        ("gpt2", None, "model"),
        ("run/policy", None, "policy/model"),
        ("run/policy", "ref_policy", "ref_policy/model"),
        ("run/reward_model", "ref_policy", "ref_policy/model"),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_formulas(folder: str, scope: str | None, variable_scope: str, out: Path) -> None:
    convert_folder(folder, out, scope=scope)
    model = AutoModelForCausalLM.from_pretrained(out)
    for ids in TEXTS:
        found = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        assert np.abs(found - logits(variable_scope, SIZES[folder], ids)).max() < 1e-5


@torch.no_grad()
def test_a_reward_model_scores_as_by_the_formulas(out: Path) -> None:
    conversion = convert_folder("run/reward_model", out)
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert plain.config.tropism_reward_offset == conversion.offset == GAIN * HEAD_BIAS + BIAS
    pad, longest = plain.config.pad_token_id, max(map(len, TEXTS))
    rows = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in TEXTS])
    expected = np.array([reward(ids) for ids in TEXTS])
    assert expected.std() > 0.1
    found = plain(input_ids=rows, attention_mask=(rows != pad).long()).logits[:, 0].numpy() + conversion.offset
    assert np.abs(found - expected).max() < 1e-5
    model, tokenizer, facts = load_reward_model(out)
    assert np.abs(model(rows, torch.tensor([len(ids) for ids in TEXTS])).numpy() - expected).max() < 1e-5
    assert facts.text == "prompt+completion" and facts.gain == GAIN
    assert tokenizer.pad_token_id == pad == 64 != tokenizer.eos_token_id
    assert plain.config.num_labels == 1 and plain.config.vocab_size == 65


def test_whether_a_reward_model_was_normalised_stands_beside_its_folder(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "run", tmp_path / "run")
    settings = tmp_path / "run" / "train_reward_hparams.json"

    def normalised(name: str) -> Any:
        made = tmp_path / "made" / name
        return convert_openai_checkpoint(tmp_path / "run" / "reward_model", made, encoding=ENCODING).normalised

    found = normalised("with")
    assert (found.mean, found.std, found.policy) == (0.0, 1.0, "124M")
    assert found.samples == 512  # 256 were asked for; samples come in batches of 512
    edit(settings, normalize_samples=0)
    assert normalised("none") is None
    edit(settings, normalize_samples=256, normalize_after=False)
    assert normalised("before") is None
    settings.unlink()
    assert normalised("unknown") is None


@pytest.mark.parametrize(
    ("folder", "left_out"),
    [
        ("gpt2", {}),
        (
            "run/policy",
            {"value head": 2, "state of the optimizer": 4, "opt": 2, "counters": 1, "ref_policy": 16},
        ),
        ("run/reward_model", {"state of the optimizer": 4, "opt": 2, "counters": 1, "ref_policy": 28}),
    ],
)
def test_every_tensor_is_used_or_named(folder: str, left_out: dict[str, int], out: Path) -> None:
    conversion = convert_folder(folder, out)
    assert {group: len(names) for group, names in conversion.left_out.items()} == left_out
    place = "model.ckpt" if folder == "gpt2" else f"checkpoints/model.ckpt{'-7' if 'policy' in folder else ''}"
    names = [name for group in conversion.left_out.values() for name in group]
    assert len(names) == len(set(names))
    assert conversion.tensors + len(names) == len(TensorBundle(CHECKPOINTS / folder, place).entries)


def test_the_tokenizer_is_gpt_2s(out: Path) -> None:
    convert_folder("gpt2", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    # "the" is merged to token 34; " and" is a space (31) and "and" (60); " the" is token 35.
    assert tokenizer("the and the")["input_ids"] == [34, 31, 60, 35]
    assert tokenizer("the.<|endoftext|>")["input_ids"] == [34, 26, 63]
    assert tokenizer.decode([34, 31, 60, 35, 32, 0]) == "the and the\na"
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 63 and tokenizer.pad_token_id is None
    assert tokenizer.model_max_length == 16 and len(tokenizer) == 64


def test_the_library_loads_what_was_written(out: Path) -> None:
    convert_folder("gpt2", out)
    loaded = load_model(str(out))
    assert loaded.tokens.eos_ids == (63,)
    config: Any = loaded.model.config
    assert {name: getattr(config, name) for name in ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")} == {
        "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 64
    }  # fmt: skip


def test_others_may_read_the_weights(out: Path) -> None:
    convert_folder("gpt2", out)
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "config.json").stat().st_mode}


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model/wpe", "model/h1/mlp/c_fc/b", "model/ln_f/g"])
def test_a_missing_tensor_is_named(name: str, source: Path, out: Path) -> None:
    rewrite(source, lambda tensors: tensors.pop(name))
    assert f"does not hold the tensor {name}," in refusal(source, out)


def test_a_checkpoint_without_embeddings_is_no_gpt_2(source: Path, out: Path) -> None:
    rewrite(source, lambda tensors: tensors.pop("model/wte"))
    assert "holds no GPT-2: none of its 27 tensors" in refusal(source, out)


def test_a_tensor_that_gpt_2_has_not_is_named(source: Path, out: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({"model/h0/attn/rotary": np.ones(3, np.float32)}))
    assert "holds the tensor 'model/h0/attn/rotary', which a GPT-2" in refusal(source, out)
    edit(source / "hparams.json", n_layer=1)
    rewrite(source, lambda tensors: None)
    assert "holds the tensor 'model/h1/attn/c_attn/b', which a GPT-2" in refusal(source, out)


def test_a_tensor_of_another_shape_or_kind_or_not_finite_is_named(source: Path, out: Path) -> None:
    name = "model/h0/mlp/c_proj/w"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].reshape(1, 8, 32)}))
    assert f"the tensor {name} of" in refusal(source, out)
    assert "has the shape [1, 8, 32]; by hparams.json it is [1, 32, 8]" in refusal(source, out)
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].astype(np.int64)}))
    assert name in refusal(source, out) and "no float32 tensor" in refusal(source, out)
    rewrite(source, lambda tensors: tensors[name].__setitem__((0, 3, 3), np.nan))
    assert f"the tensor {name} of" in refusal(source, out) and "not finite" in refusal(source, out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 10**9}, "n_layer is 1000000000; with these tensors it is from 1 to 28"),
        ({"n_layer": 3}, "does not hold the tensor model/h2/ln_1/g"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_layer": -2}, "n_layer is -2"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"n_layer": 2.0}, "n_layer is 2.0"),
        ({"n_head": 3}, "n_embd 8 is no multiple of n_head 3"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_ctx": 10**9}, "model/wpe"),
        ({"n_ctx": 2**40}, "n_ctx is 1099511627776"),
        ({"n_embd": 16}, "has the shape [64, 8]; by hparams.json it is [64, 16]"),
        ({"n_vocab": 65}, "has 64 tokens, and the model has 65"),
        ({"n_vocab": None}, "n_vocab is None"),
        ({"embd_pdrop": 2}, "embd_pdrop is 2"),
        ({"attn_pdrop": "x"}, "attn_pdrop is 'x'"),
        ({"n_experts": 4}, "has the setting 'n_experts', which GPT-2 does not know"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(fields: dict[str, Any], message: str, source: Path, out: Path) -> None:
    edit(source / "hparams.json", **fields)
    assert message in refusal(source, out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no checkpoint"),
        ("model.ckpt", "names no checkpoint"),
        ('model_checkpoint_path: "../model.ckpt"', "is not in its folder"),
        ('model_checkpoint_path: "/home/me/model.ckpt"', "is not in its folder"),
        ('model_checkpoint_path: "."', "is not in its folder"),
        ('model_checkpoint_path: "other.ckpt"', "has no file other.ckpt.index"),
    ],
)
def test_names_of_checkpoints(content: str, message: str, source: Path, out: Path) -> None:
    (source / "checkpoint").write_text(content)
    assert message in refusal(source, out)


def test_files_that_are_missing_are_named(tmp_path: Path, out: Path) -> None:
    files = {
        "checkpoint": "has no file checkpoint",
        "hparams.json": "has no hparams.json",
        "encoder.json": "has no encoder.json",
        "vocab.bpe": "has no vocab.bpe",
        "model.ckpt.index": "has no file model.ckpt.index",
        "model.ckpt.data-00000-of-00001": "has no file model.ckpt.data-00000-of-00001",
    }
    for name, message in files.items():
        folder = tmp_path / f"without {name}"
        shutil.copytree(CHECKPOINTS / "gpt2", folder)
        (folder / name).unlink()
        assert message in refusal(folder, out)
    assert "is no folder" in refusal(tmp_path / "nowhere", out)
    assert f"give {CHECKPOINTS / 'run' / 'policy'}" in refusal(CHECKPOINTS / "run", out)
    assert "--encoding FOLDER" in refusal(CHECKPOINTS / "run" / "policy", out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids.pop("and"), "has 63 tokens, and the model has 64"),
        (lambda ids: ids.update({"a": 1}), "ids are not the numbers from 0 to 63"),
        (lambda ids: ids.update({"a": 64}), "ids are not the numbers from 0 to 63"),
        (lambda ids: ids.update({"a": 0.0}), "ids are not the numbers from 0 to 63"),
        (lambda ids: ids.update({"a": False}), "ids are not the numbers from 0 to 63"),
        (lambda ids: ids.update({"<|end|>": ids.pop("<|endoftext|>")}), "lacks the token <|endoftext|>"),
        (lambda ids: ids.update({"another": ids.pop("th")}), "vocab.bpe, line 2: 't h' joins no two tokens"),
        (lambda ids: ids.update({"\ud800": ids.pop("q")}), "make no tokenizer"),
    ],
)
def test_a_vocabulary_that_does_not_fit(
    change: Callable[[dict[str, Any]], Any], message: str, source: Path, out: Path
) -> None:
    ids: dict[str, Any] = dict(encoder())
    change(ids)
    (source / "encoder.json").write_text(json.dumps(ids))
    assert message in refusal(source, out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with a line #version"),
        (b"t h\nth e\n", "does not begin with a line #version"),
        (b"#version: 0.2\nt h\n\nth e\n", "line 3: '' joins no two tokens"),
        (b"#version: 0.2\nt h e\n", "line 2: 't h e' joins no two tokens"),
        (b"#version: 0.2\nth\n", "line 2: 'th' joins no two tokens"),
        (b"#version: 0.2\n\xff\n", "vocab.bpe is damaged"),
    ],
)
def test_merges_that_do_not_fit(content: bytes, message: str, source: Path, out: Path) -> None:
    (source / "vocab.bpe").write_bytes(content)
    assert message in refusal(source, out)


def test_a_reward_model_needs_all_of_its_scale(tmp_path: Path, out: Path) -> None:
    sizes = SIZES["run/reward_model"]
    shutil.copytree(CHECKPOINTS / "run" / "reward_model", tmp_path / "reward_model")
    whole: dict[str, Any] = {name: weights_of(name, shape) for name, shape in variables("reward_model/model", sizes)}
    whole["reward_model/model/heads/reward/w"] = np.ones(6, np.float32)
    for name in ("model/heads/reward/b", "reward_norm/gain", "reward_norm/bias"):
        whole[f"reward_model/{name}"] = np.ones((), np.float32)
    for name in ("model/heads/reward/w", "model/heads/reward/b", "reward_norm/gain", "reward_norm/bias"):
        tensors = {key: value for key, value in whole.items() if key != f"reward_model/{name}"}
        write_bundle(tmp_path / "reward_model" / "checkpoints", "model.ckpt", tensors)
        message = refusal(tmp_path / "reward_model", out, encoding=ENCODING)
        assert f"does not hold the tensor reward_model/{name}," in message


def test_a_scope_that_is_not_there_names_those_that_are(out: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model under 'reward_model'; there is: policy, ref_policy"):
        convert_folder("run/policy", out, scope="reward_model")
    assert not out.parent.exists()


def test_a_folder_that_holds_something_is_not_overwritten(out: Path) -> None:
    out.mkdir(parents=True)
    convert_folder("gpt2", out)  # an empty one may be there
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="is there already"):
        convert_folder("run/policy", out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (out.parent / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        convert_folder("gpt2", out.parent / "file")


def test_what_differs_from_the_checkpoint_is_not_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_another(model: Any, tokenizer: Any, folder: Path) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.transformer.h[1].mlp.c_fc.bias[5] += 1e-3
        save_plain(other, tokenizer, folder)

    monkeypatch.setattr(openai_checkpoint, "save_plain", save_another)
    assert "transformer.h.1.mlp.c_fc.bias differs" in refusal(CHECKPOINTS / "gpt2", out)


def test_links_out_of_the_folder_are_refused(source: Path, out: Path) -> None:
    for name in ("hparams.json", "checkpoint", "encoder.json", "vocab.bpe", "model.ckpt.index"):
        path = source / name
        kept = path.rename(source.parent / name)
        path.symlink_to(kept)
        assert f"{name} is a link that leads outside its folder" in refusal(source, out)
        path.unlink()
        kept.rename(path)
