"""Scalers: hand-made numbers, slow counts, refusals, and that all comes back from scales and files."""

from __future__ import annotations

import json
import math
import random
import statistics
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from full_disk import file_size_limit
from fuzz_budget import examples
from tropism.errors import ConfigError, StorageError
from tropism.targets.config import ScalerName
from tropism.targets.scalers import (
    MOST_KNOTS,
    SCALERS,
    MinMaxScaler,
    NoScaler,
    QuantileScaler,
    Scaler,
    StandardScaler,
    StandardTimes1000Scaler,
    Times1000Scaler,
    scaler_from_dict,
    scaler_named,
)

KINDS = list(SCALERS.values())
FITTED = [kind for kind in KINDS if kind.needs_spread]
"""Scalers whose numbers come from the training rewards."""


def share(reward: float, rewards: list[float]) -> float:
    """The rewards below, and half of the equal ones, counted one by one, as a share."""
    return sum(1.0 if other < reward else 0.5 if other == reward else 0.0 for other in rewards) / len(rewards)


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rewards", "asked", "told"),
    [
        ("standard", [1, 2, 3], [1, 2, 3, 5.5], [-1, 0, 1, 3.5]),  # sample deviation: 1, not 0.816
        ("standard_times_1000", [1, 2, 3], [1, 2, 3, 5.5], [-1000, 0, 1000, 3500]),
        ("min_max", [10, 2, 4], [2, 4, 10, 0, 18], [0, 0.25, 1, -0.25, 2]),
        ("times_1000", [0.5], [0.5, -2], [500, -2000]),
        ("none", [0.5], [0.5, -2], [0.5, -2]),
        # Half of the rewards are 1: the middle of their probability is 0.25. Beyond, 0.625 per 2 units.
        ("quantile", [3, 1, 2, 1], [1, 2, 3, 1.5, 4, 0], [0.25, 0.625, 0.875, 0.4375, 1.1875, -0.0625]),
    ],
)
def test_scales_by_hand(name: str, rewards: list[float], asked: list[float], told: list[float]) -> None:
    scaler = scaler_named(name).from_rewards(rewards)
    assert scaler.name == name
    assert scaler.scale_rewards(asked) == told == [scaler.scale_reward(reward) for reward in asked]
    assert [scaler.inverse(number) for number in told] == asked


def test_names_are_those_of_the_configuration() -> None:
    assert set(SCALERS) == set(get_args(ScalerName))
    for name, kind in SCALERS.items():
        assert scaler_named(name) is kind and kind.name == name
    with pytest.raises(ConfigError, match=r"no scaler 'min-max'\. Did you mean min_max\? Known: standard, min_max"):
        scaler_named("min-max")


def test_standard_takes_the_sample_deviation_of_any_rewards() -> None:
    rng = random.Random(0)
    for size, shift in [(2, 0.0), (50, 1e9), (50, -1e300)]:
        rewards = [shift + rng.gauss(0, max(1.0, abs(shift) / 3)) for _ in range(size)]
        scaler = StandardScaler.from_rewards(rewards)
        scale = max(map(abs, rewards))
        parts = [reward / scale for reward in rewards]  # statistics squares, which overflows for the largest
        assert scaler.mean == pytest.approx(scale * statistics.mean(parts), rel=1e-12)
        assert scaler.std == pytest.approx(scale * statistics.stdev(parts), rel=1e-12)


@pytest.mark.parametrize("kind", FITTED)
def test_a_spread_far_smaller_than_the_rewards_is_not_lost(kind: type[Scaler]) -> None:
    rewards = [1e9 + place * 2**-20 for place in range(5)]
    plain = kind.from_rewards([0, 1, 2, 3, 4])
    assert kind.from_rewards(rewards).scale_rewards(rewards) == pytest.approx(plain.scale_rewards([0, 1, 2, 3, 4]))


