"""Held-out parts that share no prompt with what is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tropism.data.demonstrations import Demonstration
from tropism.data.order import keyed_hash
from tropism.errors import ConfigError, DataError
from tropism.types import Prompt

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
