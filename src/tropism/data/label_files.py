"""The label files of openai/lm-human-preferences: judgements of completions that are given as token ids.

A file is a JSON list of objects: ``query``, the completions, and what was said about them. ``best_of_N`` has
``sample0`` to ``sampleN-1`` and ``best``, an index; ``scalar_rating`` has ``sample`` and ``score``; ``scalar_compare``
has ``sample0``, ``sample1`` and ``difference``, by how much the second is better.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropism.data.columns import value_of
from tropism.data.files import listed, shown
from tropism.data.judged_values import choice_in, is_given, number_in, ratings_in, refuse_wrong
from tropism.data.readers import Record, locate_records
from tropism.errors import DataError
from tropism.judgements import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = 50259
"""The id that fills rows up: two beyond GPT-2's vocabulary of 50,257."""

VERDICTS: dict[str, Kind] = {"best": "choice", "score": "rating", "difference": "difference"}
"""Column that says what a person found -> what that is."""

_NUMBERED = re.compile(r"sample\d+", re.ASCII)
_RECORDS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Label:
    """One label without its padding."""

    query: tuple[int, ...]
    """Token ids of the prompt; may be empty."""
    samples: tuple[tuple[int, ...], ...]
    """Token ids of each completion; none is empty."""
    choice: int | None = None
    """Index of the best."""
    target: float | None = None
    """The score of the one, or by how much the second is better than the first."""


def is_label(columns: Mapping[str, Any]) -> bool:
    """Whether a record has the columns of a label and its query is a list."""
    sampled = any(name == "sample" or _NUMBERED.fullmatch(name) for name in columns)
    return sampled and isinstance(columns.get("query"), list | tuple)