@pytest.mark.parametrize("kind", FITTED)
def test_huge_rewards_do_not_overflow(kind: type[Scaler]) -> None:
    small = [-3.0, 0.5, 1.0, 8.0]
    huge = [reward * 1e307 for reward in small]
    scaler, plain = kind.from_rewards(huge), kind.from_rewards(small)
    assert scaler.scale_rewards(huge) == pytest.approx(plain.scale_rewards(small))
    assert [scaler.inverse(told) for told in scaler.scale_rewards(huge)] == pytest.approx(huge, rel=1e-12)


def test_the_order_of_the_rewards_changes_nothing() -> None:
    rng = random.Random(1)
    rewards = [rng.choice([rng.random(), 0.25]) for _ in range(600)]
    for kind in KINDS:
        assert kind.from_rewards(rng.sample(rewards, len(rewards))) == kind.from_rewards(rewards)


# Quantiles -----------------------------------------------------------------------------------------------------------


def test_every_value_has_the_middle_of_its_probability() -> None:
    rng = random.Random(2)
    rewards = [float(rng.choice([0, 0, 0, rng.randint(-100, 100)])) for _ in range(400)]
    scaler = QuantileScaler.from_rewards(rewards)
    assert len(scaler.knots) == len(set(rewards)) < MOST_KNOTS
    for reward in set(rewards):
        assert scaler.scale_reward(reward) == pytest.approx(share(reward, rewards), abs=1e-15)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.gauss(0, 1),
        lambda rng: rng.choice([0.5, rng.random()]),  # a jump, and at once a slope again
        lambda rng: 10 ** rng.uniform(-30, 30),
        lambda rng: round(rng.gauss(0, 1), 2),
    ],
    ids=["normal", "half are equal", "over 60 decades", "light ties"],
)
def test_many_values_are_close_to_their_shares(draw: Callable[[random.Random], float]) -> None:
    rng = random.Random(3)
    rewards = [draw(rng) for _ in range(1500)]
    scaler = QuantileScaler.from_rewards(rewards)
    ordered = sorted(set(rewards))
    assert len(ordered) > MOST_KNOTS >= len(scaler.knots) > 100
    told = scaler.scale_rewards(ordered)
    assert all(low < high for low, high in pairwise(told))
    shares = [share(reward, rewards) for reward in ordered]
    assert max(abs(a - b) for a, b in zip(told, shares, strict=True)) < 1 / 126
    for reward, expected in zip(ordered, shares, strict=True):
        if rewards.count(reward) / len(rewards) > 1 / 126:
            assert scaler.scale_reward(reward) == pytest.approx(expected, abs=1e-15)


def test_one_reward_far_out_leaves_the_others_apart() -> None:
    rewards = [-1e300, *map(float, range(1000)), 1e300]
    told = QuantileScaler.from_rewards(rewards).scale_rewards(rewards)
    assert told == pytest.approx([(place + 0.5) / 1002 for place in range(1002)], abs=1 / 126)
    as_float32 = [float(np.float32(number)) for number in told]
    assert all(low < high for low, high in pairwise(as_float32))
    assert len(QuantileScaler.from_rewards(range(259)).knots) <= MOST_KNOTS


def test_rounding_does_not_pass_a_knot() -> None:
    scaler = QuantileScaler(knots=((-1e20, 1 / 18), (1.0, 7 / 18), (2.0, 0.9)))
    assert 1 / 18 + (7 / 18 - 1 / 18) > 7 / 18
    assert scaler.scale_reward(math.nextafter(1.0, 0.0)) <= scaler.scale_reward(1.0) == 7 / 18


# Round trips ---------------------------------------------------------------------------------------------------------

NUMBERS = (st.floats(-1e300, 1e300), st.floats(-10, 10), st.integers(-3, 3).map(float), st.floats(0.999, 1.001))
REWARDS = st.lists(st.one_of(*NUMBERS), min_size=2, max_size=30)


