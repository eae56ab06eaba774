"""Human judgements of completions: choices, pairs, ratings and differences, as token ids that a reward model reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from tropism.classifier_inputs import ClassifierInputs, UnreadableError
from tropism.data.config import DataConfig
from tropism.data.files import shown
from tropism.data.judged_values import check_annotator_weights, is_given, number_in, ratings_in, refuse_wrong, weight_in
from tropism.data.judgement_records import (
    CHOICES,
    DECISIVE,
    LABELS,
    OPTIONAL,
    Format,
    format_of,
    prompt_column_of,
    read_judged,
)
from tropism.data.label_files import exact_text, read_label, vocabulary_of
from tropism.data.readers import Record, locate_records
from tropism.errors import ConfigError, DataError
from tropism.judgements import Comparison, Kind
from tropism.texts import plain_text

logger = logging.getLogger(__name__)

_MEANINGLESS = {
    "completion_column": "judgements have their completions in `completions`, in `chosen` and `rejected`, or in"
    " `completion`",
    "first_words": "the completions of a judgement answer the whole prompt",
    "prepare": "the completions of a judgement answer the prompt as it stands",
}
_OF_TEXTS = ("prompt_column", "template", "system_prompt", "chat")
"""Settings that mean nothing for label files."""


def read_comparisons(
    source: Any,
    inputs: ClassifierInputs,
    config: DataConfig | None = None,
    *,
    varied_k: bool = False,
    annotator_weights: Mapping[str, float] | None = None,
) -> tuple[Kind, list[Comparison]]:
    """What people said about completions, of any format of judgements or of label files, all records of one format.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        inputs: how the reward model reads prompt and completion.
        config: how records become text; default: ``source`` itself, if it is a ``DataConfig``.
        varied_k: records may hold different numbers of completions.
        annotator_weights: what the judgements of each annotator (column ``annotator``) count; None: all alike.

    Returns:
        What was said, and the judgements in the order of the data.

    Raises:
        ConfigError: settings that mean nothing for judgements.
        DataError: every wrong record with its place and reason; or two formats; or nothing that could be learned.
    """
    if config is None and isinstance(source, DataConfig):
        config = source
    _check_settings(config)
    check_annotator_weights(annotator_weights)
    records = locate_records(source)[: config.limit if config else None]
    form, wrong = _common_format(records)
    reader = _Reader(records, form, inputs, config, annotator_weights)
    items: list[Comparison] = []
    for index, record in enumerate(records):
        if index in wrong:
            continue
        try:
            item = reader.read(record)
            if items and len(item.ids) != len(items[0].ids) and not varied_k:
                raise DataError(
                    f"{record.where}: it has {len(item.ids)} completions, but the first record has"
                    f" {len(items[0].ids)}; set varied_k: true if numbers that differ are meant"
                )
            items.append(item)
        except DataError as error:
            wrong[index] = str(error)
    refuse_wrong([wrong[index] for index in sorted(wrong)], len(records))
    _refuse_useless(items, form.kind)
    return form.kind, items


def comparison_key(item: Comparison) -> str:
    """What comparisons share that must stay on one side of a held-out split.

    That is the prompt, however its words are spaced; without one it is all the completions, in any order.
    """
    prompt = " ".join(item.prompt.split())
    if prompt:
        return json.dumps({"prompt": prompt})
    return json.dumps({"completions": sorted(" ".join(text.split()) for text in item.completions)})


class _Reader:
    """Records of one format as comparisons."""

    def __init__(
        self,
        records: Sequence[Record],
        form: Format,
        inputs: ClassifierInputs,
        config: DataConfig | None,
        annotator_weights: Mapping[str, float] | None,
    ) -> None:
        self.form, self.inputs, self.config, self.annotator_weights = form, inputs, config, annotator_weights
        self.is_label = form in LABELS.values()
        if self.is_label:
            _refuse_text_settings(config)
            self.vocabulary = vocabulary_of(inputs.tokenizer)
        self.prompt_column = None if self.is_label else prompt_column_of(records, config)
        _warn_of_near_names(records)

    def read(self, record: Record) -> Comparison:
        """One comparison.

        Raises:
            DataError: names the record and what is wrong with it.
        """
        made = self._label(record) if self.is_label else self._judged(record)
        return replace(
            made,
            margin=number_in(record, "margin") if is_given(record, "margin") else 0.0,
            weight=weight_in(record, self.annotator_weights),
            ratings=ratings_in(record, len(made.ids)) if self.form in (CHOICES, LABELS["choice"]) else None,
        )

    def _judged(self, record: Record) -> Comparison:
        judged = read_judged(record, self.form, self.prompt_column, self.config)
        rows = (self._joint(record, k, judged.prompt, text) for k, text in enumerate(judged.completions))
        return Comparison(
            ids=tuple(rows),
            prompt=plain_text(judged.prompt),
            chat=not isinstance(judged.prompt, str),
            completions=tuple(plain_text(completion) for completion in judged.completions),
            choice=judged.choice,
            target=judged.target,
        )

    def _label(self, record: Record) -> Comparison:
        label = read_label(record, self.vocabulary)
        tokenizer = self.inputs.tokenizer
        rows = (self._joint(record, k, label.query, sample) for k, sample in enumerate(label.samples))
        return Comparison(
            ids=tuple(rows),
            prompt=exact_text(tokenizer, label.query),
            completions=tuple(exact_text(tokenizer, sample) for sample in label.samples),
            choice=label.choice,
            target=label.target,
        )

    def _joint(self, record: Record, index: int, prompt: Any, completion: Any) -> tuple[int, ...]:
        """Ids of prompt and completion, of texts or of ids, as the reward model reads them."""
        try:
            if self.is_label:
                return tuple(self.inputs.joined(list(prompt), list(completion)))
            return tuple(self.inputs.ids(prompt, completion))
        except UnreadableError as error:
            raise DataError(f"{record.where}: completion {index}: {error}") from error


def _check_settings(config: DataConfig | None) -> None:
    for name, why in _MEANINGLESS.items():
        if config is not None and getattr(config, name) is not None:
            raise ConfigError(f"{name} means nothing for judgements: {why}; leave it out")


def _refuse_text_settings(config: DataConfig | None) -> None:
    given = [] if config is None else [name for name in _OF_TEXTS if getattr(config, name)]
    if given:
        raise ConfigError(f"{given[0]} means nothing for label files, whose prompts are token ids; leave it out")


def _common_format(records: Sequence[Record]) -> tuple[Format, dict[int, str]]:
    """The format of all records, and for those that have none the reason.

    Raises:
        DataError: two formats, or none.
    """
    common: Format | None = None
    first = ""
    wrong: dict[int, str] = {}
    for index, record in enumerate(records):
        try:
            form = format_of(record)
        except DataError as error:
            wrong[index] = str(error)
            continue
        if common is None:
            common, first = form, record.where
        elif form != common:
            raise DataError(
                f"{record.where}: one of the {form}, but {first} is one of the {common}; give one data set for each"
            )
    if common is None:
        others = f" ({len(records) - 1} more records have none either)" if len(records) > 1 else ""
        raise DataError(wrong[0] + others)
    return common, wrong


def _warn_of_near_names(records: Sequence[Record]) -> None:
    """Columns that may be left out are easily misspelt, and then have no effect."""
    columns = {name for record in records for name in record.columns}
    for name in (name for name in OPTIONAL if name not in columns):
        near = get_close_matches(name, columns - DECISIVE - set(OPTIONAL), n=1, cutoff=0.8)
        if near:
            logger.warning("the column %s is not read; if it is to be, call it %r", shown(near[0]), name)


def _refuse_useless(items: Sequence[Comparison], kind: Kind) -> None:
    """Refuse judgements that do not differ in anything."""
    if kind == "choice":
        if all(len(set(item.completions)) == 1 for item in items):
            raise DataError(f"in all {len(items)} records the completions are the same text; there is nothing to learn")
        return
    targets = {item.target for item in items}
    if len(items) > 1 and len(targets) == 1 and (kind == "rating" or targets == {0.0}):
        called = "ratings" if kind == "rating" else "differences"
        raise DataError(f"all {len(items)} {called} are {targets.pop():g}; there is nothing to learn from them")
