"""Targets in the units of the reward -> the ids that stand before a prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any, Self

from tropism.errors import ConfigError
from tropism.ops.slots import slot_id
from tropism.targets.config import Conditioning
from tropism.targets.scalers import LARGEST_FLOAT32, Scaler, scaler_from_dict, scaler_named
from tropism.types import Prompt

logger = logging.getLogger("tropism")

Targets = Mapping[str, float] | float | None
"""What is asked for: a number per name, names left out are open; a plain number where there is one reward."""

MUCH = 0.95
"""The share of the training rewards below what held-out evaluation asks for, unless told otherwise."""
KNOTS = 100
"""Quantiles of the training rewards that are kept: every hundredth."""


@dataclass(frozen=True, kw_only=True)
class SeenRewards:
    """How a reward was distributed in training."""

    quantiles: tuple[float, ...]
    """The smallest reward, every hundredth, and the largest: 101 numbers that never fall."""

    @classmethod
    def of(cls, rewards: Sequence[float]) -> Self:
        """Of at least one finite number."""
        ordered = sorted(rewards)
        last = len(ordered) - 1

        def at(share: float) -> float:
            place = share * last
            low = math.floor(place)
            high = min(low + 1, last)
            return ordered[low] + (place - low) * (ordered[high] - ordered[low])

        return cls(quantiles=tuple(at(number / KNOTS) for number in range(KNOTS + 1)))

    def joined_by(self, rewards: Sequence[float]) -> Self:
        """Of other rewards, and of the ends of these where they lie outside of those."""
        low, high = min(rewards), max(rewards)
        return type(self).of([*rewards, *(end for end in self.range if not low <= end <= high)])

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return self.quantiles[0], self.quantiles[-1]

    def quantile(self, share: float) -> float:
        """The reward that this share of the training rewards does not exceed."""
        place = min(max(share, 0.0), 1.0) * KNOTS
        low = min(math.floor(place), KNOTS - 1)
        return self.quantiles[low] + (place - low) * (self.quantiles[low + 1] - self.quantiles[low])

    @property
    def decimals(self) -> int:
        """Digits behind the point with which two rewards look different that are a hundredth of the range apart."""
        low, high = self.range
        spread = high - low
        return min(12, max(0, 2 - math.floor(math.log10(spread)))) if spread > 0 else 2

    def borders(self, bins: int) -> tuple[float, ...]:
        """[bins - 1] rising borders between equally filled bins, all below the largest reward.

        Bin b holds rewards in (border b-1, border b], so that the last bin always has some. Where many rewards are
        equal, bins between two equal borders stay empty.
        """
        below = max(quantile for quantile in self.quantiles if quantile < self.quantiles[-1])
        return tuple(min(self.quantile(number / bins), below) for number in range(1, bins))


class Conditioner:
    """Puts before a prompt what tells the model its targets.

    Slots stand in front of everything, bos included, so that the first of them has position 0 and the text follows. The
    mechanism ``text`` puts ``reward: 0.90`` and a line break after the bos instead.

    Args:
        encode: text -> token ids without special tokens, for the mechanism ``text``.
        bos_id: of the tokenizer, None where it has none.
    """

    def __init__(
        self, config: Conditioning, *, encode: Callable[[str], Sequence[int]] | None = None, bos_id: int | None = None
    ) -> None:
        self.config, self.encode, self.bos_id = config, encode, bos_id
        self.scalers: tuple[Scaler, ...] = ()
        self.edges: tuple[tuple[float, ...], ...] = ()
        """For ``token``: per reward the borders between its bins, rising; bin b holds rewards in (edge b-1, edge b]."""
        self.seen: tuple[SeenRewards, ...] = ()
        self.default: Targets = None
        """What a prompt asks for where nothing is said."""
        self.knows_open = False
        """Whether the model has learned what to make of rewards that are left open."""
        self._warned: set[tuple[str, str]] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards, in the order of their slots."""
        return self.config.targets

    @property
    def fitted(self) -> bool:
        """Whether training rewards have been seen; until then every prompt stays as it is."""
        return bool(self.seen)

    # Fitting ---------------------------------------------------------------------------------------------------------

    def fit(self, rewards: Sequence[Sequence[float]]) -> None:
        """Take the scales from training rewards [N][K].

        Raises:
            ConfigError: none, one that is not finite, or all equal.
        """
        columns = [[row[place] for row in rewards] for place in range(len(self.names))]
        for name, column in zip(self.names, columns, strict=True):
            _check_column(name, column)
        self.seen = tuple(SeenRewards.of(column) for column in columns)
        if self.config.mechanism == "token":
            self.edges = tuple(seen.borders(self.config.bins) for seen in self.seen)
        elif self.config.mechanism != "text":
            self.scalers = tuple(_scaler(self.config, name, c) for name, c in zip(self.names, columns, strict=True))

    def see(self, rewards: Sequence[Sequence[float]]) -> None:
        """Note further training rewards [N][K]: they widen what has been seen. Scales stay, or slots would lie.

        Raises:
            ConfigError: none, or one that is not finite.
        """
        columns = [[row[place] for row in rewards] for place in range(len(self.names))]
        for name, column in zip(self.names, columns, strict=True):
            _check_column(name, column, equal=True)
        self.seen = tuple(seen.joined_by(column) for seen, column in zip(self.seen, columns, strict=True))

    # Asking ----------------------------------------------------------------------------------------------------------

    def values(self, targets: Targets) -> tuple[float | None, ...]:
        """Targets in the order of the names, None where open.

        Raises:
            ConfigError: an unknown name, or no finite number.
        """
        if targets is None:
            targets = self.default
        if targets is None:
            return (None,) * len(self.names)
        if not isinstance(targets, Mapping):
            if len(self.names) > 1:
                raise ConfigError(
                    f"the model knows {len(self.names)} rewards; say which one {targets!r} is of: "
                    f"{{{self.names[0]!r}: {targets!r}}} (the names are {', '.join(self.names)})"
                )
            targets = {self.names[0]: targets}
        for name, asked in targets.items():
            self._check_target(name, asked)
        return tuple(None if (value := targets.get(name)) is None else float(value) for name in self.names)

    def _check_target(self, name: Any, value: Any) -> None:
        if name not in self.names:
            close = get_close_matches(str(name), self.names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(f"the model knows no reward {name!r}{hint} It was trained on: {', '.join(self.names)}")
        if value is None:
            return
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:  # not float(value): an int may be too large
            raise ConfigError(
                f"the target of {name!r} is {value!r:.60}; give a finite number, in the reward's own units"
            )

    def prefix(self, targets: Targets | tuple[float | None, ...], *, warn: bool = True) -> tuple[int, ...]:
        """The ids that say so; none before ``fit``.

        Args:
            targets: as a mapping or number, or what ``values`` made of it.
            warn: whether a target outside of the training rewards is told of, once per reward and side.

        Raises:
            ConfigError: as ``values`` does.
        """
        values = targets if isinstance(targets, tuple) else self.values(targets)
        if not self.fitted:
            return ()
        if warn:
            self._warn(values)
        if self.config.mechanism == "text":
            return tuple(self._written(values))
        if self.config.mechanism == "token":
            held = [None if v is None else float(_bin(e, v)) for e, v in zip(self.edges, values, strict=True)]
        else:
            held = [None if v is None else s.scale_reward(v) for s, v in zip(self.scalers, values, strict=True)]
        return tuple(slot_id(place, value) for place, value in enumerate(held))

    def _written(self, values: Sequence[float | None]) -> Sequence[int]:
        """Ids of the text that says the targets, to a hundredth of what the rewards' range is of the order of."""
        assert self.encode is not None
        lines = [
            f"{name}: {value:.{seen.decimals}f}\n"
            for name, value, seen in zip(self.names, values, self.seen, strict=True)
            if value is not None
        ]
        return self.encode("".join(lines)) if lines else ()

    def _warn(self, values: Sequence[float | None]) -> None:
        """Tell of what the model has not learned, once each."""
        for name, seen, value in zip(self.names, self.seen, values, strict=True):
            low, high = seen.range
            if value is None:
                kind = "" if self.knows_open else "open"
                problem = f"the reward {name!r} is left open, which it never was in training (target_dropout was 0)"
            else:
                kind = "below" if value < low else "above" if value > high else ""
                seen_range = f"the rewards seen in training, {low:g} to {high:g}"
                problem = f"the target {value:g} of {name!r} lies outside of {seen_range}"
            if kind and (name, kind) not in self._warned:
                self._warned.add((name, kind))
                logger.warning("%s: what the model makes of it is a guess", problem)

    def apply(self, ids: Sequence[int], prefix: Sequence[int]) -> tuple[int, ...]:
        """A prompt's ids with what ``prefix`` returned: slots before everything, text after the bos."""
        if self.config.mechanism == "text" and ids and ids[0] == self.bos_id:
            return (ids[0], *prefix, *ids[1:])
        return (*prefix, *ids)

    def condition(self, prompts: Sequence[Prompt], targets: Targets | Sequence[Targets]) -> list[Prompt]:
        """Prompts that ask for targets; their texts stay as they are, for rewards to see.

        Args:
            targets: one for all, or a list with one per prompt.

        Raises:
            ConfigError: as ``values`` does, or the list has another length.
        """
        several = isinstance(targets, Sequence) and not isinstance(targets, str)
        per_row: Sequence[Any] = targets if several else [targets] * len(prompts)  # type: ignore[assignment]
        if len(per_row) != len(prompts):
            raise ConfigError(
                f"there are {len(per_row)} targets for {len(prompts)} prompts; give one each, or one for all"
            )
        return [
            replace(prompt, ids=self.apply(prompt.ids, self.prefix(self.values(asked))))
            for prompt, asked in zip(prompts, per_row, strict=True)
        ]

    def for_evaluation(self, prompts: Sequence[Prompt], target: Targets = None) -> Sequence[Prompt]:
        """Prompts that ask for much: for ``target``, else for the default, else for 95th percentiles. As they are
        before ``fit``."""
        if not self.fitted:
            return prompts
        if target is None:
            target = self.default
        if target is None:
            target = {name: seen.quantile(MUCH) for name, seen in zip(self.names, self.seen, strict=True)}
        return self.condition(prompts, target)

    @property
    def width(self) -> int:
        """Most ids that a prefix has."""
        if self.config.mechanism != "text":
            return len(self.names)
        assert self.encode is not None
        if not self.fitted:
            return len(self.encode("".join(f"{name}: -88888.88888\n" for name in self.names)))
        # Ten times as far as any reward seen, which also has one digit more.
        return len(self._written([-9.99 * max(map(abs, seen.range)) for seen in self.seen]))

    # Saving ----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the mechanism and everything that ``fit`` learned."""
        return {
            **asdict(self.config),
            "targets": list(self.names),
            "scalers": [scaler.to_dict() for scaler in self.scalers],
            "edges": [list(edges) for edges in self.edges],
            "seen": [list(seen.quantiles) for seen in self.seen],
            "default": dict(self.default) if isinstance(self.default, Mapping) else self.default,
            "knows_open": self.knows_open,
        }

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up what ``fit`` had learned.

        Raises:
            ConfigError: it is not of these rewards and this mechanism. Other errors where it is of other types.
        """
        scalers = tuple(scaler_from_dict(entry) for entry in saved["scalers"])
        edges = tuple(tuple(map(float, edges)) for edges in saved["edges"])
        seen = tuple(SeenRewards(quantiles=tuple(map(float, quantiles))) for quantiles in saved["seen"])
        for name, found, width in (
            ("seen", (s.quantiles for s in seen), KNOTS + 1),
            ("edges", edges, self.config.bins - 1),
        ):
            if not all(_rising(row, width) for row in found):
                raise ConfigError(f"{name} must be rows of finite numbers that never fall; save the model anew")
        several, mechanism = len(self.names), self.config.mechanism
        wanted = (0 if mechanism in ("token", "text") else several, several if mechanism == "token" else 0, several)
        if (len(scalers), len(edges), len(seen)) != wanted:
            raise ConfigError(
                f"{len(scalers)} scalers, {len(edges)} rows of edges and {len(seen)} of what was seen do not belong to "
                f"{several} rewards and the mechanism {mechanism}; save the model anew"
            )
        self.values(saved["default"])
        self.scalers, self.edges, self.seen, self.default = scalers, edges, seen, saved["default"]
        self.knows_open = bool(saved["knows_open"])


def _check_column(name: str, column: Sequence[float], *, equal: bool = False) -> None:
    """Args: equal: whether all may be the same number."""
    if not column:
        raise ConfigError(f"there are no rewards to learn the scale of {name!r} from")
    bad = next((value for value in column if not math.isfinite(value)), None)
    if bad is not None:
        raise ConfigError(f"a training reward of {name!r} is {bad}; leave such texts out")
    if min(column) == max(column) and not equal:
        raise ConfigError(
            f"all {len(column)} training rewards of {name!r} are {column[0]:g}, so there is nothing to ask for; use a "
            "reward that tells texts apart, or more varied texts"
        )


def _scaler(config: Conditioning, name: str, column: Sequence[float]) -> Scaler:
    try:
        return scaler_named(config.scaler).from_rewards(column)
    except ConfigError as error:
        raise ConfigError(f"the rewards of {name!r}: {error}") from error


def _rising(row: Sequence[float], width: int) -> bool:
    return len(row) == width and all(map(math.isfinite, row)) and list(row) == sorted(row)


def _bin(edges: Sequence[float], value: float) -> int:
    return sum(value > edge for edge in edges)