@examples(200)
@given(rewards=REWARDS, outside=st.floats(0.01, 100))
def test_every_fitted_scale_rises_and_comes_back(rewards: list[float], outside: float) -> None:
    low, high = min(rewards), max(rewards)
    spread = high - low
    assume(spread > 1e-290)  # below, floats themselves are coarse
    for kind in FITTED:
        scaler = kind.from_rewards(rewards)
        again = scaler_from_dict(json.loads(json.dumps(scaler.to_dict())))
        assert again == scaler and json.loads(scaler.to_json()) == scaler.to_dict()
        ordered = sorted(set(rewards))
        told = scaler.scale_rewards(ordered)
        assert again.scale_rewards(ordered) == told and all(map(math.isfinite, told))
        assert all(a <= b for a, b in pairwise(told)) and told[0] < told[-1]
        for reward, number in zip(ordered, told, strict=True):
            assert abs(scaler.inverse(number) - reward) <= 1e-9 * spread
        for target in (low - outside * spread, high + outside * spread):
            if low <= target <= high:
                continue  # too little further to be another float
            beyond = scaler.scale_reward(target)
            assert beyond < told[0] if target < low else beyond > told[-1]
            assert abs(scaler.inverse(beyond) - target) <= 1e-9 * (1 + outside) * spread


@examples(100)
@given(rewards=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=257, unique=True))
def test_quantiles_of_different_rewards_differ(rewards: list[float]) -> None:
    told = QuantileScaler.from_rewards(rewards).scale_rewards(sorted(set(rewards)))
    assert all(low < high for low, high in pairwise(told))
    assert told[0] > 0 and told[-1] < 1


@examples(100)
@given(reward=st.floats(-1e30, 1e30), kind=st.sampled_from([NoScaler, Times1000Scaler]))
def test_multiples_come_back(reward: float, kind: type[Scaler]) -> None:
    scaler = kind.from_rewards([reward])
    assert scaler.inverse(scaler.scale_reward(reward)) == pytest.approx(reward, rel=1e-15, abs=1e-320)


