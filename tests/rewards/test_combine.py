"""Weighted sums, clipping, scaling and the running moments."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

import pytest
import torch

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RawRewards, RewardConfig, RewardHarness
from tropism.types import RewardBatch


def zero(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def harness(weights: dict[str, float] | None = None, **settings: Any) -> RewardHarness:
    terms = {name: {"use": zero, "weight": weight} for name, weight in (weights or {"a": 1.0}).items()}
    return RewardHarness(RewardConfig.of({"terms": terms, **settings}))


def combine(of: RewardHarness, *, width: int = 3, lengths: list[int] | None = None, **values: Any) -> RewardBatch:
    options = {key: values.pop(key) for key in ("update_moments", "unscaled") if key in values}
    rows = len(next(iter(values.values())))
    return of.combine(RawRewards(values=values), torch.tensor(lengths or [width] * rows), width, **options)


def test_weighted_sum_leaves_none_out() -> None:
    batch = combine(harness({"a": 1.0, "b": -0.5}), a=[1.0, None, None, 2.0], b=[2.0, 4.0, None, None])
    assert batch.per_completion.tolist() == [0.0, -2.0, 0.0, 2.0]
    assert batch.scored.tolist() == [True, True, False, True]
    assert batch.per_token is None
    assert batch.per_completion.dtype == torch.float32
    torch.testing.assert_close(
        batch.terms["a"], torch.tensor([1.0, math.nan, math.nan, 2.0]), equal_nan=True, rtol=0, atol=0
    )
    assert batch.metrics == {
        "reward/mean": 0.0,  # of 0, -2 and 2
        "reward/std": pytest.approx(math.sqrt(8 / 3)),
        "reward/unscored": 0.25,
        "reward/a": 1.5,
        "reward/b": 3.0,
    }


def test_a_term_of_weight_zero_is_only_logged() -> None:
    batch = combine(harness({"a": 1.0, "watch": 0.0}), a=[None, 1.0], watch=[5.0, 7.0])
    assert batch.per_completion.tolist() == [0.0, 1.0]
    assert batch.scored.tolist() == [False, True]
    assert batch.metrics["reward/watch"] == 6.0


def test_rewards_per_token_and_per_completion_stay_apart() -> None:
    batch = combine(
        harness({"a": 2.0, "b": 1.0}), lengths=[3, 1, 0], a=[[1.0, 0.0, -2.0], [0.5], []], b=[10.0, None, 3.0]
    )
    assert batch.per_token is not None
    assert batch.per_token.tolist() == [[2.0, 0.0, -4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch.per_completion.tolist() == [10.0, 0.0, 3.0]
    assert batch.totals.tolist() == [8.0, 1.0, 3.0]
    assert batch.terms["a"].tolist() == [-1.0, 0.5, 0.0]
    assert batch.metrics["reward/mean"] == 4.0
    tokens = batch.by_token(torch.tensor([3, 1, 0]), 3)
    assert tokens.tolist() == [[2.0, 0.0, 6.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_term_may_mix_rows_of_both_kinds() -> None:
    batch = combine(harness(), lengths=[2, 2, 2], a=[[1.0, 2.0], 5.0, None])
    assert batch.totals.tolist() == [3.0, 5.0, 0.0]
    assert batch.scored.tolist() == [True, True, False]


def test_clip_comes_before_scaling_and_is_of_the_sum() -> None:
    of = harness({"a": 1.0, "b": 1.0}, clip=4.0, scale="running")
    batch = combine(of, a=[6.0, 6.0], b=[-2.0, -9.0])  # sums 4 and -3
    assert batch.per_completion.tolist() == pytest.approx([4 / 3.5, -3 / 3.5])
    batch = combine(harness(clip=2.0), a=[5.0, -5.0, 1.0])
    assert batch.per_completion.tolist() == [2.0, -2.0, 1.0]
    assert batch.metrics["reward/mean"] == pytest.approx(1 / 3)  # metrics are of the plain sum


def test_clip_of_token_rewards_is_per_token() -> None:
    batch = combine(harness(clip=2.0), lengths=[3], a=[[5.0, -1.0, -9.0]])
    assert batch.per_token is not None and batch.per_token.tolist() == [[2.0, -1.0, -2.0]]


def slow_std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


@pytest.mark.parametrize("normalise", [False, True])
def test_running_scale_against_a_slow_loop(normalise: bool) -> None:
    stream = random.Random(0)
    of = harness(normalise=True) if normalise else harness(scale="running")
    seen: list[float] = []
    for size in (3, 1, 8, 5, 2):
        rewards: list[Any] = [stream.gauss(100.0, 3.0) for _ in range(size)]
        rows = [*rewards, None]
        seen += rewards
        batch = combine(of, a=rows)
        shift = statistics.fmean(seen) if normalise else 0.0
        expected = [(reward - shift) / slow_std(seen) for reward in rewards]
        torch.testing.assert_close(batch.per_completion, torch.tensor([*expected, 0.0]), rtol=1e-6, atol=1e-6)
        assert batch.metrics["reward/scale"] == pytest.approx(slow_std(seen))
    assert of.state_dict()["count"] == len(seen)


def test_reference_scale_is_that_of_the_first_batch() -> None:
    of = harness(scale="reference")
    assert combine(of, a=[1.0, 5.0]).per_completion.tolist() == [0.5, 2.5]
    assert combine(of, a=[100.0, -100.0]).per_completion.tolist() == [50.0, -50.0]


def test_reference_waits_for_a_batch_whose_rewards_differ() -> None:
    of = harness(scale="reference")
    assert combine(of, a=[3.0, 3.0]).per_completion.tolist() == [3.0, 3.0]
    assert combine(of, a=[4.0]).per_completion.tolist() == [4.0]
    assert combine(of, a=[1.0, 5.0]).per_completion.tolist() == [0.5, 2.5]


@pytest.mark.parametrize("rewards", [[0.1] * 7, [1 / 3], [1e30] * 3, [None, None]])
@pytest.mark.parametrize("settings", [{"scale": "running"}, {"scale": "reference"}])
def test_equal_or_single_rewards_are_not_divided(rewards: list[float | None], settings: dict[str, Any]) -> None:
    batch = combine(harness(**settings), a=rewards)
    assert batch.per_completion.tolist() == torch.tensor([value or 0.0 for value in rewards]).tolist()


def test_normalising_equal_rewards_gives_zero() -> None:
    assert combine(harness(normalise=True), a=[0.1] * 7).per_completion.tolist() == pytest.approx([0.0] * 7, abs=1e-12)
    assert combine(harness(normalise=True), a=[5.0]).per_completion.tolist() == [0.0]


def test_normalising_subtracts_the_mean_once_per_completion() -> None:
    batch = combine(harness(normalise=True), lengths=[3, 2], a=[[1.0, 1.0, 2.0], [3.0, -1.0]])  # totals 4 and 2
    assert batch.totals.tolist() == pytest.approx([1.0, -1.0])
    assert batch.per_token is not None and batch.per_token.tolist() == [[1.0, 1.0, 2.0], [3.0, -1.0, 0.0]]
    assert batch.per_completion.tolist() == [-3.0, -3.0]


def test_evaluation_neither_moves_nor_uses_the_moments() -> None:
    of = harness(scale="running", clip=1.5)
    combine(of, a=[1.0, -1.0, 7.0])
    before = of.state_dict()
    batch = combine(of, a=[100.0, 50.0], update_moments=False, unscaled=True)
    assert batch.per_completion.tolist() == [100.0, 50.0]
    assert of.state_dict() == before


def test_moments_can_be_used_without_moving_them() -> None:
    of = harness(scale="running")
    combine(of, a=[0.0, 4.0])
    assert combine(of, a=[6.0, 2.0, 9.0], update_moments=False).per_completion.tolist() == [3.0, 1.0, 4.5]
    assert combine(of, a=[0.0, 4.0]).per_completion.tolist() == [0.0, 2.0]


def test_state_round_trip_through_json_continues_bit_for_bit() -> None:
    stream = random.Random(1)
    batches = [[stream.gauss(0.0, 1.0) for _ in range(4)] for _ in range(4)]
    choices: list[dict[str, Any]] = [{"scale": "running"}, {"scale": "reference"}, {"normalise": True}]
    for settings in choices:
        whole, first = harness(**settings), harness(**settings)
        uninterrupted = [combine(whole, a=batch).per_completion for batch in batches]
        for batch in batches[:2]:
            combine(first, a=batch)
        resumed = harness(**settings)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for batch, expected in zip(batches[2:], uninterrupted[2:], strict=True):
            assert torch.equal(combine(resumed, a=batch).per_completion, expected)
        assert resumed.state_dict() == whole.state_dict()


def test_unknown_state_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward state"):
        harness().load_state_dict({"count": 3})


def test_gathered_parts_give_what_one_process_gives() -> None:
    rows: list[Any] = [1.0, None, 3.0, [1.0, 2.0, 3.0], 5.0]
    parts = [RawRewards(values={"a": rows[:2]}), RawRewards(values={"a": rows[2:]})]
    one, two = harness(scale="running"), harness(scale="running")
    expected = combine(one, a=rows)
    batch = two.combine(RawRewards.concat(parts), torch.tensor([3] * 5), 3)
    assert torch.equal(batch.totals, expected.totals)
    assert two.state_dict() == one.state_dict()


def test_huge_rewards_stay_finite_and_too_huge_ones_are_refused() -> None:
    batch = combine(harness(scale="running"), a=[1e30, -1e30, 1.0])
    assert batch.per_completion.isfinite().all()
    with pytest.raises(RewardError, match=r"row 1 is 3e[+]39: lower the weights"):
        combine(harness({"a": 1e9}), a=[1.0, 3e30])


def test_rows_must_match_the_lengths() -> None:
    with pytest.raises(RewardError, match=r"2 rewards do not match lengths of shape"):
        combine(harness(), lengths=[3], a=[1.0, 2.0])
    with pytest.raises(RewardError, match=r"row 1: 2 per-token rewards for 3 tokens"):
        combine(harness(), lengths=[3, 3], a=[1.0, [1.0, 2.0]])
    with pytest.raises(RewardError, match=r"width 3 is less than the longest completion, 4"):
        combine(harness(), lengths=[3, 4], a=[1.0, 2.0])
