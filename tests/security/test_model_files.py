"""Model folders with damaged or hostile files: a clear error that names the file, and nothing outside is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped,unused-ignore]
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from tiny_models import FAMILIES, tiny_config, tiny_tokenizer
from tropism.data.readers import read_records
from tropism.errors import DataError, ModelError
from tropism.foreign.paths import file_inside
from tropism.foreign.view import model_view
from tropism.models.loading import load_model
from tropism.rewards.registry import make_reward


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A saved tiny classifier."""
    LlamaForSequenceClassification(tiny_config("llama", num_labels=1)).save_pretrained(tmp_path / "scorer")
    tiny_tokenizer().save_pretrained(tmp_path / "scorer")
    return tmp_path / "scorer"


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def refusal(source: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(source))
    return str(caught.value)


def write_index(folder: Path, name: str) -> None:
    """An index that finds every tensor in the file ``name``."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Names in files.


@pytest.mark.parametrize("style", ["../outside.safetensors", "absolute", "sub/../../outside.safetensors"])
def test_a_weight_index_stays_inside_though_transformers_follows_it(folder: Path, style: str) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    (folder / "sub").mkdir()
    write_index(folder, str(outside) if style == "absolute" else style)
    AutoModelForCausalLM.from_pretrained(folder)  # the attack works
    assert "outside its folder" in refusal(folder)


def test_a_classifier_is_read_by_the_same_rules(classifier: Path) -> None:
    reward = make_reward("classifier", {"model": str(classifier), "device": "cpu"})
    assert len(reward(prompts=["a"], completions=["b"])) == 1
    shutil.copy(classifier / "model.safetensors", classifier.parent / "outside.safetensors")
    write_index(classifier, "../outside.safetensors")
    with pytest.raises(ModelError, match=r"cannot load the classifier .* outside its folder"):
        make_reward("classifier", {"model": str(classifier), "device": "cpu"})


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "training_args.bin", 5])
def test_transformers_weights_name_a_safetensors_file_of_the_folder(folder: Path, name: Any) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    edit(folder / "config.json", transformers_weights=name)
    assert "names weights outside its folder, or no safetensors" in refusal(folder)


def test_transformers_weights_of_the_folder_itself_are_loaded(folder: Path) -> None:
    expected = load_model(str(folder)).model.state_dict()
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")
    found = load_model(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "added_tokens_file", "merges_file"])
def test_a_tokenizer_never_reads_outside_files(folder: Path, file: str, key: str) -> None:
    outside = folder.parent / "outside.json"
    outside.write_text((folder / "tokenizer.json").read_text().replace("<user>", "<secret>"))
    edit(folder / file, **{key: str(outside)})
    loaded = load_model(str(folder))
    assert "<secret>" not in loaded.tokenizer.get_vocab()
    loaded.tokenizer.save_pretrained(folder.parent / "again")
    assert all("secret" not in path.read_text() for path in (folder.parent / "again").iterdir())
    if (file, key) == ("special_tokens_map.json", "tokenizer_file"):
        assert "<secret>" in AutoTokenizer.from_pretrained(folder).get_vocab()  # the attack works


# Links, pipes, devices.


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    AutoModelForCausalLM.from_pretrained(folder)  # the attack works
    assert f"{name} is a link that leads outside its folder" in refusal(folder)


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder / "blobs" / "1")
    (folder / "model.safetensors").symlink_to("blobs/1")
    (folder.parent / "link").symlink_to(folder)
    assert load_model(str(folder.parent / "link")).tokens.eos_ids == (2,)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_pipes_folders_and_devices_are_no_files(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    ended: list[str] = []
    reader = threading.Thread(target=lambda: ended.append(refusal(folder)), daemon=True)
    reader.start()
    reader.join(60)
    assert ended and name in ended[0]


def test_links_in_circles_and_to_nothing_are_refused(folder: Path) -> None:
    for target in ("tokenizer.json", "nothing"):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").symlink_to(target)
        assert "tokenizer.json cannot be read" in refusal(folder)


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """The folder as the hub's cache holds it; the snapshot is made of links."""
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_hub_model_loads_from_its_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = in_hub_cache(folder, folder.parent / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "hub"))
    expected = load_model(str(folder)).model.state_dict()
    for source in ("someone/tiny", str(snapshot)):
        loaded = load_model(source)
        assert loaded.model.config.name_or_path == source
        assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in expected.items())


def test_a_hub_model_is_read_by_the_same_rules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    write_index(folder, "../../../../outside.safetensors")
    in_hub_cache(folder, folder.parent / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "hub"))
    with pytest.raises(ModelError, match="outside its folder"):
        load_model("someone/tiny")


def test_names_that_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert file_inside(tmp_path, "a") == tmp_path / "a"
    assert file_inside(tmp_path, "b") is None
    for name in ("", ".", "..", "../a", "/etc/passwd", "a/../a", "a\0b", "a\\b", None, 5, ["a"]):
        with pytest.raises(ModelError, match="outside its folder"):
            file_inside(tmp_path, name)
    assert file_inside(tmp_path, "n" * 5000) is None