@examples(100)
@given(
    rewards=st.lists(st.floats(-1, 1), min_size=2, max_size=30, unique=True),
    asked=st.lists(st.floats(-3, 3), min_size=2, max_size=20),
)
def test_quantiles_never_fall_between_the_knots(rewards: list[float], asked: list[float]) -> None:
    assume(max(rewards) - min(rewards) > 1e-6)
    scaler = QuantileScaler.from_rewards(rewards)
    everything = sorted([*rewards, *asked])
    told = scaler.scale_rewards(everything)
    assert all(low <= high for low, high in pairwise(told))
    back = [scaler.inverse(number) for number in told]
    assert all(low <= high for low, high in pairwise(back))
    assert back == pytest.approx(everything, rel=1e-9, abs=1e-9 * (max(rewards) - min(rewards)))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (math.nan, "nan, which is not finite"),
        (math.inf, "inf, which is not finite"),
        (None, "None, which is no number"),
        ("0.5", "'0.5', which is no number"),
        (True, "True, which is no number"),
        (np.True_, "which is no number"),
        ([0.5], r"\[0.5\], which is no number"),
        (10**5000, "larger than a float can be"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bad_and_missing_rewards_are_named(kind: type[Scaler], bad: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\[2\] is .*{said}; score that text again, or leave it out"):
        kind.from_rewards([0.5, 1.0, bad, 2.0])
    with pytest.raises(ConfigError, match=r"there are no rewards .*scored"):
        kind.from_rewards([])
    with pytest.raises(ConfigError, match=r"from -1.7e.308 to 1.7e.308 lie too far apart"):
        kind.from_rewards([-1.7e308, 0.0, 1.7e308])
    scaler = kind.from_rewards([0.0, 1.0, 2.0])
    with pytest.raises(ConfigError, match=r"the reward is .*give a finite number"):
        scaler.scale_reward(bad)
    with pytest.raises(ConfigError, match=r"the scaled reward is .*give a finite number"):
        scaler.inverse(bad)


@pytest.mark.parametrize("kind", FITTED)
def test_pitfall_9_constant_rewards_are_refused_before_anything_is_divided(kind: type[Scaler]) -> None:
    with pytest.raises(ConfigError, match=f"{kind.name} needs rewards that differ, and all 3 rewards are 0.7, .*check"):
        kind.from_rewards([0.7, 0.7, 0.7])
    with pytest.raises(ConfigError, match=f"{kind.name} needs rewards that differ, and the only reward is -2.0, "):
        kind.from_rewards([-2])
    with pytest.raises(ConfigError, match=r"all 2 rewards are -?0\.0"):
        kind.from_rewards([0.0, -0.0])


def test_a_deviation_that_rounds_to_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"std is 0.0, and must be above 0; .*differ by more"):
        StandardScaler.from_rewards([0.0] * 9 + [5e-324])


def test_what_no_float32_holds_is_refused() -> None:
    largest = struct.unpack("<f", bytes.fromhex("ffff7f7f"))[0]
    assert NoScaler.from_rewards([largest]).scale_reward(-largest) == -largest
    for kind, reward in [(NoScaler, 3.5e38), (NoScaler, -1e300), (Times1000Scaler, 1e36), (Times1000Scaler, 1e308)]:
        with pytest.raises(ConfigError, match=r"told float32 numbers; ask for one nearer .* min_max or quantile"):
            kind.from_rewards([0.0, reward])
    for kind in FITTED:
        with pytest.raises(ConfigError, match=f"on the scale {kind.name}, and a model is told float32"):
            kind.from_rewards([0.0, 1e-10, 2e-10]).scale_reward(1e300)
        with pytest.raises(ConfigError, match=r"no finite reward is .*smaller"):
            kind.from_rewards([0.0, 1e307]).inverse(1e300)


def test_numbers_of_numpy_are_numbers() -> None:
    for rewards in (np.array([1.0, 2.0, 3.0], dtype=np.float32), np.array([1, 2, 3])):
        scaler = StandardScaler.from_rewards(rewards)  # type: ignore[arg-type]
        assert scaler == StandardScaler(mean=2.0, std=1.0)
        assert json.loads(scaler.to_json()) == {"name": "standard", "mean": 2.0, "std": 1.0}
    assert type(scaler.scale_reward(np.float32(3))) is float  # type: ignore[arg-type]


# Stored --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("standard", {"name": "standard", "mean": 2.0, "std": 1.0}),
        ("standard_times_1000", {"name": "standard_times_1000", "mean": 2.0, "std": 1.0}),
        ("min_max", {"name": "min_max", "reward_min": 1.0, "reward_max": 3.0}),
        ("times_1000", {"name": "times_1000"}),
        ("none", {"name": "none"}),
        ("quantile", {"name": "quantile", "knots": [[1.0, 1 / 6], [2.0, 0.5], [3.0, 5 / 6]]}),
    ],
)
def test_what_is_stored(name: str, stored: dict[str, Any], tmp_path: Path) -> None:
    scaler = scaler_named(name).from_rewards([1, 2, 3])
    assert scaler.to_dict() == stored
    folder = tmp_path / "not" / "there"
    scaler.save_scaler(folder)
    assert [path.name for path in folder.iterdir()] == ["scaler"]
    assert json.loads((folder / "scaler").read_text()) == stored
    assert Scaler.load_scaler(folder) == scaler == scaler_named(name).load_scaler(str(folder))
    assert type(Scaler.load_scaler(folder)) is scaler_named(name)


