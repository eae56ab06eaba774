"""Scored texts: prompts with completions and the rewards that were given to them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tropism.data.columns import value_of
from tropism.data.config import DataConfig
from tropism.data.demonstrations import encoded_texts
from tropism.data.files import listed, shown
from tropism.data.readers import Record
from tropism.errors import DataError
from tropism.types import ScoredText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST = 3.4028234663852886e38
"""Of float32, in which models are told of rewards."""


def make_scored(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    targets: Sequence[str],
    max_length: int | None,
) -> list[ScoredText]:
    """Texts with their rewards, from records as those of demonstrations with one column of numbers per target.

    Of a plain text every token is learned, the first one too, since what asks for a reward stands before it; its prompt
    is the BOS alone, or nothing. One eos ends every plain text, unless the column ``finish_reason`` says ``length``;
    the chat template ends chats.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        tokenizer: of the model.
        config: how records become text; default: ``source`` itself, if it is a ``DataConfig``.
        targets: the columns with the rewards; ``a.b`` reaches into nested records.
        max_length: most tokens of prompt and completion; what is longer loses its end (and has no eos then), and is
            left out and counted where the prompt alone fills it. None: any length.

    Raises:
        DataError: names the file and line or the record, and the column.
    """
    read = read_scored(source, tokenizer, config, targets=targets, max_length=max_length)
    return [text for _, text in read]


def read_scored(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    targets: Sequence[str],
    max_length: int | None,
) -> list[tuple[Record, ScoredText]]:
    """As ``make_scored``, each with the record that it was made of."""
    texts = encoded_texts(source, tokenizer, config, max_length=max_length, shortest_prompt=0, called="scored texts")
    return [
        (
            text.record,
            ScoredText(
                prompt_ids=text.ids[: text.start],
                completion_ids=text.ids[text.start :],
                rewards=tuple(_reward(text.record, target) for target in targets),
            ),
        )
        for text in texts
    ]


def _reward(record: Record, target: str) -> float:
    """The number in the column of a target."""
    return finite_reward(value_of_target(record, target), f"{record.where}: the column {target!r}")


def finite_reward(value: Any, where: str) -> float:
    """A reward as float.

    Args:
        where: begins messages.

    Raises:
        DataError: it is no number, NaN, or too large for float32.
    """
    if isinstance(value, str):
        raise DataError(
            f"{where} holds the text {shown(value)}; store the reward as a number, without quotes (tables such as .csv"
            " hold text only: use .jsonl or .parquet)"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        raise DataError(f"{where} is {type(value).__name__} {shown(value)}, not a number; store the reward there")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:  # a signalling NaN of decimal
        number = math.nan
    if math.isnan(number):
        raise DataError(f"{where} is NaN; leave the record out, or score it again")
    if abs(number) > _LARGEST:
        raise DataError(f"{where} is {shown(value)}, too large for a reward; give numbers of a sane size")
    return number


def value_of_target(record: Record, target: str, *, setting: str = "targets") -> Any:
    """What the column of a target holds, unless there is none or nothing in it.

    Args:
        setting: where the method names it.

    Raises:
        DataError: there is no such column, or it is null.
    """
    if target.split(".")[0] not in record.columns and target not in record.columns:
        near = get_close_matches(target, record.columns, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise DataError(
            f"{record.where}: there is no column {target!r} with a reward{hint} there are: {listed(record.columns)}."
            f" Name the rewards in `{setting}`, or score the data first: tropism score DATA --reward NAME --out FILE"
        )
    if record.columns.get(target, "") is None:
        raise DataError(
            f"{record.where}: the column {target!r} is null, so the text has no reward; leave such records out"
            " (tropism score --drop-unscored does)"
        )
    return value_of(record, target)


def refuse_equal(texts: Sequence[ScoredText], targets: Sequence[str]) -> None:
    """Refuse texts to train on that do not differ in a reward.

    Raises:
        DataError: names the target whose rewards are all equal.
    """
    for target, rewards in zip(targets, zip(*(text.rewards for text in texts), strict=True), strict=True):
        if min(rewards) == max(rewards):
            raise DataError(
                f"all {len(rewards)} rewards of {target!r} are {rewards[0]:g}, so there is nothing to ask for: give"
                " texts that differ in it, or take it out of `targets`"
            )
