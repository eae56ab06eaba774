"""From targets in the reward's units to the ids before a prompt."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tropism.errors import ConfigError
from tropism.ops.slots import read_slots, slot_id
from tropism.targets.conditioner import Conditioner, SeenRewards
from tropism.targets.config import Conditioning
from tropism.types import Prompt

REWARDS = [(0.0, 10.0), (0.25, 20.0), (0.5, 30.0), (1.0, 60.0)]
"""Of sentiment and length."""


def two(**config: Any) -> Conditioner:
    fields = {"scaler": "min_max", "targets": ("sentiment", "length"), **config}
    conditioner = Conditioner(Conditioning(**fields), encode=lambda text: [ord(c) for c in text], bos_id=1)
    conditioner.fit(REWARDS)
    conditioner.knows_open = True
    return conditioner


def one(rewards: Sequence[float] = (0.0, 1.0), **config: Any) -> Conditioner:
    conditioner = Conditioner(Conditioning(**config), encode=lambda text: [ord(c) for c in text], bos_id=1)
    conditioner.fit([(reward,) for reward in rewards])
    conditioner.knows_open = True
    return conditioner


def read(ids: Sequence[int]) -> list[tuple[int, float | None]]:
    numbers, values, absent = read_slots(torch.tensor(list(ids)))
    return [
        (number, None if gone else value)
        for number, value, gone in zip(numbers.tolist(), values.tolist(), absent.tolist(), strict=True)
    ]


# ---- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "held"),
    [
        ({"sentiment": 0.5, "length": 35}, (0.5, 0.5)),
        ({"length": 35, "sentiment": 0.5}, (0.5, 0.5)),
        ({"length": 60.0}, (None, 1.0)),
        ({"sentiment": 0}, (0.0, None)),
        ({"sentiment": None, "length": 10}, (None, 0.0)),
        ({}, (None, None)),
        (None, (None, None)),
    ],
    ids=str,
)
def test_any_subset_in_any_order_has_slots_in_the_order_of_the_names(targets: Any, held: Any) -> None:
    assert read(two().prefix(targets)) == list(enumerate(held))


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_numbers_of_any_kind(value: Any) -> None:
    assert read(one(scaler="none").prefix(value)) == [(0, float(value))]


def test_a_plain_number_needs_a_model_with_one_reward() -> None:
    assert one(scaler="none").prefix(0.5) == (slot_id(0, 0.5),)
    assert one(scaler="none").prefix({"reward": 0.5}) == (slot_id(0, 0.5),)
    with pytest.raises(ConfigError, match=r"knows 2 rewards; say which one 0.5 is of: \{'sentiment': 0.5\}.*length"):
        two().prefix(0.5)


@pytest.mark.parametrize(
    "value",
    ["0.9", "high", True, math.nan, math.inf, -math.inf, 1e39, 10**400, [0.5], (0.5,), 1j, Decimal("NaN")],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    for conditioner, targets in ((one(), value), (two(), {"sentiment": value})):
        if conditioner.names == ("reward",) and isinstance(value, list):
            continue
        with pytest.raises(ConfigError, match=r"the target of '(reward|sentiment)' is .*finite number"):
            conditioner.condition([Prompt(text="", ids=(5,))], [targets])


def test_an_unknown_name_is_refused_and_the_closest_named() -> None:
    with pytest.raises(ConfigError, match=r"knows no reward 'sentimant'; did you mean 'sentiment'\? It was trained on"):
        two().prefix({"sentimant": 1.0})
    with pytest.raises(ConfigError, match=r"knows no reward 'x'\. It was trained on: sentiment, length$"):
        two().prefix({"x": 1.0})
    with pytest.raises(ConfigError, match="knows no reward 3"):
        two().prefix({3: 1.0})  # type: ignore[dict-item]


def test_one_target_per_prompt_or_one_for_all() -> None:
    conditioner = one(scaler="none", rewards=(0.0, 9.0))
    prompts = [Prompt(text="a", ids=(1, 7)), Prompt(text="b", ids=(8,), columns={"k": 3})]
    each = conditioner.condition(prompts, [1.0, {"reward": 2.0}])
    assert [prompt.ids for prompt in each] == [(slot_id(0, 1.0), 1, 7), (slot_id(0, 2.0), 8)]
    assert [(prompt.text, prompt.columns) for prompt in each] == [("a", {}), ("b", {"k": 3})]
    assert [prompt.ids[0] for prompt in conditioner.condition(prompts, 3)] == [slot_id(0, 3.0)] * 2
    assert [p.ids[0] for p in conditioner.condition(prompts, [None, 4])] == [slot_id(0, None), slot_id(0, 4.0)]
    assert [prompt.ids for prompt in prompts] == [(1, 7), (8,)]
    for wrong in ([1.0], [1.0, 2.0, 3.0], []):
        with pytest.raises(ConfigError, match=f"{len(wrong)} targets for 2 prompts"):
            conditioner.condition(prompts, wrong)


def test_a_default_is_asked_for_where_nothing_is_said() -> None:
    conditioner = two()
    conditioner.default = {"length": 10}
    assert read(conditioner.prefix(None)) == [(0, None), (1, 0.0)]
    assert read(conditioner.prefix({})) == [(0, None), (1, None)]


def test_nothing_stands_before_prompts_until_rewards_were_seen() -> None:
    conditioner = Conditioner(Conditioning())
    assert not conditioner.fitted and conditioner.prefix(0.5) == ()
    with pytest.raises(ConfigError, match="knows no reward"):
        conditioner.prefix({"other": 0.5})


# ---- outside of the training rewards ---------------------------------------------------------------------------------


def test_a_target_outside_warns_once_per_side_and_states_the_range(caplog: pytest.LogCaptureFixture) -> None:
    conditioner = two()
    with caplog.at_level(logging.WARNING, logger="tropism"):
        for value in (10.0, 60.0, 35.0):
            conditioner.prefix({"length": value})
        assert not caplog.messages
        for value in (61.0, 1000.0, 60.5):
            conditioner.prefix({"length": value})
        assert len(caplog.messages) == 1
        assert "61 of 'length'" in caplog.messages[0] and "10 to 60" in caplog.messages[0]
        for value in (9.0, -5.0):
            conditioner.prefix({"length": value})
        assert len(caplog.messages) == 2 and "9 of 'length'" in caplog.messages[1]
        conditioner.prefix({"sentiment": 2.0}, warn=False)
        assert len(caplog.messages) == 2
        conditioner.prefix({"sentiment": 2.0})
        assert len(caplog.messages) == 3


def test_a_target_outside_is_still_told_on_the_same_scale() -> None:
    assert read(two().prefix({"length": 110}))[1] == (1, 2.0)


# ---- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["linear", "add", "replace", "token", "text"])
@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "no rewards to learn the scale of 'a'"),
        ([(0.0, 1.0), (1.0, math.nan)], "reward of 'b' is nan"),
        ([(0.0, 1.0), (math.inf, 0.0)], "reward of 'a' is inf"),
        ([(0.0, 2.0), (1.0, 2.0)], "all 2 training rewards of 'b' are 2"),
    ],
)
def test_rewards_that_nothing_can_be_learned_from(mechanism: Any, rewards: Any, message: str) -> None:
    conditioner = Conditioner(Conditioning(targets=("a", "b"), mechanism=mechanism))
    with pytest.raises(ConfigError, match=message):
        conditioner.fit(rewards)
    assert not conditioner.fitted


def test_further_rewards_widen_what_was_seen_and_leave_the_scale() -> None:
    conditioner = two()
    before = conditioner.prefix({"length": 35})
    conditioner.see([(0.5, 80.0), (0.6, 70.0)])
    assert [seen.range for seen in conditioner.seen] == [(0.0, 1.0), (10.0, 80.0)]
    assert conditioner.prefix({"length": 35}) == before
    with pytest.raises(ConfigError, match="is nan"):
        conditioner.see([(0.5, math.nan)])


def test_a_scaler_of_its_own_for_every_reward() -> None:
    conditioner = two(scaler="standard")
    sentiments, lengths = zip(*REWARDS, strict=True)
    for place, (column, name) in enumerate(((sentiments, "sentiment"), (lengths, "length"))):
        mean = sum(column) / 4
        deviation = math.sqrt(sum((x - mean) ** 2 for x in column) / 3)
        held = read(conditioner.prefix({name: column[3]}))[place][1]
        assert held == pytest.approx((column[3] - mean) / deviation, rel=1e-6)


# ---- control tokens --------------------------------------------------------------------------------------------------


def test_bins_are_equal_shares_and_borders_belong_to_the_lower_one() -> None:
    conditioner = one([float(n) for n in range(100)], mechanism="token", bins=4)
    held = [read(conditioner.prefix(float(n)))[0][1] or 0.0 for n in range(100)]
    assert [held.count(float(bin_)) for bin_ in range(4)] == [25, 25, 25, 25]
    assert held == sorted(held)
    border = conditioner.edges[0][1]
    assert read(conditioner.prefix(border)) == [(0, 1.0)]
    assert read(conditioner.prefix(math.nextafter(border, math.inf))) == [(0, 2.0)]
    assert read(conditioner.prefix(-1e6)) == [(0, 0.0)]
    assert read(conditioner.prefix(1e6)) == [(0, 3.0)]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.98])
def test_of_two_values_the_best_is_in_the_last_bin_and_the_other_in_the_first(share: float) -> None:
    good = round(share * 100)
    conditioner = one([0.0] * (100 - good) + [1.0] * good, mechanism="token", bins=10)
    assert read(conditioner.prefix(1.0)) == [(0, 9.0)]
    assert read(conditioner.prefix(0.0)) == [(0, 0.0)]


@given(
    rewards=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60).filter(lambda rows: min(rows) < max(rows)),
    bins=st.integers(2, 12),
)
def test_bins_never_fall_with_the_reward(rewards: list[float], bins: int) -> None:
    conditioner = one(rewards, mechanism="token", bins=bins)
    held = [read(conditioner.prefix(reward))[0][1] for reward in sorted(rewards)]
    assert held == sorted(held, key=float)  # type: ignore[arg-type]
    assert held[-1] == bins - 1


# ---- text ------------------------------------------------------------------------------------------------------------


def written(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_text_is_written_after_the_bos() -> None:
    conditioner = two(mechanism="text")
    prefix = conditioner.prefix({"length": 20, "sentiment": 0.9})
    assert written(prefix) == "sentiment: 0.90\nlength: 20.0\n"
    assert conditioner.apply((1, 70, 71), prefix) == (1, *prefix, 70, 71)
    assert conditioner.apply((70, 1), prefix) == (*prefix, 70, 1)
    assert conditioner.apply((), prefix) == prefix
    assert written(conditioner.prefix({"length": -3})) == "length: -3.0\n"
    assert conditioner.prefix({}) == ()
    assert conditioner.apply((1, 70), ()) == (1, 70)


def test_slots_stand_before_the_bos() -> None:
    assert one(scaler="none").apply((1, 70), (slot_id(0, 1.0),)) == (slot_id(0, 1.0), 1, 70)


def test_widths() -> None:
    assert one().width == 1 and two().width == 2
    text = two(mechanism="text")
    assert text.width == len("sentiment: -9.99\nlength: -599.4\n")
    assert text.width >= len(text.prefix({"sentiment": -9.98, "length": 599}, warn=False))
    unfitted = Conditioner(text.config, encode=text.encode)
    assert unfitted.width == len("sentiment: -88888.88888\nlength: -88888.88888\n")


@pytest.mark.parametrize(
    ("rewards", "value", "expected"),
    [
        ((-0.85, 0.97), 0.9, "reward: 0.90\n"),
        ((0.001, 0.004), 0.0025, "reward: 0.00250\n"),  # a hundredth of the range is 0.00003
        ((0.0, 3000.0), 1234.5, "reward: 1234\n"),
        ((5.0, 6.0), 5.5, "reward: 5.50\n"),
    ],
)
def test_text_has_as_many_digits_as_the_rewards_need(rewards: Any, value: float, expected: str) -> None:
    assert written(one(rewards, mechanism="text").prefix(value)) == expected


def test_a_reward_left_open_warns_where_it_never_was(caplog: pytest.LogCaptureFixture) -> None:
    conditioner = two()
    conditioner.knows_open = False
    with caplog.at_level(logging.WARNING, logger="tropism"):
        for targets in ({"length": 20}, None, {"length": 30}):
            conditioner.prefix(targets)
    assert [message.partition(" is left open")[0] for message in caplog.messages] == [
        "the reward 'sentiment'",
        "the reward 'length'",
    ]


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["linear", "add", "replace", "token", "text"])
@pytest.mark.parametrize("scaler", ["standard", "min_max", "quantile", "none"])
def test_all_of_it_survives_json(mechanism: Any, scaler: Any, caplog: pytest.LogCaptureFixture) -> None:
    conditioner = two(mechanism=mechanism, scaler=scaler, bins=3)
    conditioner.default = {"sentiment": 0.75}
    saved = json.loads(json.dumps(conditioner.to_dict(), allow_nan=False))
    assert saved["mechanism"] == mechanism and saved["targets"] == ["sentiment", "length"]
    other = Conditioner(conditioner.config, encode=conditioner.encode, bos_id=1)
    other.load_dict(saved)
    for targets in (None, {}, {"sentiment": 0.1}, {"sentiment": 1 / 3, "length": 59}):
        assert other.prefix(targets) == conditioner.prefix(targets)
    assert other.seen == conditioner.seen and other.to_dict() == conditioner.to_dict()
    with caplog.at_level(logging.WARNING, logger="tropism"):
        other.prefix({"length": 61})
    assert len(caplog.messages) == 1 and "10 to 60" in caplog.messages[0]


# ---- what was seen ---------------------------------------------------------------------------------------------------


@given(rewards=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_quantiles_are_those_of_numpy(rewards: list[float]) -> None:
    seen = SeenRewards.of(rewards)
    np.testing.assert_allclose(seen.quantiles, np.quantile(rewards, np.arange(101) / 100), rtol=1e-9, atol=1e-6)
    assert seen.range == (min(rewards), max(rewards))
    assert list(seen.quantiles) == sorted(seen.quantiles)
    for share in (0.0, 0.255, 0.5, 0.955, 1.0):
        expected = np.interp(share, np.arange(101) / 100, seen.quantiles)
        assert seen.quantile(share) == pytest.approx(expected, rel=1e-9, abs=1e-6)
