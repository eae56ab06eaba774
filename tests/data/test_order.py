from __future__ import annotations

import datetime
import json
import math
from types import MappingProxyType
from typing import Any

import pytest

from tropism.data.order import PromptStream, epoch_order, fingerprint
from tropism.errors import ConfigError, DataError
from tropism.types import Prompt


def test_order_is_the_same_for_ever() -> None:
    # Written down once; a change would alter the samples of every run that is resumed after it.
    assert epoch_order(8, seed=0, epoch=0) == [2, 5, 6, 0, 4, 3, 7, 1]
    assert epoch_order(8, seed=0, epoch=1) == [7, 2, 5, 6, 4, 1, 3, 0]


def test_order_is_a_permutation_that_differs_by_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 9
    assert epoch_order(0, seed=0, epoch=0) == []
    with pytest.raises(ValueError, match="at least 0"):
        epoch_order(-1, seed=0, epoch=0)


def test_every_place_is_equally_likely() -> None:
    firsts = [epoch_order(4, seed=seed, epoch=0)[0] for seed in range(2000)]
    # Standard deviation of each count is sqrt(2000 * 3/16) = 19.4; allow four of them.
    assert all(abs(firsts.count(index) - 500) < 78 for index in range(4))


def test_stream_goes_through_every_epoch_once() -> None:
    stream = PromptStream("abcde", seed=1)
    taken = [pair for n in (2, 0, 7, 1) for pair in stream.take(n)]
    expected = epoch_order(5, seed=1, epoch=0) + epoch_order(5, seed=1, epoch=1)
    assert [index for index, _ in taken] == expected
    assert [item for _, item in taken] == ["abcde"[index] for index in expected]
    assert PromptStream("ab", seed=1, shuffle=False).take(5) == [(0, "a"), (1, "b"), (0, "a"), (1, "b"), (0, "a")]


def test_stream_resumes_anywhere() -> None:
    whole = PromptStream("abcde", seed=1).take(30)
    for position in range(13):
        stream = PromptStream("abcde", seed=1)
        stream.take(position)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PromptStream("abcde", seed=1)
        resumed.load_state_dict(state)
        assert resumed.take(10) == whole[position : position + 10]


def test_refusals() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], seed=0)
    stream = PromptStream("ab", seed=0)
    with pytest.raises(ValueError, match="at least 0"):
        stream.take(-1)
    for position in (-1, None, "3", True, 1.5):
        with pytest.raises(ConfigError, match="saved position"):
            stream.load_state_dict({**stream.state_dict(), "position": position})


def prompt(text: str = "a", ids: tuple[int, ...] = (1, 2), **columns: object) -> Prompt:
    return Prompt(text=text, ids=ids, columns=columns)


OTHERS = {
    "text": [prompt("b"), prompt("b")],
    "ids": [prompt("a", (1, 3)), prompt("b")],
    "column": [prompt(label=1), prompt("b")],
    "order": [prompt("b"), prompt("a")],
    "more": [prompt("a"), prompt("b"), prompt("c")],
    "fewer": [prompt("a")],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_position_in_other_items_is_refused(kind: str) -> None:
    saved = PromptStream([prompt("a"), prompt("b")], seed=0)
    saved.take(3)
    state = json.loads(json.dumps(saved.state_dict()))
    PromptStream([prompt("a"), prompt("b")], seed=0).load_state_dict(state)
    other = PromptStream(OTHERS[kind], seed=0)
    with pytest.raises(DataError, match="not that of the run, which has gone through 3 of 2 items"):
        other.load_state_dict(state)
    assert other.position == 0
    with pytest.raises(DataError, match="not that of the run"):
        saved.load_state_dict({"position": 1})


def test_the_fingerprint_of_odd_columns_is_the_same_in_every_process() -> None:
    class Odd:
        pass

    def items() -> list[Prompt]:
        odd: dict[str, Any] = {
            "lone": "\ud800",
            "when": datetime.date(2024, 1, 2),
            "what": Odd(),
            "nan": math.nan,
            "bytes": b"\xff",
        }
        return [prompt(**odd, nested={(1, 2): 3, "mapping": MappingProxyType({"a": 1})})]

    assert fingerprint(items()) == fingerprint(items())
    assert fingerprint(items()) != fingerprint([prompt(lone="\ud801")])
    assert fingerprint(["ab"]) != fingerprint(["a", "b"])
