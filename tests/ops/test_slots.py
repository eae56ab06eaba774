"""Reward slots as ids: what goes in comes out, to the bit of a float32, and no two slots share an id."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tropism.ops.slots import MOST_SLOTS, read_slots, slot_id, without_slots

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
REWARDS = st.integers(0, MOST_SLOTS - 1)


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@given(reward=REWARDS, value=FLOATS)
def test_a_slot_says_what_it_was_made_of(reward: int, value: float) -> None:
    made = slot_id(reward, value)
    assert made < 0 and made >= -(1 << 63)
    numbers, values, absent = read_slots(torch.tensor([made]))
    assert (numbers.tolist(), absent.tolist()) == ([reward], [False])
    assert values.dtype == torch.float32 and bits(values.item()) == bits(value)


@given(reward=REWARDS)
def test_a_reward_may_be_left_open(reward: int) -> None:
    numbers, values, absent = read_slots(torch.tensor([slot_id(reward, None)]))
    assert (numbers.tolist(), values.tolist(), absent.tolist()) == ([reward], [0.0], [True])


@given(slots=st.lists(st.tuples(REWARDS, st.none() | FLOATS.map(lambda x: x + 0.0)), max_size=20))
def test_different_slots_have_different_ids(slots: list[tuple[int, float | None]]) -> None:
    kinds = {(reward, None if value is None else bits(value)) for reward, value in slots}
    assert len({slot_id(reward, value) for reward, value in slots}) == len(kinds)


def test_by_hand() -> None:
    assert slot_id(0, 0.0) == -1
    assert slot_id(0, 1.0) == -1 - 0x3F800000
    assert slot_id(3, None) == -1 - (3 * 2**33 + 2**32)
    numbers, values, absent = read_slots(torch.tensor([-1, -1 - 0x3F800000, -1 - 0xBF800000, -1 - 2**33]))
    assert numbers.tolist() == [0, 0, 0, 1]
    assert values.tolist() == [0.0, 1.0, -1.0, 0.0]
    assert absent.tolist() == [False] * 4


def test_a_value_is_rounded_to_float32() -> None:
    assert slot_id(0, 0.1) == slot_id(0, struct.unpack("<f", struct.pack("<f", 0.1))[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e300])
def test_what_is_no_finite_float32_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite float32"):
        slot_id(0, value)


@pytest.mark.parametrize("reward", [-1, MOST_SLOTS])
def test_rewards_have_numbers(reward: int) -> None:
    with pytest.raises(ValueError, match="number from 0"):
        slot_id(reward, 1.0)


def test_slots_in_front_are_taken_off() -> None:
    one, two = slot_id(0, 1.0), slot_id(1, None)
    assert list(without_slots((one, two, 0, 5, 6))) == [0, 5, 6]
    assert list(without_slots((0, 5))) == [0, 5]
    assert list(without_slots((one,))) == []
    assert list(without_slots(())) == []


def test_slots_behind_text_and_text_among_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="stands behind text"):
        without_slots((slot_id(0, 1.0), 5, slot_id(0, 1.0)))
    with pytest.raises(ValueError, match="not all reward slots"):
        read_slots(torch.tensor([slot_id(0, 1.0), 0]))
