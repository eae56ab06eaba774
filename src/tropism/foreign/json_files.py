"""JSON files of model folders: strictly parsed, and without the keys that lead to code or to other files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tropism.errors import ModelError

MOST_BYTES = 100_000_000
"""Of one JSON file. The largest there are, indices of models with a hundred thousand tensors, take a tenth."""

_CODE_KEYS = {
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "custom_generate",
    "kernel_config",
    "use_kernels",
    "fusion_config",
    "distributed_config",
    "_auto_class",
    "_commit_hash",
    "_from_auto",
}
_QUANTISED_WITHOUT_DOWNLOADS = {
    "aqlm",
    "awq",
    "bitnet",
    "bitsandbytes",
    "compressed-tensors",
    "gptq",
    "hqq",
    "quanto",
    "torchao",
}
_COUNTS = re.compile(r"layers|experts|labels|blocks|codebooks|stages|heads|^n_(layer|head|block)$")
_MOST_LAYERS = 1000
_MOST_COUNTED = 100_000
_MOST_IN_A_LIST = 10_000_000
_MOST_ANYWHERE = 2**53


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: no valid JSON, no object, keys that occur twice, NaN, or too large; names the file.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ModelError(f"{path} takes {size:,} bytes, more than any such file needs; it is damaged or no JSON")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object but {type(content).__name__}")
    return content


def without_code(content: Any) -> Any:
    """``content`` without every key, at any depth, that makes transformers import, download or run code.

    ``auto_map`` and its like lead to Python files; an attention or experts implementation can name a kernel that is
    downloaded and run.
    """
    if isinstance(content, list):
        return [without_code(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {key: without_code(value) for key, value in content.items() if not _leads_to_code(key)}


def without_files(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` without the keys by which a tokenizer's files name further files, such as ``vocab_file``.

    Such files are found under their standard names in the folder itself; what is written under these keys is a path on
    the machine where the tokenizer was saved, or an attack.
    """
    named = ("fast_tokenizer_files", "init_inputs", "name_or_path")
    return {key: value for key, value in content.items() if not key.endswith("_file") and key not in named}


def check_model_settings(config: dict[str, Any], *, path: Path, tensors: int) -> None:
    """Refuse settings that transformers would follow into endless loops or downloads.

    Args:
        config: what config.json holds.
        path: its file, for messages.
        tensors: how many tensors the weight files hold; a model has at least one per layer.

    Raises:
        ModelError: names the file, the key and the value.
    """
    _check_numbers(config, path, tensors, key="", in_list=False)
    quantised = config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if (
        isinstance(quantised, dict)
        and method is None
        and (quantised.get("load_in_4bit") or quantised.get("load_in_8bit"))
    ):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _QUANTISED_WITHOUT_DOWNLOADS:
        raise ModelError(
            f"{path} asks for the quantisation {method!r:.60}, whose kernels would be downloaded and run; use weights "
            "that are not quantised, or pass trust_remote_code=True if you trust the model"
        )


def _leads_to_code(key: str) -> bool:
    return key in _CODE_KEYS or key.startswith("__") or "_implementation" in key


def _check_numbers(value: Any, path: Path, tensors: int, *, key: str, in_list: bool) -> None:
    if isinstance(value, dict):
        for name, entry in value.items():
            _check_numbers(entry, path, tensors, key=name, in_list=False)
    elif isinstance(value, list):
        for entry in value:
            _check_numbers(entry, path, tensors, key=key, in_list=True)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = _MOST_IN_A_LIST if in_list else _MOST_ANYWHERE
        least = -most
        if _COUNTS.search(key) and not in_list:
            least, most = -1, max(tensors, _MOST_LAYERS) if "layer" in key else _MOST_COUNTED
        if not least <= value <= most:
            raise ModelError(f"{path} is damaged or hostile: {key} is {value}, and at most {most} makes sense")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return content


def _constant(name: str) -> float:
    """Infinity is a usual limit in configurations of state space models; NaN is never a setting."""
    if name == "NaN":
        raise ValueError("NaN is no setting")
    return float(name.replace("Infinity", "inf"))
