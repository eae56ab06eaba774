"""A model folder as the libraries that load models may see it: checked copies and links, and nothing else.

A view is a temporary folder. It holds the configurations without the keys that lead to code or to other files, links to
the tokenizer's files under their standard names, and links to the weights. Code, pickles of optimizers, adapters and
whatever else lies in a model's folder are not in it, so that no library can find them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.errors import ModelError
from tropism.foreign.json_files import check_model_settings, read_object, without_code, without_files
from tropism.foreign.paths import file_inside, is_plain_name
from tropism.foreign.weights import WeightFacts, check_weights

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_SETTINGS = (CONFIG, "generation_config.json", *_TOKENIZER_SETTINGS)
_TOKENIZER_FILES = (
    "added_tokens.json",
    "bpe.codes",
    "byte_maps.json",
    "chat_template.jinja",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "vocab.json",
    "vocab.txt",
)
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """A temporary folder that shows of a model what is needed to load it."""

    path: Path
    """The temporary folder."""
    folder: Path
    """The folder that it shows: the model's own, or the hub's cache of it."""
    config: dict[str, Any]
    """Of config.json, without the keys that lead to code; of adapter_config.json for an adapter."""
    weights: WeightFacts
    """How much the weight files hold; nothing where there are only tokenizer files."""
    weight_files: tuple[str, ...] = ()
    """Their names in ``folder``."""

    @property
    def names(self) -> dict[str, Path]:
        """The temporary folder, and the real one that messages should speak of."""
        return {"temporary": self.path, "real": self.folder}

    def restore_paths(self, tokenizer: Any, name: str) -> None:
        """Let a tokenizer that was loaded from the view remember the model's name and the folder's own files."""
        for values in (vars(tokenizer), tokenizer.init_kwargs):
            for key, value in values.items():
                if isinstance(value, str) and value.startswith(str(self.path)):
                    values[key] = value.replace(str(self.path), str(self.folder))
        tokenizer.name_or_path = name


@contextmanager
def model_view(
    source: str, *, revision: str | None, weights: bool = True, settings: bool = True
) -> Iterator[ModelView]:
    """What a folder or hub model shows of itself.

    Args:
        source: a folder, or the id of a model on the hub, which is downloaded.
        revision: branch, tag or commit of a hub model.
        weights: whether its weights are needed, or its tokenizer alone.
        settings: whether its config.json must hold only what can be loaded without code of the model's authors.

    Raises:
        ModelError: a file leads outside the folder, is damaged, or asks for what cannot be; the file is named.
        OSError: a hub model that cannot be downloaded.
    """
    folder = local_folder(source, revision=revision)
    with tempfile.TemporaryDirectory(prefix="tropism-model-") as temporary:
        path = Path(temporary)
        config = _show_settings(folder, path)
        _link(folder, path, _TOKENIZER_FILES)
        _link_templates(folder, path)
        files: dict[str, Path] = {}
        facts = WeightFacts(tensors=0, elements=0)
        if weights:
            files, index = _find_weights(source, folder, config)
            facts = check_weights(files, folder=folder, quantised="quantization_config" in config)
            _link_weights(path, files, config, index)
        if settings:
            check_model_settings(config, path=folder / CONFIG, tensors=facts.tensors)
        yield ModelView(path=path, folder=folder, config=config, weights=facts, weight_files=tuple(files))


@contextmanager
def adapter_view(folder: Path) -> Iterator[ModelView]:
    """What a folder of adapter weights shows of itself; its adapter_config.json is read, but not in the view.

    Raises:
        ModelError: as in ``model_view``.
    """
    with tempfile.TemporaryDirectory(prefix="tropism-adapter-") as temporary:
        path = Path(temporary)
        place = file_inside(folder, ADAPTER_CONFIG)
        config = {} if place is None else read_object(place)
        for name in _ADAPTER_WEIGHTS:
            file = file_inside(folder, name)
            if file is not None:
                facts = check_weights({name: file}, folder=folder, quantised=False)
                os.symlink(file, path / name)
                yield ModelView(path=path, folder=folder, config=config, weights=facts, weight_files=(name,))
                return
        raise ModelError(f"{folder} holds no adapter weights: there is no {' or '.join(_ADAPTER_WEIGHTS)}")


@contextmanager
def file_view(file: Path) -> Iterator[Path]:
    """A temporary folder with a link to ``file`` alone, so that nothing beside it can be found; gives the link."""
    with tempfile.TemporaryDirectory(prefix="tropism-file-") as temporary:
        link = Path(temporary) / file.name
        os.symlink(file.resolve(), link)
        yield link


def local_folder(source: str, *, revision: str | None) -> Path:
    """The folder itself, or where the hub's cache holds configuration and tokenizer of a model, downloaded if need be.

    Raises:
        OSError: it cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source).resolve()
    wanted = (*_SETTINGS, *_TOKENIZER_FILES, f"{_TEMPLATES}/*.jinja", *(name for name in _WEIGHTS if "index" in name))
    return _download(source, revision, wanted)


