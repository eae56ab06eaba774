"""Q heads beside a plain Hugging Face folder: a safetensors file, and a JSON file that says what is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from tropism.errors import ModelError
from tropism.foreign.json_files import read_object
from tropism.foreign.paths import file_inside
from tropism.foreign.view import ADAPTER_CONFIG
from tropism.foreign.weights import check_weights
from tropism.models.q_heads import QHeads
from tropism.models.saving import tensors_of

FACTS = "q_heads.json"
WEIGHTS = "q_heads.safetensors"
MARK = "tropism_q_heads"
"""Key of config.json with the number of Q heads; transformers carries it along and does nothing with it."""


@dataclass(frozen=True, kw_only=True)
class SavedQHeads:
    """What a folder holds of Q heads, still on the disk: they are as large as many a language model."""

    count: int
    hidden_size: int
    vocabulary: int
    weights: Path

    def load(self, *, hidden_size: int, vocabulary: int) -> QHeads:
        """The heads, for a model of these sizes.

        Raises:
            ModelError: they do not fit it, or are damaged.
        """
        if (hidden_size, vocabulary) != (self.hidden_size, self.vocabulary):
            raise ModelError(
                f"{self.weights} values {self.vocabulary} tokens from {self.hidden_size} numbers, but its model has "
                f"{vocabulary} tokens and {hidden_size}; copy the whole folder"
            )
        heads = QHeads(hidden_size, vocabulary, count=self.count)
        try:
            heads.load_state_dict(load_file(self.weights))
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(
                f"{self.weights} does not hold {self.count} Q heads with their targets: {error}"
            ) from error
        bad = next((name for name, value in heads.state_dict().items() if not bool(value.isfinite().all())), None)
        if bad is not None:
            raise ModelError(f"{bad} in {self.weights} is not finite; train again from an earlier checkpoint")
        return heads


def write_q_heads(folder: Path, heads: QHeads) -> None:
    """Write both files into a folder that is being made."""
    facts = {"q_heads": len(heads.q), "hidden_size": heads.hidden_size, "vocabulary": heads.vocabulary}
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    tensors: Mapping[str, Tensor] = tensors_of(heads)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_q_heads(source: str, config: Any, *, revision: str | None = None) -> SavedQHeads | None:
    """What a model folder or hub repository holds of them; None where its config.json does not name any.

    An adapter has none either, since those of the model below it value other hidden states.

    Raises:
        ModelError: the files are missing or damaged.
    """
    count = getattr(config, MARK, None)
    folder = Path(source)
    if count is None or (folder / ADAPTER_CONFIG).is_file():
        return None
    if not folder.is_dir():
        found = cached_file(source, FACTS, revision=revision, _raise_exceptions_for_missing_entries=False)
        cached_file(source, WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise ModelError(f"{source} says that it has Q heads, but holds no {FACTS}; save it anew")
        folder = Path(found).parent
    facts, weights = file_inside(folder, FACTS), file_inside(folder, WEIGHTS)
    if facts is None or weights is None:
        raise ModelError(
            f"{folder} says that it has Q heads, but {FACTS if facts is None else WEIGHTS} is missing; copy the whole "
            "folder"
        )
    check_weights({WEIGHTS: weights}, folder=folder, quantised=False)
    content = read_object(facts)
    sizes: list[Any] = [content.get(name) for name in ("q_heads", "hidden_size", "vocabulary")]
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] != count or count not in (1, 2):
        raise ModelError(
            f"{facts} is damaged: it must hold the numbers q_heads ({count!r:.20}), hidden_size, vocabulary"
        )
    return SavedQHeads(count=int(count), hidden_size=sizes[1], vocabulary=sizes[2], weights=weights)
