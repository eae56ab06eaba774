"""Scales of rewards: what a slot tells the model in place of the reward itself.

A scaler is fitted on the training rewards, stored with the model, and used for every target that is asked for later.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import groupby, pairwise
from numbers import Real
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Self

from tropism.errors import ConfigError
from tropism.storage import write_whole, writing
from tropism.targets.config import ScalerName

FILE = "scaler"
"""Name of the file of a saved scaler, in its folder."""
MOST_KNOTS = 257
LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_REFIT = "fit the scaler again"


@dataclass(frozen=True, kw_only=True)
class Scaler(ABC):
    """A strictly increasing map from rewards to what the model is told, and back."""

    name: ClassVar[ScalerName]
    needs_spread: ClassVar[bool] = True
    """Whether it divides by the spread of the training rewards, so that they may not be all equal."""

    @classmethod
    def from_rewards(cls, rewards: Sequence[float]) -> Self:
        """The scaler of these training rewards.

        Raises:
            ConfigError: no rewards; one that is missing, no number or not finite (names its index); rewards that are
                all equal, too far apart to be subtracted, or too large to be told to a model on this scale.
        """
        mend = "score that text again, or leave it out"
        numbers = [_number(reward, f"rewards[{index}]", mend) for index, reward in enumerate(rewards)]
        if not numbers:
            raise ConfigError("there are no rewards to fit a scaler on; give texts that have been scored")
        low, high = min(numbers), max(numbers)
        if cls.needs_spread and low == high:
            found = "the only reward is" if len(numbers) == 1 else f"all {len(numbers):,} rewards are"
            raise ConfigError(
                f"the scaler {cls.name} needs rewards that differ, and {found} {low}, so that there is nothing to ask "
                "for; check the reward function, or give texts with different rewards"
            )
        if not math.isfinite(high - low):
            raise ConfigError(f"rewards from {low} to {high} lie too far apart to be subtracted; divide all of them")
        scaler = cls._fitted(numbers, low, high)
        scaler.scale_rewards([low, high])
        return scaler

    def scale_reward(self, reward: float) -> float:
        """What the model is told of a reward, or of a target that is asked for.

        Raises:
            ConfigError: it is no finite number, or would be none as a float32 on this scale.
        """
        number = _number(reward, "the reward", "give a finite number")
        scaled = self._scaled(number)
        if not abs(scaled) <= LARGEST_FLOAT32:
            raise ConfigError(
                f"the reward {number} is {scaled} on the scale {self.name}, and a model is told float32 numbers; ask "
                "for one nearer to the training rewards, or train with the scaler standard, min_max or quantile"
            )
        return scaled

    def scale_rewards(self, rewards: Sequence[float]) -> list[float]:
        """``scale_reward`` of each; raises what it raises."""
        return [self.scale_reward(reward) for reward in rewards]

    def inverse(self, scaled: float) -> float:
        """The reward, in its own units, that the model is told as ``scaled``.

        Raises:
            ConfigError: ``scaled`` is no finite number, or no finite reward has it.
        """
        number = _number(scaled, "the scaled reward", "give a finite number")
        reward = self._unscaled(number)
        if not math.isfinite(reward):
            raise ConfigError(f"no finite reward is {number} on the scale {self.name}; give a smaller number")
        return reward

    def to_dict(self) -> dict[str, Any]:
        """All that is known about it, of JSON's types; ``scaler_from_dict`` reads it."""
        return {"name": self.name, **asdict(self)}

    def to_json(self) -> str:
        """``to_dict`` as text; floats come back to the bit."""
        return json.dumps(self.to_dict())

    def save_scaler(self, folder: str | Path) -> None:
        """Write the file ``scaler`` into a folder, which is made where it is missing.

        Raises:
            StorageError: it cannot be written; an older one is as it was.
        """
        path = Path(folder) / FILE
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self.to_json().encode())

    @classmethod
    def load_scaler(cls, folder: str | Path) -> Self:
        """The scaler that was saved in a folder, here or by conditionme; of any kind where called on ``Scaler``.

        Raises:
            ConfigError: there is none, it is damaged, or it is of another kind; names the file.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ConfigError(f"there is no scaler {path}; name the folder that one was saved in")
        try:
            scaler = scaler_from_dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} holds no scaler that can be read: {error}") from error
        if not isinstance(scaler, cls):
            raise ConfigError(f"{path} holds a scaler {scaler.name}, not {cls.name}; load it with Scaler.load_scaler")
        return scaler

    @classmethod
    @abstractmethod
    def _fitted(cls, rewards: list[float], low: float, high: float) -> Self:
        """The scaler of finite rewards (at least one), of which ``low`` and ``high`` are the least and the greatest."""

    @abstractmethod
    def _scaled(self, reward: float) -> float:
        """What becomes of a finite reward; may overflow to an infinity."""

    @abstractmethod
    def _unscaled(self, scaled: float) -> float:
        """The inverse of ``_scaled``; may overflow to an infinity."""


@dataclass(frozen=True, kw_only=True)
class StandardScaler(Scaler):
    """(r - mean) / std, std the sample's (divided by n - 1): mean 0 and deviation 1 over the training rewards."""

    name: ClassVar[ScalerName] = "standard"
    factor: ClassVar[float] = 1.0

    mean: float
    """Of the training rewards."""
    std: float
    """Standard deviation of the training rewards, above 0."""

    def __post_init__(self) -> None:
        _keep_numbers(self)
        if self.std <= 0:
            raise ConfigError(f"std is {self.std}, and must be above 0; fit the scaler on rewards that differ by more")

    @classmethod
    def _fitted(cls, rewards: list[float], low: float, high: float) -> Self:
        # Moments of numbers from 0 to 1 neither overflow nor lose the spread in the size of the rewards.
        spread = high - low
        places = [(reward - low) / spread for reward in rewards]
        mean = math.fsum(places) / len(places)
        std = math.sqrt(math.fsum((place - mean) ** 2 for place in places) / (len(places) - 1))
        return cls(mean=low + mean * spread, std=std * spread)

    def _scaled(self, reward: float) -> float:
        return self.factor * ((reward - self.mean) / self.std)

    def _unscaled(self, scaled: float) -> float:
        return self.mean + scaled / self.factor * self.std


