"""GPT-2's vocabulary as OpenAI published it: encoder.json and vocab.bpe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from tropism.errors import ModelError
from tropism.foreign.json_files import MOST_BYTES, read_object
from tropism.foreign.paths import file_inside

END = "<|endoftext|>"
"""Stands between documents; GPT-2's begin and end of a text alike."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens, and which two of them become one."""

    folder: Path
    ids: dict[str, int]
    """Token -> id; every id from 0 up once."""
    merges: tuple[tuple[str, str], ...]
    """The first of them comes first."""

    @property
    def end_id(self) -> int:
        return self.ids[END]

    def tokenizer(self, *, max_length: int, pad: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers.

        Args:
            max_length: tokens that the model takes.
            pad: a token to add for padding; it gets the first id behind the vocabulary.

        Raises:
            ModelError: it cannot be made of these tokens.
        """
        if pad in self.ids:
            raise ModelError(f"{self.folder} has the token {pad} already, which padding needs for itself")
        merges: Any = list(self.merges)  # annotated as texts, which would have to be taken apart at their spaces
        try:
            return GPT2Tokenizer(vocab=dict(self.ids), merges=merges, pad_token=pad, model_max_length=max_length)
        except Exception as error:
            raise ModelError(f"encoder.json and vocab.bpe in {self.folder} make no tokenizer: {error}") from error


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary in ``folder``.

    Args:
        size: how many tokens the model has.

    Raises:
        ModelError: files are missing or damaged, or are not this model's; names the file.
    """
    encoder = file_inside(folder, "encoder.json")
    bpe = file_inside(folder, "vocab.bpe")
    if encoder is None or bpe is None:
        raise ModelError(
            f"{folder} has no {'encoder.json' if encoder is None else 'vocab.bpe'}; give the folder of a published "
            "GPT-2 model, which has both: --encoding FOLDER (all sizes of GPT-2 have the same)"
        )
    ids = read_object(encoder)
    if len(ids) != size:
        raise ModelError(f"{encoder} has {len(ids)} tokens, and the model has {size}; it is another model's")
    if any(type(value) is not int for value in ids.values()) or sorted(ids.values()) != list(range(size)):
        raise ModelError(f"{encoder} is damaged: its ids are not the numbers from 0 to {size - 1}, each of them once")
    if END not in ids:
        raise ModelError(f"{encoder} is not GPT-2's: it lacks the token {END}")
    return Vocabulary(folder=folder, ids=ids, merges=_merges(bpe, ids))


def _merges(path: Path, ids: dict[str, int]) -> tuple[tuple[str, str], ...]:
    if path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{path} is larger than any such file; it is damaged")
    try:
        first, *lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not first.startswith("#version"):
        raise ModelError(f"{path} does not begin with a line #version; it is damaged, or another kind of file")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=2):
        if not line and number == len(lines) + 1:
            break
        left, _, right = line.rstrip("\r").partition(" ")
        if not {left, right, left + right} <= ids.keys():
            raise ModelError(f"{path}, line {number}: {line!r:.80} joins no two tokens of encoder.json to a third one")
        merges.append((left, right))
    return tuple(merges)
