"""What a run is rewarded for: named terms, their weights, and what happens to their sum.

Nothing here imports torch, so that the command line can show these fields quickly.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tropism.errors import ConfigError

Scale = Literal["none", "running", "reference"]
OnError = Literal["raise", "skip"]

MOST_CONCURRENT = 256
"""More threads or workers than this are a mistake."""

RESERVED_NAMES = ("mean", "std", "unscored", "scale")
"""``reward/<these>`` are metrics of the whole reward, so no term may have such a name."""


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listing = ", ".join(known) or "none"
    return f"Did you mean {near[0]!r}? Known: {listing}." if near else f"Known: {listing}."


def callable_name(function: Callable[..., Any]) -> str:
    """A short name of any callable: that of the function, of a partial's function, or of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "reward" if name == "<lambda>" else str(name)


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One named part of the reward."""

    use: str | Callable[..., Any]
    """A registered name (`vader`), the folder of a trained reward model (`runs/my-rm`), a code reference
    (`module:function`, `file.py:function`; needs --allow-code), or, from Python, any callable."""
    weight: float = 1.0
    """Factor of this term in the sum. 0 only logs the term; negative turns the policy away from it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a registered reward, or keyword arguments bound to a function."""
    timeout: float | None = None
    """Seconds that one call may take, in a worker process that is killed when it takes longer. None: the `timeout` of
    the whole reward."""
    retries: int = 0
    """How often a call that raised or took too long is tried again, after 0.5, 1, 2, 4 ... (at most 60) seconds."""
    rows_per_call: int | None = None
    """Completions per call. None: all of a batch at once."""
    concurrency: int = 1
    """Calls at a time: threads, or worker processes where there is a timeout (async functions share one)."""
    cache: str | None = None
    """File in which rewards are kept by content, so that the same row is never scored again; None: no cache."""

    def __post_init__(self) -> None:
        if isinstance(self.use, Path):
            text = str(self.use)
            object.__setattr__(self, "use", text if "/" in text else f"./{text}")  # a bare word may be a reward's name
        if not callable(self.use) and not (isinstance(self.use, str) and self.use.strip()):
            raise ConfigError(f"use: expected a registered name, 'file.py:function' or a callable, not {self.use!r}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight):
            raise ConfigError(f"weight: expected a finite number, not {self.weight!r}")
        if not isinstance(self.args, Mapping) or not all(isinstance(key, str) for key in self.args):
            raise ConfigError(f"args: expected a mapping of argument names to values, not {self.args!r}")
        check_timeout(self.timeout)
        for key, value, least in (
            ("retries", self.retries, 0),
            ("rows_per_call", self.rows_per_call, 1),
            ("concurrency", self.concurrency, 1),
        ):
            if value is None and key == "rows_per_call":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}: expected a whole number of at least {least}, not {value!r}")
        if self.concurrency > MOST_CONCURRENT:
            raise ConfigError(f"concurrency: at most {MOST_CONCURRENT} calls at a time, not {self.concurrency}")
        if self.concurrency > 1 and self.rows_per_call is None:
            raise ConfigError(
                f"concurrency: {self.concurrency} calls at a time need rows_per_call; without it a batch is one call"
            )
        if self.cache is not None and not (isinstance(self.cache, (str, Path)) and str(self.cache).strip()):
            raise ConfigError(f"cache: expected the path of a file, not {self.cache!r}")

    @property
    def name(self) -> str:
        """The name this term gets when none is given: the registered name, the folder's or the function's."""
        if isinstance(self.use, str):
            if "/" in self.use and ":" not in self.use:
                return _name_of_folder(self.use)
            return self.use.rpartition(":")[2].rpartition(".")[2]
        return callable_name(self.use)

    @classmethod
    def of(cls, value: Any) -> RewardTerm:
        """A term from a callable, a name, ``(reward, weight)``, or a mapping of this class's fields."""
        if isinstance(value, RewardTerm):
            return value
        if isinstance(value, Mapping):
            _check_keys(value, [f.name for f in fields(cls)], "a reward term")
            if "use" not in value:
                raise ConfigError(f"a reward term needs `use`: the name of a reward or a function; got {dict(value)!r}")
            return cls(**value)
        if isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ConfigError(f"a reward term is (reward, weight), not {len(value)} values: {value!r}")
            return cls(use=value[0], weight=value[1])
        return cls(use=value)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward of a completion: the weighted sum of its terms, then clipped, then scaled or normalised."""

    terms: dict[str, RewardTerm]
    """Named terms. Each is logged as `reward/<name>`, raw."""
    clip: float | None = None
    """The sum is clipped to +-clip (each token's reward likewise), before scaling. None: not clipped."""
    scale: Scale = "none"
    """Divide by a standard deviation, never subtract a mean: `running` over all rewards so far (this batch included),
    `reference` of the first batch whose rewards differ. No division where it is 0 or of a single reward."""
    normalise: bool = False
    """Subtract the running mean and divide by the running standard deviation. Not together with `scale`."""
    on_error: OnError = "raise"
    """What happens after a call has failed for good: `raise` stops the run; `skip` leaves its completions unscored by
    that term (never 0), warns and counts them."""
    timeout: float | None = None
    """Seconds that one call of any term may take (`reward_timeout` elsewhere); a term's own `timeout` goes before it.
    None: no limit."""

    def __post_init__(self) -> None:
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ConfigError("the reward needs at least one term, for example {'warmth': {'use': 'vader'}}")
        for name, term in self.terms.items():
            _check_term_name(name)
            if not isinstance(term, RewardTerm):
                raise ConfigError(f"reward term {name!r}: expected a RewardTerm, not {term!r}")
        if all(term.weight == 0 for term in self.terms.values()):
            raise ConfigError("every reward term has weight 0; give at least one another weight")
        if self.clip is not None and not (_is_number(self.clip) and 0 < self.clip < math.inf):
            raise ConfigError(f"clip: expected a positive number or nothing, not {self.clip!r}")
        for key, choice, known in (
            ("scale", self.scale, get_args(Scale)),
            ("on_error", self.on_error, get_args(OnError)),
        ):
            if choice not in known:
                raise ConfigError(f"{key}: unknown value {choice!r}. {closest(str(choice), known)}")
        check_timeout(self.timeout)
        if self.normalise and self.scale != "none":
            raise ConfigError("normalise already divides by the running std; remove it or set scale to 'none'")

    @classmethod
    def of(cls, value: Any) -> RewardConfig:
        """A reward from any form a user may give it in.

        A callable; a registered name; the folder of a trained reward model; ``module:function`` or
        ``file.py:function``; ``{"name": reward}`` or ``{"name": (reward, weight)}``; a recipe's ``{"terms": {...},
        "clip": ...}`` or single ``{"use": ...}``; a ``RewardTerm`` or ``RewardConfig``.

        Raises:
            ConfigError: another type, an unknown key (names the closest), or a value out of range.
        """
        if isinstance(value, RewardConfig):
            return value
        if not isinstance(value, Mapping):
            if not (callable(value) or isinstance(value, (str, Path, RewardTerm))):
                raise ConfigError(
                    "reward: expected a callable, a name, or a mapping of names to rewards, not "
                    f"{type(value).__name__}. Several rewards are given as {{'name': (reward, weight), ...}}."
                )
            term = RewardTerm.of(value)
            return cls(terms={term.name: term})
        own = [f.name for f in fields(cls)]
        if isinstance(value.get("terms"), Mapping):
            _check_keys(value, own, "the reward")
            return cls(**{**value, "terms": _terms_of(value["terms"])})
        if "use" in value:
            term_keys = [f.name for f in fields(RewardTerm)]
            _check_keys(value, [*term_keys, *(key for key in own if key != "terms")], "the reward")
            term = RewardTerm.of({key: entry for key, entry in value.items() if key in term_keys})
            return cls(terms={term.name: term}, **{key: entry for key, entry in value.items() if key not in term_keys})
        return cls(terms=_terms_of(value))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for a recipe file; a Python callable is written as ``module:name``."""
        terms = {}
        for name, term in self.terms.items():
            use = term.use
            if not isinstance(use, str):
                use = f"{getattr(use, '__module__', None) or type(use).__module__}:{callable_name(use)}"
            terms[name] = {f.name: getattr(term, f.name) for f in fields(term)} | {"use": use, "args": dict(term.args)}
        return {"terms": terms} | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "terms"}


def check_timeout(seconds: Any) -> None:
    """Refuse what is neither None nor a positive, finite number of seconds."""
    if seconds is not None and not (_is_number(seconds) and 0 < seconds < math.inf):
        raise ConfigError(f"timeout: expected a positive number of seconds or nothing, not {seconds!r}")


def _name_of_folder(use: str) -> str:
    """The name of a run folder as that of a metric; the folder ``model`` in it goes by the run's name."""
    path = Path(use)
    stem = path.parent.name if path.name == "model" else path.name
    name = re.sub(r"[^\w-]+", "-", stem).strip("-") or "reward_model"
    return f"my_{name}" if name in RESERVED_NAMES else name


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_keys(value: Mapping[Any, Any], known: list[str], what: str) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {what}. {closest(str(key), known)}")


def _check_term_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or "/" in name or not name.isprintable():
        raise ConfigError(f"reward term name {name!r}: expected printable text without '/'")
    if name in RESERVED_NAMES:
        raise ConfigError(
            f"reward term name {name!r} is taken by the metric reward/{name}; give the term another name: "
            f"{{'my_{name}': ...}}"
        )


def _terms_of(value: Mapping[Any, Any]) -> dict[str, RewardTerm]:
    terms = {}
    for name, entry in value.items():
        try:
            terms[name] = RewardTerm.of(entry)
        except ConfigError as error:
            raise ConfigError(f"reward term {name!r}: {error}") from error
    return terms
