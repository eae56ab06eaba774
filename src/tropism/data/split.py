"""Held-out parts that share no prompt with what is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tropism.data.columns import as_chat, choose_column, end_of_words, prompt_value
from tropism.data.config import DataConfig
from tropism.data.demonstrations import Demonstration, layout_of, texts_of
from tropism.data.order import keyed_hash
from tropism.data.preparation import preparer_of
from tropism.data.prompts import PROMPT_COLUMNS
from tropism.data.readers import Record
from tropism.errors import ConfigError, DataError
from tropism.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


def prompt_key(item: Any) -> str:
    """What two items share if they have the same prompt.

    For a demonstration whose prompt is a single token (plain text) it is the whole text: the BOS parts nothing.
    """
    if isinstance(item, Prompt):
        value: Any = item.text
    elif isinstance(item, Demonstration):
        value = item.prompt_ids if len(item.prompt_ids) > 1 else (*item.prompt_ids, *item.completion_ids)
    else:
        value = item
    return json.dumps(value, sort_keys=True, default=repr)


class PromptsOfTexts:
    """The prompts of records that are read as texts to learn, so that texts and prompts can be parted alike.

    Args:
        records: all of the data, as their columns together say which is the prompt.
        config: how they are read.
        tokenizer: of the model, whose tokens cut prompts where the settings prepare them.
    """

    def __init__(self, records: Sequence[Record], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.layout, self.config = layout_of(records, config), config
        self.preparer = preparer_of(tokenizer, config.prepare)
        self.column = config.prompt_column
        if self.column is None and config.template is None:
            self.column = choose_column(records, PROMPT_COLUMNS, but=self.layout.completion)
        self.names = tuple(dict.fromkeys(name for record in records for name in record.columns))

    def key(self, record: Record) -> str:
        """What texts with the same prompt share, and the plain prompt; the whole text where that is empty.

        Prompts are the same if they are once they have been prepared.
        """
        prompt = self._prompt(record)
        if self.preparer is not None and (prepared := self.preparer(prompt, record.where)) is not None:
            return prompt_key(prepared.text)
        if prompt == "":
            return prompt_key(texts_of(record, self.layout, self.config))
        if isinstance(prompt, str) and self.config.first_words is not None:
            prompt = prompt[: end_of_words(prompt, self.config.first_words)]
        return prompt_key(as_chat(prompt, self.config))

    def readable(self, records: Iterable[Record]) -> tuple[list[Record], DataConfig]:
        """These records and how to read them for ``make_prompts``: chats without their answer, and every column."""
        shown = []
        for record in records:
            columns = {**dict.fromkeys(self.names), **record.columns}
            if self.column is not None:
                columns[self.column] = self._prompt(record)
            shown.append(replace(record, columns=columns))
        return shown, replace(self.config, prompt_column=self.column, limit=None)

    def _prompt(self, record: Record) -> str | Messages:
        """The column or the filled template; of a chat that is learned what stands before the answer."""
        value = prompt_value(record, self.column, self.config)
        answered = self.layout.completion is None and not isinstance(value, str) and value[-1]["role"] == "assistant"
        return value[:-1] if answered else value


def train_eval_split(
    items: Sequence[T], fraction: float, *, seed: int, key: Callable[[T], str] = prompt_key
) -> tuple[list[T], list[T]]:
    """Two parts of the items, each in the given order; equal prompts stay together.

    Which prompts are held out depends on the seed and their text alone, not on their order.

    Args:
        items: prompts, demonstrations or plain values.
        fraction: share to hold out, above 0 and below 1.
        seed: keys the choice.
        key: what items that belong together share.

    Returns:
        (train, eval), at least one item each.

    Raises:
        ConfigError: the fraction is out of range.
        DataError: fewer than two different prompts.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction to hold out must be above 0 and below 1, got {fraction}")
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"{len(items)} items with {len(groups)} different prompts cannot be parted into training and evaluation;"
            " give more prompts or separate evaluation data"
        )
    wanted = max(1, round(fraction * len(items)))
    ranked = sorted(groups, key=lambda text: (keyed_hash("split", seed, text), text))
    held_out: set[int] = set()
    for text in ranked[:-1]:  # the last stays for training
        if len(held_out) + len(groups[text]) <= wanted:
            held_out.update(groups[text])
    if not held_out:
        smallest: list[int] = min((groups[text] for text in ranked), key=len)
        held_out.update(smallest)
    train = [item for index, item in enumerate(items) if index not in held_out]
    return train, [item for index, item in enumerate(items) if index in held_out]
