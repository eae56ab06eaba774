"""Completions that were liked or not, as token ids that a policy learns from."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tropism.data.config import DataConfig
from tropism.data.demonstrations import encoded_texts
from tropism.data.files import listed, shown
from tropism.data.judged_values import refuse_wrong
from tropism.data.readers import Record, locate_records
from tropism.errors import DataError
from tropism.preferences import Opinion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL = "label"
"""The column that says whether a completion was liked."""


def make_opinions(
    source: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None, *, max_length: int | None
) -> list[Opinion]:
    """Opinions from records as those of demonstrations, with a ``label`` that is true or false.

    Ids are those of demonstrations, and of TRL's ``KTOTrainer`` for the same records.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        tokenizer: of the model.
        config: how records become text; default: ``source`` itself, if it is a ``DataConfig``.
        max_length: most tokens of prompt and completion; what is longer loses its end, and is left out and counted
            where the prompt alone fills it. None: any length.

    Raises:
        DataError: every wrong label with its place, or names the file and line or the record.
    """
    return [opinion for _, opinion in read_opinions(source, tokenizer, config, max_length=max_length)]


def read_opinions(
    source: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None, *, max_length: int | None
) -> list[tuple[Record, Opinion]]:
    """As ``make_opinions``, each with the record that it was made of."""
    if config is None and isinstance(source, DataConfig):
        config = source
    records = locate_records(source)
    wrong = []
    for record in records:
        try:
            label_in(record)
        except DataError as error:
            wrong.append(str(error))
    refuse_wrong(wrong, len(records))
    texts = encoded_texts(records, tokenizer, config, max_length=max_length, called="opinions")
    return [
        (
            text.record,
            Opinion(
                prompt_ids=text.ids[: text.start],
                completion_ids=text.ids[text.start :],
                liked=label_in(text.record),
            ),
        )
        for text in texts
    ]


def label_in(record: Record) -> bool:
    """Whether the completion of a record was liked: true or false, 1 or 0, also in quotes, as tables hold them.

    Raises:
        DataError: there is no label, or it is something else.
    """
    value = record.columns.get(LABEL)
    if value is None:
        raise DataError(f"{record.where}: {_missing(record)}")
    word = value.strip().lower() if isinstance(value, str) else value
    for answer, meant in (((True, "true", "1"), True), ((False, "false", "0"), False)):
        if isinstance(word, str | bool | int | float) and word in answer:
            return meant
    raise DataError(f"{record.where}: {LABEL} is {shown(value)}; write true where the completion was liked, else false")


def _missing(record: Record) -> str:
    if LABEL in record.columns:
        return f"{LABEL} is null; leave out completions that nobody judged"
    if {"chosen", "rejected"} <= set(record.columns):
        return f"there is no column {LABEL!r}, but a pair; learn from pairs with dpo, or write one record for each side"
    near = get_close_matches(LABEL, record.columns, n=1, cutoff=0.6)
    hint = f" (is it {near[0]!r}?)" if near else ""
    return (
        f"there is no column {LABEL!r}, which says whether the completion was liked{hint}; there are: "
        f"{listed(record.columns)}"
    )


def refuse_one_kind(opinions: Sequence[Opinion]) -> None:
    """Refuse opinions to train on that are all the same.

    Raises:
        DataError: all were liked, or none was.
    """
    kinds = {opinion.liked for opinion in opinions}
    if len(kinds) == 1:
        only, missing = ("true", "false") if kinds.pop() else ("false", "true")
        raise DataError(
            f"all {len(opinions)} labels to train on are {only}, so that nothing tells good from bad; add completions"
            f" with the label {missing}, or imitate good ones alone with sft"
        )
