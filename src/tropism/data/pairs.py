"""Pairs of completions, one of them preferred, as token ids that a policy learns from.

Ids are those of TRL's ``DPOTrainer`` for the same records: prompt and completion are encoded in one piece, and both
completions begin where the first of them departs from the encoded prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tropism.data.config import DataConfig
from tropism.data.demonstrations import FINISH_REASON, encode_parts, without_end
from tropism.data.encoding import room_behind
from tropism.data.files import listed
from tropism.data.judged_values import refuse_wrong, weight_in
from tropism.data.judgement_records import CHOICES, PAIRS, Judged, format_of, prompt_column_of, read_judged
from tropism.data.readers import Record, locate_records
from tropism.errors import ConfigError, DataError
from tropism.preferences import Pair
from tropism.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MEANINGLESS = {
    "completion_column": "the completions are in `chosen` and `rejected`, or in `completions`",
    "first_words": "the completions of a pair answer the whole prompt",
    "prepare": "the completions of a pair answer the prompt as it stands",
}
_NOT_READ = ("margin", "annotator")
"""Columns of judgements that reward models learn from, and policies do not."""


def make_pairs(
    source: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None, *, max_length: int | None
) -> list[Pair]:
    """Pairs from records with ``chosen`` and ``rejected``, or with ``completions`` and the ``choice`` among them.

    Of K completions the chosen one makes a pair with each of the others. Ties are left out and counted. One eos ends
    every plain text, unless ``chosen_finish_reason`` or ``rejected_finish_reason`` (or its place in the list
    ``finish_reasons`` of K completions) says ``length``; the chat template ends chats. An empty prompt becomes the BOS
    alone.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        tokenizer: of the model.
        config: how records become text; default: ``source`` itself, if it is a ``DataConfig``.
        max_length: most tokens of prompt and completion; what is longer loses its end. A pair whose prompt alone fills
            it, or whose completions are the same within it, is left out and counted. None: any length.

    Raises:
        ConfigError: settings that mean nothing for pairs.
        DataError: every wrong record with its place and reason, or nothing is left.
    """
    return [pair for _, pair in read_pairs(source, tokenizer, config, max_length=max_length)]


def read_pairs(
    source: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None, *, max_length: int | None
) -> list[tuple[Record, Pair]]:
    """As ``make_pairs``, each with its record, whose column ``prompt`` holds what was taken for the prompt."""
    if config is None and isinstance(source, DataConfig):
        config = source
    for name, why in _MEANINGLESS.items():
        if config is not None and getattr(config, name) is not None:
            raise ConfigError(f"{name} means nothing for pairs: {why}; leave it out")
    records = locate_records(source)[: config.limit if config else None]
    _warn_of_unread(records)
    column = prompt_column_of(records, config)
    encoder = _Encoder(tokenizer, max_length)
    pairs: list[tuple[Record, Pair]] = []
    wrong: list[str] = []
    ties = 0
    for record in records:
        try:
            judged = _judged(record, column, config)
            if judged.choice is None:
                ties += 1
                continue
            shown = replace(record, columns={**record.columns, "prompt": judged.prompt})
            pairs += [(shown, pair) for pair in encoder.pairs(record, judged)]
        except DataError as error:
            wrong.append(str(error))
    refuse_wrong(wrong, len(records))
    encoder.report(ties)
    if not pairs:
        raise DataError(
            f"no pair is left of {len(records)} records: {ties} are ties, the prompts of {encoder.too_long} fill"
            f" max_length ({max_length}) alone, and {encoder.same} have completions that are the same within it"
        )
    return pairs


def _warn_of_unread(records: Sequence[Record]) -> None:
    found = [name for name in _NOT_READ if any(record.columns.get(name) is not None for record in records)]
    if found:
        logger.warning("a policy does not learn from these columns of pairs, which are not read: %s", listed(found))


def _finish_reasons(record: Record, count: int) -> list[Any]:
    """How each completion ended, None where the record does not say.

    Raises:
        DataError: it says so of another number of completions.
    """
    if "chosen" in record.columns:
        return [record.columns.get(f"{side}_{FINISH_REASON}") for side in ("chosen", "rejected")]
    listed_ends = record.columns.get(f"{FINISH_REASON}s")
    if listed_ends is None:
        return [None] * count
    if not isinstance(listed_ends, list | tuple) or len(listed_ends) != count:
        raise DataError(f"{record.where}: {FINISH_REASON}s must be a list with one for each of {count} completions")
    return list(listed_ends)


def _judged(record: Record, column: str | None, config: DataConfig | None) -> Judged:
    """Prompt and completions of a record that says which one was preferred."""
    form = format_of(record)
    if form not in (PAIRS, CHOICES):
        raise DataError(
            f"{record.where}: it is one of the {form}, which do not say which completion was preferred; give {PAIRS} or"
            f" {CHOICES} (tropism convert labels makes texts of label files)"
        )
    judged = read_judged(record, form, column, config)
    if isinstance(judged.prompt, str) and not all(isinstance(text, str) for text in judged.completions):
        raise DataError(
            f"{record.where}: the completions are messages without a prompt; give it in the column `prompt`"
        )
    return judged


@dataclass
class _Encoder:
    """Records as pairs of ids, with what was met on the way."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    too_long: int = 0
    same: int = 0
    merged: int = 0
    endless: int = 0

    def pairs(self, record: Record, judged: Judged) -> list[Pair]:
        """The chosen completion of a record with each of the others.

        Raises:
            DataError: names the record and what is wrong with it.
        """
        assert judged.choice is not None
        weight, ends = weight_in(record, None), _finish_reasons(record, len(judged.completions))
        made = []
        for place in range(len(judged.completions)):
            if place == judged.choice:
                continue
            sides = [
                self._encoded(record, judged.prompt, judged.completions[side], cut=ends[side] == "length")
                for side in (judged.choice, place)
            ]
            if sides[0][0] == sides[1][0]:
                name = "the rejected one" if len(judged.completions) == 2 else f"completion {place}"
                raise DataError(
                    f"{record.where}: the chosen completion and {name} are the same, which teaches nothing; mark it as"
                    " a tie, or leave it out"
                )
            pair = self._pair(record, sides, weight)
            made += [] if pair is None else [pair]
        return made

    def _encoded(
        self, record: Record, prompt: str | Messages, text: str | Messages, *, cut: bool
    ) -> tuple[list[int], int, bool]:
        ids, start, clean = encode_parts(self.tokenizer, prompt, text, where=record.where, shortest_prompt=0)
        return without_end(ids, start, self.tokenizer.eos_token_id) if cut else ids, start, clean

    def _pair(self, record: Record, sides: Sequence[tuple[list[int], int, bool]], weight: float) -> Pair | None:
        """None where nothing is left to tell apart."""
        start = min(start for _, start, _ in sides)
        self.merged += not all(clean for _, _, clean in sides)
        self.endless += any(self.tokenizer.eos_token_id not in ids[start:] for ids, _, _ in sides)
        prompt, completions = sides[0][0][:start], [ids[start:] for ids, _, _ in sides]
        if not prompt:
            bos = self.tokenizer.bos_token_id
            if not isinstance(bos, int):
                raise DataError(f"{record.where}: the prompt is empty and the tokenizer has no BOS to begin with")
            prompt = [bos]
        room = room_behind(self.tokenizer, len(prompt), self.max_length)
        if room is not None:
            if not room:
                self.too_long += 1
                return None
            completions = [ids[:room] for ids in completions]
            if completions[0] == completions[1]:
                self.same += 1
                return None
        chosen, rejected = (tuple(ids) for ids in completions)
        return Pair(prompt_ids=tuple(prompt), chosen_ids=chosen, rejected_ids=rejected, weight=weight)

    def report(self, ties: int) -> None:
        """Tell what was left out, and what will be learned otherwise than it may seem."""
        if ties:
            logger.warning("left out %d ties, in which nothing was preferred", ties)
        if self.too_long:
            logger.warning("left out %d pairs whose prompt alone fills max_length", self.too_long)
        if self.same:
            logger.warning("left out %d pairs whose completions are the same within max_length", self.same)
        if self.merged:
            logger.warning(
                "in %d pairs the prompt's last token merges with a completion's first, so the completions begin one"
                " token earlier than at sampling; end prompts at a word and begin completions with the space",
                self.merged,
            )
        if self.endless:
            logger.warning(
                "the chat template ends %d pairs without the tokenizer's eos, so the model does not learn to stop",
                self.endless,
            )