def label_kind(record: Record) -> Kind:
    """What a label says.

    Raises:
        DataError: nothing, or more than one thing.
    """
    said = [name for name in VERDICTS if is_given(record, name)]
    if len(said) != 1:
        found = " and ".join(said) or "none of them"
        raise DataError(f"{record.where}: a label has one of the columns best, score and difference; this has {found}")
    return VERDICTS[said[0]]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a tokenizer has, for labels that it is to read.

    Raises:
        DataError: the padding of label files is one of them, so that it cannot be their tokenizer.
    """
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if size > PADDING:
        raise DataError(
            f"the tokenizer has {size:,} tokens, so that {PADDING}, the padding of label files, would be one of them; "
            "they are read with the tokenizer that wrote them, which is GPT-2's"
        )
    return size


def read_label(record: Record, vocabulary: int) -> Label:
    """The label in a record.

    Args:
        vocabulary: ids of the tokenizer lie below.

    Raises:
        DataError: columns are missing, empty or hold something else, an id that the tokenizer does not have, or a
            ``best`` that is none of the samples.
    """
    kind = label_kind(record)
    names = _sample_names(record, kind)
    query = _ids(record, "query", vocabulary)
    samples = tuple(_ids(record, name, vocabulary) for name in names)
    for name, sample in zip(names, samples, strict=True):
        if not sample:
            raise DataError(f"{record.where}: {name} is empty (nothing but padding)")
    if kind == "choice":
        choice = choice_in(record, "best", len(samples), may_tie=False)
        return Label(query=query, samples=samples, choice=choice)
    target = number_in(record, "score" if kind == "rating" else "difference")
    return Label(query=query, samples=samples, target=target)


def _sample_names(record: Record, kind: Kind) -> list[str]:
    """The columns with completions, in order."""
    if kind == "rating":
        return ["sample"]
    there = [name for name in record.columns if _NUMBERED.fullmatch(name) and record.columns[name] is not None]
    names = [f"sample{index}" for index in range(2 if kind == "difference" else max(len(there), 2))]
    if set(there) != set(names):
        raise DataError(f"{record.where}: expected {listed(names)}; there are: {listed(there) or 'none'}")
    return names


def _ids(record: Record, name: str, vocabulary: int) -> tuple[int, ...]:
    """A column of token ids, padding left out wherever it is."""
    value = value_of(record, name)
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise DataError(f"{record.where}: {name} is no list of token ids; texts belong into `prompt` and `completions`")
    ids = tuple(number for number in value if number != PADDING)
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
        beyond = next(number for number in ids if not 0 <= number < vocabulary)
        raise DataError(
            f"{record.where}: {name} holds the id {shown(beyond)}, but those of the tokenizer are 0 to"
            f" {vocabulary - 1} (padding: {PADDING}); labels are read with the tokenizer that wrote them"
        )
    return ids


def exact_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids with every space where it was; U+FFFD stands for bytes that are no characters."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


# ---- conversion ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConvertedLabels:
    """Labels as records of texts."""

    kind: Kind
    """Of all of them."""
    rows: list[dict[str, Any]]
    """``prompt``, ``completions`` and ``choice``; or ``completion`` and ``rating``; or ``completions``, ``difference``.
    """
    changed: int
    """Records in which the text of prompt and completion is encoded to other ids than those it was decoded from."""


def convert_labels(source: Any, tokenizer: PreTrainedTokenizerBase) -> ConvertedLabels:
    """Texts in place of ids, without padding.

    Args:
        source: whatever ``read_records`` takes, usually the path of a label file.
        tokenizer: of the labels.

    Raises:
        DataError: lists the wrong records; names the first one of another kind.
    """
    records = locate_records(source)
    vocabulary = vocabulary_of(tokenizer)
    labels: list[Label] = []
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    kinds: dict[Kind, str] = {}
    for record in records:
        try:
            if not is_label(record.columns):
                raise DataError(
                    f"{record.where}: no label, which has lists of token ids in query and sample0, or sample"
                )
            kinds.setdefault(label_kind(record), record.where)
            label = read_label(record, vocabulary)
            rows.append(_texts(label, tokenizer) | _kept(record, len(label.samples)))
            labels.append(label)
        except DataError as error:
            wrong.append(str(error))
        if len(kinds) > 1:
            (one, first), (other, where) = kinds.items()
            raise DataError(f"{where}: a label of the kind {other}, but that of {first} is of the kind {one}")
    refuse_wrong(wrong, len(records))
    changed = sum(not same for same in _survive(rows, labels, tokenizer))
    return ConvertedLabels(kind=next(iter(kinds)), rows=rows, changed=changed)


def _texts(label: Label, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The columns that ``read_comparisons`` reads, in place of those of a label."""
    prompt = {"prompt": exact_text(tokenizer, label.query)}
    texts = [exact_text(tokenizer, sample) for sample in label.samples]
    if label.choice is not None:
        return {**prompt, "completions": texts, "choice": label.choice}
    if len(texts) == 1:
        return {**prompt, "completion": texts[0], "rating": label.target}
    return {**prompt, "completions": texts, "difference": label.target}


def _kept(record: Record, count: int) -> dict[str, Any]:
    """What may stand beside a label and stays as it is: whose it is, and how much it counts."""
    kept: dict[str, Any] = {name: number_in(record, name) for name in ("weight", "margin") if is_given(record, name)}
    if is_given(record, "annotator"):
        kept["annotator"] = record.columns["annotator"]
    ratings = ratings_in(record, count)
    return kept if ratings is None else {**kept, "ratings": list(ratings)}


def _survive(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[Label], tokenizer: PreTrainedTokenizerBase
) -> Iterator[bool]:
    """For each record whether its texts, prompt and completion in one piece, have the ids they were decoded from."""
    for start in range(0, len(rows), _RECORDS_AT_ONCE):
        part = slice(start, start + _RECORDS_AT_ONCE)
        texts = [row["prompt"] + text for row in rows[part] for text in row.get("completions") or [row["completion"]]]
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for label in labels[part]:
            again = [tuple(next(encoded)) for _ in label.samples]
            yield again == [label.query + sample for sample in label.samples]
