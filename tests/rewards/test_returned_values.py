"""What reward functions may return, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tropism.errors import RewardError
from tropism.rewards.raw import RawRewards, checked_values


def shown(value: Any) -> str:
    """Without addresses: processes that share the tests must agree on their names."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, 0.0],
        [1, 0],
        [True, False],
        (1.0, 0),
        [torch.tensor(1.0), torch.tensor(0)],
        [np.float32(1.0), np.int64(0)],
        [np.bool_(True), np.bool_(False)],
        [Fraction(1), Decimal("0.0")],
        torch.tensor([1.0, 0.0]),
        torch.tensor([1, 0]),
        torch.tensor([True, False]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0], requires_grad=True),
        np.array([1.0, 0.0]),
        np.array([1, 0], dtype=object),
        (value for value in [1.0, 0.0]),
        map(float, [1, 0]),
    ],
    ids=shown,
)
def test_one_number_per_completion_in_any_container(returned: Any) -> None:
    values = checked_values(returned, [3, 1])
    assert values == [1.0, 0.0]
    assert all(type(value) is float for value in values)


def test_none_means_unscored() -> None:
    assert checked_values([None, 2.5], [3, 1]) == [None, 2.5]
    assert checked_values(np.array([None, 2.5], dtype=object), [3, 1]) == [None, 2.5]


@pytest.mark.parametrize(
    "row",
    [
        [1, 2.0, True],
        (1, 2.0, 1),
        torch.tensor([1.0, 2.0, 1.0]),
        np.array([1, 2, 1]),
        [torch.tensor(1.0), 2, np.int8(1)],
    ],
    ids=shown,
)
def test_one_number_per_token(row: Any) -> None:
    values = checked_values([row, 0.5], [3, 1])
    assert values == [[1.0, 2.0, 1.0], 0.5]
    assert all(type(value) is float for value in values[0])  # type: ignore[union-attr]


def test_an_empty_completion_takes_an_empty_list_or_a_number() -> None:
    assert checked_values([[], 1.0], [0, 0]) == [[], 1.0]


def test_a_matrix_without_padding_is_per_token() -> None:
    assert checked_values(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [2, 2]) == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None.*`return` missing"),
        (0.5, "single float"),
        (torch.tensor(0.5), "single"),
        ("ab", "returned a str"),
        (b"ab", "returned a bytes"),
        ({"a": 1, "b": 2}, "returned a dict"),
        ({1.0, 2.0}, "returned a set"),
        (object(), "single object"),
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 rewards for 2 completions"),
        ([], "returned 0 rewards for 2 completions"),
        (torch.zeros(2, 2, 2), "2 per-token rewards for a completion of 3 tokens"),
        ([1.0, "0.5"], "the str '0.5'"),
        ([1.0, b"1"], "the bytes"),
        ([1.0, 1j], "the complex"),
        ([1.0, object()], "the object"),
        ([1.0, {"reward": 1}], "the dict"),
        ([1.0, float("nan")], "NaN; return None"),
        (torch.tensor([1.0, float("nan")]), "NaN"),
        ([1.0, float("inf")], "inf; return a finite number"),
        ([1.0, float("-inf")], "-inf"),
        ([1.0, 1e39], "1e[+]39"),
        ([1.0, 10**400], "inf"),
        ([1.0, Decimal("sNaN")], "finite"),
        ([[1.0, 2.0], 1.0], "2 per-token rewards for a completion of 3 tokens"),
        ([[1.0], 1.0], "1 per-token rewards for a completion of 3 tokens.*not a list of one"),
        ([[1.0, None, 1.0], 1.0], "NoneType 'None' at token 1"),
        ([[1.0, 2.0, float("nan")], 1.0], "NaN at token 2"),
        ([[1.0, "2", 1.0], 1.0], "str '2' at token 1"),
        ([[[1.0], [1.0], [1.0]], 1.0], "list .* at token 0"),
    ],
    ids=shown,
)
def test_everything_else_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked_values(returned, [3, 1])


def test_an_endless_iterator_is_not_followed() -> None:
    with pytest.raises(RewardError, match="returned more than 2 rewards for 2 completions"):
        checked_values(itertools.repeat(1.0), [3, 1])
    assert checked_values(itertools.islice(itertools.repeat(1.0), 2), [3, 1]) == [1.0, 1.0]


def test_a_generator_that_raises_is_no_wrong_type() -> None:
    def rewards() -> Any:
        yield 1.0
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        checked_values(rewards(), [3, 1])


class OnDevice:
    """What a tensor of a GPU is to who must not compute with it there: NumPy refuses it, ``tolist`` brings it over."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a device tensor to numpy")

    def __iter__(self) -> Any:
        raise AssertionError("elements would stay on the device")

    def tolist(self) -> Any:
        return self.values


def test_tensors_of_other_devices_come_over() -> None:
    assert checked_values(OnDevice([1.0, 2]), [3, 1]) == [1.0, 2.0]
    assert checked_values([OnDevice(1.0), OnDevice([2.0])], [3, 1]) == [1.0, [2.0]]
    with pytest.raises(RewardError, match="NaN"):
        checked_values([OnDevice(math.nan), 1.0], [3, 1])


ENTRIES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.decimals()
    | st.fractions()
    | st.floats(width=32).map(np.float32)
    | st.integers(-9, 9).map(torch.tensor)
    | st.sampled_from([object(), float, np.array([1, 2]), np.array(["a"]), np.bool_(True), torch.tensor([0.5])]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.lists(inner, max_size=3).map(iter)
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(ENTRIES, st.lists(st.integers(0, 3), max_size=4))
def test_whatever_is_returned_is_plain_rewards_or_refused(returned: Any, counts: list[int]) -> None:
    try:
        values = checked_values(returned, counts)
    except RewardError:
        return
    assert len(values) == len(counts)
    for value, count in zip(values, counts, strict=True):
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        assert not isinstance(value, list) or len(value) == count
        assert all(type(number) is float and math.isfinite(number) and abs(number) < 3.5e38 for number in numbers)


def test_parts_of_several_processes_join_in_order() -> None:
    first = RawRewards(
        values={"a": [1.0, None], "b": [[1.0], 2.0]},
        metrics={"m": [1.0]},
        extras={"x": ["p", "q"]},
        counts={"a": {"failed": 1, "retries": 2}},
        errors={"a": [None, "why"]},
    )
    second = RawRewards(values={"b": [0.0], "a": [3.0]}, metrics={"m": [3.0], "n": [5.0]}, counts={"a": {"failed": 1}})
    joined = RawRewards.concat([first, second])
    assert len(joined) == 3
    assert joined.values == {"a": [1.0, None, 3.0], "b": [[1.0], 2.0, 0.0]}
    assert joined.metrics == {"m": [1.0, 3.0], "n": [5.0]}
    assert joined.extras == {"x": ["p", "q", None]}
    assert joined.counts == {"a": {"failed": 2, "retries": 2}}
    assert joined.errors == {"a": [None, "why", None]}
    with pytest.raises(ValueError, match=r"different terms"):
        RawRewards.concat([first, RawRewards(values={"c": [1.0]})])
    with pytest.raises(ValueError, match=r"no parts"):
        RawRewards.concat([])
