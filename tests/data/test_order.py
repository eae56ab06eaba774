from __future__ import annotations

import json

import pytest

from tropism.data.order import PromptStream, epoch_order
from tropism.errors import ConfigError, DataError


def test_order_is_the_same_for_ever():
    # Written down once; a change would alter the samples of every run that is resumed after it.
    assert epoch_order(8, seed=0, epoch=0) == [2, 5, 6, 0, 4, 3, 7, 1]
    assert epoch_order(8, seed=0, epoch=1) == [7, 2, 5, 6, 4, 1, 3, 0]


def test_order_is_a_permutation_that_differs_by_seed_and_epoch():
    orders = [epoch_order(50, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 9
    assert epoch_order(0, seed=0, epoch=0) == []
    with pytest.raises(ValueError, match="at least 0"):
        epoch_order(-1, seed=0, epoch=0)


def test_every_place_is_equally_likely():
    firsts = [epoch_order(4, seed=seed, epoch=0)[0] for seed in range(2000)]
    # Standard deviation of each count is sqrt(2000 * 3/16) = 19.4; allow four of them.
    assert all(abs(firsts.count(index) - 500) < 78 for index in range(4))


def test_stream_goes_through_every_epoch_once():
    stream = PromptStream("abcde", seed=1)
    taken = [pair for n in (2, 0, 7, 1) for pair in stream.take(n)]
    expected = epoch_order(5, seed=1, epoch=0) + epoch_order(5, seed=1, epoch=1)
    assert [index for index, _ in taken] == expected
    assert [item for _, item in taken] == ["abcde"[index] for index in expected]
    assert PromptStream("ab", seed=1, shuffle=False).take(5) == [(0, "a"), (1, "b"), (0, "a"), (1, "b"), (0, "a")]


def test_stream_resumes_anywhere():
    whole = PromptStream("abcde", seed=1).take(30)
    for position in range(13):
        stream = PromptStream("abcde", seed=1)
        stream.take(position)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PromptStream("abcde", seed=1)
        resumed.load_state_dict(state)
        assert resumed.take(10) == whole[position : position + 10]


def test_refusals():
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], seed=0)
    stream = PromptStream("ab", seed=0)
    with pytest.raises(ValueError, match="at least 0"):
        stream.take(-1)
    for position in (-1, None, "3", True, 1.5):
        with pytest.raises(ConfigError, match="saved position"):
            stream.load_state_dict({"position": position})
