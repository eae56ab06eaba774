"""The slab cache as a list of rows: whatever enters, leaves and shifts, each row keeps its own columns in order."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tropism.rollouts.kv_cache import SlabCache

LAYERS, HEADS, SIZE = 2, 3, 4
Row = list[float]
"""What a row should hold: one number per token."""


def states(numbers: Tensor) -> Tensor:
    """[R, N] numbers -> [R, HEADS, N, SIZE] states that name number, head and place."""
    heads = torch.arange(HEADS)[None, :, None, None] * 0.01
    return numbers[:, None, :, None] + heads + torch.arange(SIZE)[None, None, None, :] * 0.001


def write(cache: SlabCache, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What a forward pass does: every layer gets new keys and values, then the cursor moves."""
    for layer in range(LAYERS):
        keys, values = cache.update(states(numbers + 1000 * layer), -states(numbers + 1000 * layer), layer)
    cache.advance(numbers.shape[1])
    return keys, values


def new_cache(slots: int, columns: int, starts: list[int]) -> SlabCache:
    return SlabCache(layers=LAYERS, slots=slots, columns=columns, starts=torch.tensor(starts, dtype=torch.long))


def prefill(rows: list[Row]) -> SlabCache:
    width = max(len(row) for row in rows)
    cache = new_cache(len(rows), width, [width - len(row) for row in rows])
    write(cache, torch.tensor([[-7.0] * (width - len(row)) + row for row in rows]))
    return cache


def assert_holds(cache: SlabCache, rows: list[Row]) -> None:
    assert cache.rows == len(rows)
    assert (cache.cursor - cache.starts).tolist() == [len(row) for row in rows]
    for layer, slab in enumerate(cache.slabs):
        assert slab.keys is not None and slab.values is not None
        for index, row in enumerate(rows):
            start = int(cache.starts[index])
            wanted = states(torch.tensor([row]) + 1000 * layer)[0]
            assert torch.equal(slab.keys[index, :, start : cache.cursor], wanted)
            assert torch.equal(slab.values[index, :, start : cache.cursor], -wanted)
    mask = cache.mask(1)
    assert mask.shape == (len(rows), cache.cursor + 1)
    assert mask.sum(-1).tolist() == [len(row) + 1 for row in rows]
    assert all(row.tolist() == sorted(row.tolist()) for row in mask)


def test_an_update_returns_the_columns_so_far_of_the_rows_in_use() -> None:
    cache = prefill([[1.0, 2.0, 3.0], [4.0]])
    assert_holds(cache, [[1.0, 2.0, 3.0], [4.0]])
    wide = new_cache(5, 9, [])
    wide.make_room(3)
    wide.append(cache, torch.tensor([1, 0, 1]))
    assert_holds(wide, [[4.0], [1.0, 2.0, 3.0], [4.0]])
    keys, values = write(wide, torch.tensor([[5.0], [6.0], [7.0]]))
    assert keys.shape == values.shape == (3, HEADS, 4, SIZE)
    assert torch.equal(keys[1], states(torch.tensor([[1.0, 2.0, 3.0, 6.0]]) + 1000)[0])
    assert_holds(wide, [[4.0, 5.0], [1.0, 2.0, 3.0, 6.0], [4.0, 7.0]])
    assert wide.get_seq_length() == wide.cursor == 4
    assert wide.get_mask_sizes(1, 0) == (5, 0)
    # Transformers before 5.4 gives the indices of the new columns.
    assert wide.slabs[0].get_mask_sizes(torch.arange(4, 6)) == (6, 0)
    assert wide.slabs[0].get_max_length() == wide.slabs[0].get_max_cache_shape() == 9


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 3], [3, 1], [2], [3, 2, 1, 0], []])
def test_keep_puts_the_named_rows_into_the_first_slots_in_that_order(rows: list[int]) -> None:
    contents: list[Row] = [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0], [7.0, 8.0, 9.0]]
    cache = prefill(contents)
    cache.keep(torch.tensor(rows, dtype=torch.long))
    assert_holds(cache, [contents[row] for row in rows])


@pytest.mark.parametrize("columns", [0, 1, 2, 5])
def test_shifts_move_overlapping_columns_without_mixing_them(columns: int) -> None:
    contents: list[Row] = [[1.0, 2.0, 3.0], [4.0]]
    cache = new_cache(2, 8, [])
    cache.make_room(3)
    cache.append(prefill(contents), torch.tensor([0, 1]))
    cache.shift(columns)
    assert cache.starts.tolist() == [columns, columns + 2]
    assert_holds(cache, contents)
    cache.shift(-columns)
    assert cache.starts.tolist() == [0, 2]
    assert_holds(cache, contents)


def test_room_is_made_by_shifting_right_for_a_long_newcomer_and_left_at_the_end() -> None:
    cache = new_cache(3, 6, [])
    cache.make_room(1)
    cache.append(prefill([[1.0]]), torch.tensor([0]))
    assert cache.cursor == 1
    cache.make_room(4)
    assert cache.cursor == 4
    cache.append(prefill([[2.0, 3.0, 4.0, 5.0]]), torch.tensor([0]))
    assert_holds(cache, [[1.0], [2.0, 3.0, 4.0, 5.0]])
    cache.keep(torch.tensor([0]))
    for number in (6.0, 7.0):
        cache.make_room(0)
        write(cache, torch.tensor([[number]]))
    assert cache.cursor == cache.columns == 6
    cache.make_room(0)
    assert cache.cursor == 3 and cache.starts.tolist() == [0]
    assert_holds(cache, [[1.0, 6.0, 7.0]])
    cache.keep(torch.tensor([], dtype=torch.long))
    assert cache.rows == 0


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_equals_a_list_of_lists(seed: int) -> None:
    """Rows enter, decode and leave at random in a cache whose room just suffices; the slabs never move."""
    draw = random.Random(seed)
    slots, longest, new, slack = 4, 5, 6, draw.choice([1, 2, 4])
    cache = new_cache(slots, longest + new + slack, [])
    rows: list[Row] = []
    age: list[int] = []
    shifts, pointers, fresh = 0, set(), 0.0
    for _ in range(60):
        if len(rows) < slots and (not rows or draw.random() < 0.4):
            given: list[Row] = []
            for _ in range(draw.randint(1, 2)):
                given.append([fresh + i for i in range(draw.randint(1, longest))])
                fresh += 10
            places = [draw.randrange(len(given)) for _ in range(draw.randint(1, slots - len(rows)))]
            other = prefill(given)
            cache.make_room(other.cursor)
            cache.append(other, torch.tensor(places))
            rows += [list(given[place]) for place in places]
            age += [0] * len(places)
        before = cache.cursor
        cache.make_room(0)
        shifts += cache.cursor != before
        numbers = [fresh + i for i in range(len(rows))]
        fresh += 10
        write(cache, torch.tensor(numbers)[:, None])
        rows = [[*row, number] for row, number in zip(rows, numbers, strict=True)]
        age = [n + 1 for n in age]
        assert_holds(cache, rows)
        staying = [i for i, n in enumerate(age) if n < new - 1 and draw.random() < 0.8]
        draw.shuffle(staying)
        cache.keep(torch.tensor(staying, dtype=torch.long))
        rows, age = [rows[i] for i in staying], [age[i] for i in staying]
        assert_holds(cache, rows)
        assert cache.slabs[0].keys is not None
        pointers.add(cache.slabs[0].keys.data_ptr())
    assert shifts > 0 and len(pointers) == 1
