"""What reward functions may return, and what is refused."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tropism.errors import RewardError
from tropism.rewards.raw import RawRewards, checked_values


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
    ids=repr,
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
    ids=repr,
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
    ids=repr,
)
def test_everything_else_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked_values(returned, [3, 1])


def test_parts_of_several_processes_join_in_order() -> None:
    first = RawRewards(
        values={"a": [1.0, None], "b": [[1.0], 2.0]}, metrics={"m": [1.0]}, extras={"x": ["p", "q"]}, skipped={"a": 1}
    )
    second = RawRewards(values={"b": [0.0], "a": [3.0]}, metrics={"m": [3.0], "n": [5.0]}, skipped={"a": 1})
    joined = RawRewards.concat([first, second])
    assert len(joined) == 3
    assert joined.values == {"a": [1.0, None, 3.0], "b": [[1.0], 2.0, 0.0]}
    assert joined.metrics == {"m": [1.0, 3.0], "n": [5.0]}
    assert joined.extras == {"x": ["p", "q", None]}
    assert joined.skipped == {"a": 2}
    with pytest.raises(ValueError, match=r"different terms"):
        RawRewards.concat([first, RawRewards(values={"c": [1.0]})])
    with pytest.raises(ValueError, match=r"no parts"):
        RawRewards.concat([])