def _download(source: str, revision: str | None, names: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=list(names)))


def _show_settings(folder: Path, path: Path) -> dict[str, Any]:
    """Write the configurations of a folder into the view without what leads elsewhere; gives config.json."""
    config: dict[str, Any] = {}
    for name in _SETTINGS:
        file = file_inside(folder, name)
        if file is None:
            continue
        content: dict[str, Any] = without_code(read_object(file))
        if name in _TOKENIZER_SETTINGS:
            content = without_files(content)
            _check_tokenizer_class(content.get("tokenizer_class"), folder / name)
        if name == CONFIG:
            config = content
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return config


def _check_tokenizer_class(name: Any, file: Path) -> None:
    """transformers would look any name up among all that it exports, and load the folder by it."""
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w*(Tokenizer|Backend)\w*", name)):
        raise ModelError(f"{file}: tokenizer_class is {name!r:.80}, which is no tokenizer")


def _link(folder: Path, path: Path, names: Iterable[str]) -> None:
    for name in names:
        file = file_inside(folder, name)
        if file is not None:
            os.symlink(file, path / name)


def _link_templates(folder: Path, path: Path) -> None:
    """The chat templates of a folder beside its main one."""
    if not (folder / _TEMPLATES).is_dir():
        return
    found = sorted(name for name in os.listdir(folder / _TEMPLATES) if name.endswith(".jinja"))
    (path / _TEMPLATES).mkdir()
    _link(folder, path, [f"{_TEMPLATES}/{name}" for name in found])


def _find_weights(source: str, folder: Path, config: dict[str, Any]) -> tuple[dict[str, Path], dict[str, str] | None]:
    """Names and places of the weight files, in transformers' order of preference, and their index if there is one."""
    is_hub = not Path(source).is_dir()
    chosen = config.get("transformers_weights")
    safe = (".safetensors", ".safetensors.index.json")
    if chosen is not None and not (is_plain_name(chosen) and chosen.endswith(safe)):
        raise ModelError(f"{folder / CONFIG} names weights outside its folder, or no safetensors: {chosen!r:.200}")
    for name in (chosen,) if chosen is not None else _WEIGHTS:
        if is_hub:
            _download(source, folder.name, [name])
        place = file_inside(folder, name)
        if place is None:
            continue
        if not name.endswith(".index.json"):
            return {name: place}, None
        weight_map = _weight_map(place, folder / name)
        shards = sorted(set(weight_map.values()))
        if is_hub:
            _download(source, folder.name, shards)
        return {shard: _shard(folder, shard, name) for shard in shards}, weight_map
    wanted = " or ".join(_WEIGHTS[::2]) if chosen is None else chosen
    raise ModelError(f"{folder} holds no weights: there is no {wanted}")


def _weight_map(index: Path, shown: Path) -> dict[str, str]:
    """Which file holds which tensor, according to an index of weights."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{shown} has no weight_map; it is no index of weights")
    suffix = ".safetensors" if shown.name.endswith(".safetensors.index.json") else ".bin"
    for name in weight_map.values():
        if not is_plain_name(name) or not name.endswith(suffix):
            raise ModelError(f"{shown} names weights outside its folder, or no {suffix} file: {name!r:.200}")
    return weight_map


def _shard(folder: Path, name: str, index: str) -> Path:
    place = file_inside(folder, name)
    if place is None:
        raise ModelError(f"{folder / index} names {name}, which is not there; download the model again")
    return place


def _link_weights(path: Path, files: dict[str, Path], config: dict[str, Any], index: dict[str, str] | None) -> None:
    """Link the weights under the names that transformers looks for by itself."""
    if config.pop("transformers_weights", None) is not None:
        (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    suffix = ".safetensors" if next(iter(files)).endswith(".safetensors") else ".bin"
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if index is None:
        os.symlink(next(iter(files.values())), path / f"{stem}{suffix}")
        return
    shown = {name: f"{stem}-{number:05}-of-{len(files):05}{suffix}" for number, name in enumerate(files, start=1)}
    for name, place in files.items():
        os.symlink(place, path / shown[name])
    clean = {"metadata": {}, "weight_map": {key: shown[name] for key, name in index.items()}}
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps(clean), encoding="utf-8")
