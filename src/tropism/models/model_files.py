"""Checks on files that others wrote, before a reader opens them: a model folder may not name code or outside files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils.hub import cached_file

from tropism.errors import ModelError

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def safe_config(source: str, *, revision: str | None) -> PreTrainedConfig:
    """The configuration of a folder or hub model, without the keys that select code to run.

    ``auto_map`` and ``trust_remote_code`` lead to Python files; an attention implementation can name a kernel package
    that is downloaded and run. transformers is asked for its own class of the model's type only.

    Raises:
        ModelError: transformers has no class for the model's type.
        OSError: the configuration is not there.
    """
    raw, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    raw = strip_code_keys(raw)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{source} is of the type {kind!r}, which this transformers does not know; upgrade transformers, or pass "
            "trust_remote_code=True if the model ships its own code and you trust it"
        )
    weights = raw.get("transformers_weights")
    if weights is not None and not _is_plain_name(weights):
        raise ModelError(f"config.json of {source} names weights outside its folder: {weights!r}")
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(raw)
    return config


def strip_code_keys(config: Any) -> Any:
    """``config`` without every key, at any depth, that can make transformers import or download code."""
    if isinstance(config, list):
        return [strip_code_keys(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: strip_code_keys(value)
        for key, value in config.items()
        if key not in ("auto_map", "trust_remote_code", "custom_pipelines") and "attn_implementation" not in str(key)
    }


def check_file_names(source: str, *, revision: str | None) -> None:
    """Refuse a model whose weight index or tokenizer configuration names files outside its own folder.

    Raises:
        ModelError: names the file and the entry.
    """
    for file in _INDEX_FILES:
        index = _read_json(source, file, revision)
        for name in set(index.get("weight_map", {}).values()):
            if not _is_plain_name(name):
                raise ModelError(f"{file} of {source} names weights outside its folder: {name!r}")
    settings = _read_json(source, "tokenizer_config.json", revision)
    for key, value in settings.items():
        if str(key).endswith("_file") and value is not None and not _is_plain_name(value):
            raise ModelError(f"tokenizer_config.json of {source} names a file outside its folder: {key} = {value!r}")


def check_gguf_header(path: Path) -> None:
    """Refuse a file that is no GGUF, or whose header claims more entries than the file has room for.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        ModelError: names the file and what is wrong with it.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it does not start with the letters GGUF")
    version, tensors, entries = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise ModelError(f"{path} is a GGUF file of version {version}; versions 2 and 3 can be read")
    # The smallest tensor entry takes 24 bytes (name length, rank, type, offset), the smallest key 13.
    if 24 * tensors + 13 * entries > path.stat().st_size:
        raise ModelError(f"{path} is damaged: it claims {tensors} tensors and {entries} keys, which do not fit in it")


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _read_json(source: str, file: str, revision: str | None) -> dict[str, Any]:
    path = cached_file(
        source,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} of {source} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} of {source} is no JSON object")
    return content