# What libraries get to see.


def test_a_view_shows_nothing_but_what_is_needed(folder: Path) -> None:
    for name in ("modeling_evil.py", "training_args.bin", "optimizer.pt", "rng_state.pth", "adapter_config.json"):
        (folder / name).write_text("{}")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").touch()
    with model_view(str(folder), revision=None) as view:
        shown = {str(path.relative_to(view.path)) for path in view.path.rglob("*")}
        assert view.path.stat().st_mode & 0o077 == 0
    assert shown == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not view.path.exists()


# Damage.


def damaged_safetensors(kind: str, file: Path) -> None:
    whole = file.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    first, second, *_ = (name for name in header if name != "__metadata__")
    if kind == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "long header":
        file.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    elif kind == "more":
        file.write_bytes(whole + b"1234")
    else:
        if kind == "overlap":
            header[second]["data_offsets"] = header[first]["data_offsets"]
        elif kind == "type":
            header[first]["dtype"] = "F99"
        else:
            header[first]["shape"] = [2**40, 2**40]
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


@pytest.mark.parametrize("kind", ["cut", "empty", "long header", "more", "overlap", "type", "shape"])
def test_damaged_safetensors_are_named(folder: Path, kind: str) -> None:
    damaged_safetensors(kind, folder / "model.safetensors")
    assert f"{folder / 'model.safetensors'} is damaged" in refusal(folder)


def test_weights_of_other_shapes_types_or_none_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(37, 31)}, folder / "model.safetensors")
    assert "model.safetensors holds lm_head.weight with the shape [37, 31]" in refusal(folder)
    save_file(tensors | {"lm_head.weight": torch.zeros(37, 32, dtype=torch.int8)}, folder / "model.safetensors")
    assert "lm_head.weight holds whole numbers (I8)" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "there is no model.safetensors or pytorch_model.bin" in refusal(folder)


def test_shards_that_are_missing_are_named(folder: Path) -> None:
    write_index(folder, "model-00001-of-00002.safetensors")
    assert "names model-00001-of-00002.safetensors, which is not there" in refusal(folder)
    hostile: list[Any] = [{}, [], "x", {"a": ["b"]}, {"a": "b.bin"}, None]
    for weight_map in hostile:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"],
)
@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '{"a":' * 100_000, "[]", "5", '{"a": ' + "1" * 5000 + "}", "\udcff", "{}x"]
)
def test_garbage_in_json_files_names_the_file(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert file in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"hidden_size": 32, "hidden_size": 64', "'hidden_size' occurs twice"),
        ('"rope_theta": NaN', "NaN is no setting"),
    ],
)
def test_doubtful_settings_are_refused(folder: Path, text: str, message: str) -> None:
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.rstrip().removesuffix("}") + f", {text}}}")
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 10**9},
        {"hidden_size": 50_000},
        {"vocab_size": 10**9},
        {"vocab_size": 10**12},
        {"head_dim": 10**8},
        {"intermediate_size": 10**15},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 10**9},
        {"num_labels": 10**9},
        {"max_position_embeddings": 10**30},
        {"layer_types": [10**12]},
        {"num_hidden_layers": -2},
        {"num_attention_heads": 0},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"hidden_size": [32]},
        {"hidden_size": {"a": 1}},
        {"vocab_size": 40},
        {"model_type": ["llama"]},
        {"model_type": {"a": "llama"}},
        {"hidden_act": "no-such"},
        {"architectures": 5},
        {"rope_parameters": {"rope_type": "no-such"}},
    ],
    ids=str,
)
def test_absurd_settings_take_no_memory(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder / "config.json", **fields)
    before = peak_memory()
    assert str(folder) in refusal(folder)
    assert peak_memory() - before < 300


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "head_dim"])
def test_sizes_that_memory_would_hold_are_refused_before_it_is_taken(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: 400_000})
    assert "config.json describes a model of" in refusal(folder)


def peak_memory() -> int:
    """The most memory that this process ever had, in megabytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_the_positions_of_a_gpt2_take_no_memory(tmp_path: Path) -> None:
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", n_positions=10**9)
    before = peak_memory()
    assert "config.json describes a model of" in refusal(tmp_path)
    assert peak_memory() - before < 300


# Saved data sets.


def test_a_saved_data_set_stays_inside_its_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "data")
    assert read_records(str(tmp_path / "data")) == [{"text": "a"}]
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        path = tmp_path / "data" / name
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
        with pytest.raises(DataError, match="outside"):
            read_records(str(tmp_path / "data"))
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=name):
            read_records(str(tmp_path / "data"))
        path.unlink()
        (tmp_path / name).rename(path)
    assert read_records(str(tmp_path / "data")) == [{"text": "a"}]


def test_a_split_that_is_a_link_out_of_the_data_set_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads outside the data set"):
        read_records(str(tmp_path / "data"))