@pytest.mark.parametrize(
    ("names", "numbers", "expected"),
    [
        ("MinMaxScaler min_max", {"reward_min": 0, "reward_max": 4}, MinMaxScaler(reward_min=0.0, reward_max=4.0)),
        ("StandardScaleScaler standard_scale", {"mean": 2, "std": 0.5}, StandardScaler(mean=2.0, std=0.5)),
        ("StandardTimes1000Scaler", {"mean": 2, "std": 0.5}, StandardTimes1000Scaler(mean=2.0, std=0.5)),
        ("DoNothingScaler do_nothing", {}, NoScaler()),
        ("Times1000 times_1000", {}, Times1000Scaler()),
    ],
)
def test_scalers_of_conditionme_are_read(names: str, numbers: dict[str, Any], expected: Scaler, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / "scaler").write_text(json.dumps({"name": name, **numbers}))
        loaded = Scaler.load_scaler(tmp_path)
        assert loaded == expected and type(loaded) is type(expected)
        assert loaded.to_dict()["name"] in SCALERS


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("standard", "has one of the names standard, min_max, quantile, standard_times_1000, times_1000, none"),
        ({"name": ["standard"]}, "has one of the names"),
        ({"name": "standart", "mean": 0, "std": 1}, "no scaler 'standart'. Did you mean standard.* Known: standard, "),
        ({"name": "x" * 10_000}, "no scaler 'x{59}. Known: standard, min_max, "),
        ({"name": "standard", "mean": 0.0}, "standard has name, mean, std, and this one has name, mean; fit"),
        ({"name": "none", "mean": 0.0}, "none has name, and this one has name, mean; fit"),
        ({"name": "standard", "mean": 0.0, "std": 0.0}, "std is 0.0, and must be above 0; fit"),
        ({"name": "standard", "mean": None, "std": 1.0}, "mean is None, which is no number; fit"),
        ({"name": "standard", "mean": 0.0, "std": math.nan}, "std is nan"),
        ({"name": "min_max", "reward_min": 1.0, "reward_max": 1.0}, "reward_max must lie .* above reward_min; fit"),
        ({"name": "min_max", "reward_min": -1.7e308, "reward_max": 1.7e308}, "reward_max must lie a finite number"),
        ({"name": "min_max", "reward_min": False, "reward_max": True}, "reward_min is False"),
        ({"name": "quantile", "knots": [1, 2]}, "knots must be pairs"),
        ({"name": "quantile", "knots": [[1.0, 0.2, 0.3], [2.0, 0.5]]}, "knots must be pairs"),
        ({"name": "quantile", "knots": [[1.0, 0.25]]}, "knots must be 2 to 257, and increase"),
        ({"name": "quantile", "knots": [[float(k), k / 999] for k in range(1, 259)]}, "knots must be 2 to 257"),
        ({"name": "quantile", "knots": [[2.0, 0.25], [1.0, 0.75]]}, "increase"),
        ({"name": "quantile", "knots": [[1.0, 0.25], [1.0, 0.75]]}, "increase"),
        ({"name": "quantile", "knots": [[1.0, 0.25], [2.0, 0.25]]}, "increase"),
        ({"name": "quantile", "knots": [[1.0, 0.0], [2.0, 0.5]]}, "between 0 and 1; fit"),
        ({"name": "quantile", "knots": [[1.0, 0.5], [2.0, 1.0]]}, "between 0 and 1"),
        ({"name": "quantile", "knots": [[-1.7e308, 0.2], [1.7e308, 0.5]]}, "knots must"),
        ({"name": "quantile", "knots": [[1.0, 0.5], ["2", 0.7]]}, "a knot's reward is '2'"),
        ({"name": "quantile", "knots": [[1.0, 0.5], [2.0, None]]}, "a knot's share is None"),
    ],
)
def test_damaged_scalers_are_refused(stored: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        scaler_from_dict(stored)
    (tmp_path / "scaler").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/scaler holds no scaler that can be read: .*{said}"):
        Scaler.load_scaler(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"name": "none"} x'])
def test_files_that_are_no_json_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scaler").write_bytes(content)
    with pytest.raises(ConfigError, match="scaler holds no scaler that can be read"):
        Scaler.load_scaler(tmp_path)


def test_a_missing_scaler_and_one_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no scaler {tmp_path}/scaler; name the folder"):
        Scaler.load_scaler(tmp_path)
    NoScaler().save_scaler(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a scaler none, not min_max; load it with Scaler\.load_scaler"):
        MinMaxScaler.load_scaler(tmp_path)


def test_what_cannot_be_written_leaves_the_older_scaler(tmp_path: Path) -> None:
    NoScaler().save_scaler(tmp_path)
    large = QuantileScaler.from_rewards([reward / 7 for reward in range(200)])
    with file_size_limit(1000), pytest.raises(StorageError, match=r"scaler cannot be written: .*File too large.*"):
        large.save_scaler(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scaler"]
    assert Scaler.load_scaler(tmp_path) == NoScaler()
    large.save_scaler(tmp_path)
    assert Scaler.load_scaler(tmp_path) == large
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"file/scaler cannot be written: .*choose another place"):
        NoScaler().save_scaler(tmp_path / "file")