@dataclass(frozen=True, kw_only=True)
class StandardTimes1000Scaler(StandardScaler):
    """1000 * (r - mean) / std."""

    name: ClassVar[ScalerName] = "standard_times_1000"
    factor: ClassVar[float] = 1000.0


@dataclass(frozen=True, kw_only=True)
class MinMaxScaler(Scaler):
    """(r - min) / (max - min): 0 to 1 over the training rewards."""

    name: ClassVar[ScalerName] = "min_max"

    reward_min: float
    """The least training reward."""
    reward_max: float
    """The greatest training reward, above the least."""

    def __post_init__(self) -> None:
        _keep_numbers(self)
        if not 0 < self.reward_max - self.reward_min < math.inf:
            raise ConfigError(f"reward_max must lie a finite number above reward_min; {_REFIT} on rewards that differ")

    @classmethod
    def _fitted(cls, rewards: list[float], low: float, high: float) -> Self:
        return cls(reward_min=low, reward_max=high)

    def _scaled(self, reward: float) -> float:
        return (reward - self.reward_min) / (self.reward_max - self.reward_min)

    def _unscaled(self, scaled: float) -> float:
        return self.reward_min + scaled * (self.reward_max - self.reward_min)


@dataclass(frozen=True, kw_only=True)
class QuantileScaler(Scaler):
    """The share of training rewards below r, equal ones counted half: the middle of a value's probability.

    Linear between the knots; beyond them it goes on with the mean slope between the first and the last. With up to 257
    different rewards each is a knot. With more, the shares of those between two knots are off by at most 1/126, and a
    value that more of the rewards have than that is always a knot.
    """

    name: ClassVar[ScalerName] = "quantile"

    knots: tuple[tuple[float, float], ...]
    """From 2 to 257 pairs of a reward and its share, which is above 0 and below 1; both increase."""

    def __post_init__(self) -> None:
        pairs = self.knots
        if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            raise ConfigError(f"knots must be pairs of a reward and its share; {_REFIT}")
        knots = tuple((_number(a, "a knot's reward", _REFIT), _number(b, "a knot's share", _REFIT)) for a, b in pairs)
        rising = 2 <= len(knots) <= MOST_KNOTS and all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(knots))
        if not rising or not math.isfinite(knots[-1][0] - knots[0][0]) or knots[0][1] <= 0 or knots[-1][1] >= 1:
            raise ConfigError(f"knots must be 2 to {MOST_KNOTS}, and increase, the shares between 0 and 1; {_REFIT}")
        object.__setattr__(self, "knots", knots)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "knots": [list(knot) for knot in self.knots]}

    @classmethod
    def _fitted(cls, rewards: list[float], low: float, high: float) -> Self:
        return cls(knots=tuple(_thinned(list(_shares(rewards)))))

    def _scaled(self, reward: float) -> float:
        return _along(self.knots, reward, start=0)

    def _unscaled(self, scaled: float) -> float:
        return _along(self.knots, scaled, start=1)


@dataclass(frozen=True, kw_only=True)
class NoScaler(Scaler):
    """r itself, whatever the training rewards are."""

    name: ClassVar[ScalerName] = "none"
    needs_spread: ClassVar[bool] = False
    factor: ClassVar[float] = 1.0

    @classmethod
    def _fitted(cls, rewards: list[float], low: float, high: float) -> Self:
        return cls()

    def _scaled(self, reward: float) -> float:
        return self.factor * reward

    def _unscaled(self, scaled: float) -> float:
        return scaled / self.factor


