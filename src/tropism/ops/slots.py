"""Reward slots as token ids: a number below 0 that says which reward is asked for, and how much of it.

A slot stands in a prompt like any token: it has a position, it is in the KV cache, it fills the context. So everything
that treats rows of ids (padding, sharing of prompts, caches, batches, checkpoints) treats slots, too; only the model's
input embedding has to know them. The value is held to the bit of a float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

ABSENT = 1 << 32
"""The bit of a slot whose reward is not asked for."""
MOST_SLOTS = 1 << 20
"""Rewards that can be told apart."""


def slot_id(reward: int, value: float | None) -> int:
    """The id of a slot.

    Args:
        reward: number of the reward, from 0.
        value: what is asked for, as the model is told it; None where this reward is left open.

    Returns:
        A number below 0.

    Raises:
        ValueError: the value is not finite, also as a float32, or there is no such reward.
    """
    if not 0 <= reward < MOST_SLOTS:
        raise ValueError(f"a reward has a number from 0 to {MOST_SLOTS - 1}, not {reward}")
    head = reward << 33
    if value is None:
        return -1 - (head | ABSENT)
    try:
        bits: int | None = struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        bits = None
    if bits is None or not math.isfinite(value):
        raise ValueError(f"a slot holds a finite float32, not {value}")
    return -1 - (head | bits)


def without_slots(ids: Sequence[int]) -> Sequence[int]:
    """The ids of the text behind the slots.

    Args:
        ids: of one row, slots in front.

    Returns:
        The ids from the first that is no slot on; ``ids`` itself where there are no slots.

    Raises:
        ValueError: a slot stands behind text.
    """
    first = next((place for place, token in enumerate(ids) if token >= 0), len(ids))
    text = ids[first:] if first else ids
    if any(token < 0 for token in text):
        raise ValueError("a reward slot stands behind text; slots come first")
    return text


def read_slots(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What slots say.

    Args:
        ids: [N] all below 0.

    Returns:
        [N] numbers of the rewards, [N] float32 values (0 where left open), and [N] bool: left open.

    Raises:
        ValueError: an id is no slot.
    """
    if bool((ids >= 0).any()):
        raise ValueError("these ids are not all reward slots, which are below 0")
    code = -1 - ids
    low = code & 0xFFFFFFFF
    bits = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
    absent = (code & ABSENT) != 0
    return code >> 33, bits.view(torch.float32).masked_fill(absent, 0.0), absent