@dataclass(frozen=True, kw_only=True)
class Times1000Scaler(NoScaler):
    """1000 * r."""

    name: ClassVar[ScalerName] = "times_1000"
    factor: ClassVar[float] = 1000.0


SCALERS: dict[str, type[Scaler]] = {
    kind.name: kind
    for kind in (StandardScaler, MinMaxScaler, QuantileScaler, StandardTimes1000Scaler, Times1000Scaler, NoScaler)
}

_NAMES_IN_CONDITIONME: dict[str, ScalerName] = {
    "standard_scale": "standard",  # its options, where they differ
    "do_nothing": "none",
    "MinMaxScaler": "min_max",  # its classes, whose names stand in its files
    "StandardScaleScaler": "standard",
    "StandardTimes1000Scaler": "standard_times_1000",
    "DoNothingScaler": "none",
    "Times1000": "times_1000",
}


def scaler_named(name: str) -> type[Scaler]:
    """The class of scalers that has a name.

    Raises:
        ConfigError: there is none; names the closest and all known ones.
    """
    if name in SCALERS:
        return SCALERS[name]
    near = get_close_matches(name[:60], SCALERS, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"there is no scaler {name!r:.60}.{guess} Known: {', '.join(SCALERS)}")


def scaler_from_dict(stored: Mapping[str, Any]) -> Scaler:
    """The scaler that ``to_dict`` made a mapping of, here or in conditionme, whose names for them are known, too.

    Raises:
        ConfigError: an unknown name (names the known ones), keys that are missing or too many, or damaged values.
    """
    name = stored.get("name") if isinstance(stored, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(f"a stored scaler has one of the names {', '.join(SCALERS)}, and this has none; {_REFIT}")
    kind = scaler_named(_NAMES_IN_CONDITIONME.get(name, name))
    wanted = ["name", *(field.name for field in fields(kind))]
    if stored.keys() != set(wanted):
        keys = ", ".join(f"{key!s:.60}" for key in stored)
        raise ConfigError(f"a stored scaler {kind.name} has {', '.join(wanted)}, and this one has {keys}; {_REFIT}")
    return kind(**{key: stored[key] for key in wanted[1:]})


def _number(value: object, what: str, mend: str) -> float:
    """``value`` as a finite float.

    Raises:
        ConfigError: it is none; says ``what`` it is and how to ``mend`` that.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{what} is {value!r:.60}, which is no number; {mend}")
    try:
        number = float(value)
    except OverflowError:  # a whole number, which may be too long to be printed, too
        raise ConfigError(f"{what} is larger than a float can be; {mend}") from None
    if not math.isfinite(number):
        raise ConfigError(f"{what} is {number}, which is not finite; {mend}")
    return number


def _keep_numbers(scaler: Scaler) -> None:
    """Replace every field of a new scaler by the finite float it must be."""
    for field in fields(scaler):
        object.__setattr__(scaler, field.name, _number(getattr(scaler, field.name), field.name, _REFIT))


def _shares(rewards: list[float]) -> Iterator[tuple[float, float]]:
    """Every different reward, in order, and the middle of its share of the probability."""
    below = 0
    for reward, same in groupby(sorted(rewards)):
        count = sum(1 for _ in same)
        yield reward, (2 * below + count) / (2 * len(rewards))
        below += count


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 257 of the points, as close together in share as that allows.

    The two outermost on either side always stay: a single reward far out must not squeeze those next to it together.
    """
    if len(points) <= MOST_KNOTS:
        return points
    inner = points[1:-1]
    # Two steps of a walk cover more than one stride, so that one of 1/126 takes at most 252 of the inner points.
    walks = (_walk(inner, 1 / parts) for parts in range(2 * MOST_KNOTS, 125, -1))
    return [points[0], *next(walk for walk in walks if len(walk) <= MOST_KNOTS - 2), points[-1]]


def _walk(points: list[tuple[float, float]], stride: float) -> list[tuple[float, float]]:
    """From the first point to the last, each time to the farthest whose share is a stride away, or else to the next."""
    at = 0
    chosen = [points[0]]
    while at < len(points) - 1:
        reached = bisect_right(points, points[at][1] + stride, key=itemgetter(1)) - 1
        at = max(at + 1, reached)
        chosen.append(points[at])
    return chosen


def _along(knots: tuple[tuple[float, float], ...], value: float, *, start: int) -> float:
    """The line through the knots, whose coordinates both increase, where coordinate ``start`` (0 or 1) is the value."""
    end = 1 - start
    following = bisect_right(knots, value, key=itemgetter(start))
    if 0 < following < len(knots):
        low, high = knots[following - 1], knots[following]
        place = (value - low[start]) / (high[start] - low[start])
        return min(low[end] + place * (high[end] - low[end]), high[end])  # rounding must not pass the next knot
    first, last = knots[0], knots[-1]
    nearest = first if following == 0 else last
    return nearest[end] + (value - nearest[start]) / (last[start] - first[start]) * (last[end] - first[end])
