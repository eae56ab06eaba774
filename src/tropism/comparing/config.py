"""What a comparison is: methods, seeds, a budget, and how each cell is measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from tropism.algorithms import ALGORITHMS
from tropism.errors import ConfigError
from tropism.schema import apply_overrides, build

SECTION = "compare"
"""The key of a recipe's file that holds these settings."""
BASE, BEST_OF = "base", "best-of-n"
METHODS = (*(name for name in ALGORITHMS if name != "reward-model"), BEST_OF)
"""Everything that can be compared; the base model is always measured beside them."""
VARIANT = "@"
"""Parts a method from the label of one of its settings: ``ppo@kl_coef=0.1``."""
OWN_KEYS = ("epochs", "keep", "n")
"""Settings of a method that belong to the comparison and to no recipe."""
RECIPE_KEYS = ("algorithm", "trainer", "prompts_per_step", "lora", "train_layers")
"""Fields of the recipe that each method may have for itself."""
_LABEL = re.compile(r"[\w.=+-]+", re.ASCII)
SHARED = {
    "model": "all methods start from the same model",
    "data": "all methods get the same prompts",
    "eval_data": "all methods are measured on the same prompts",
    "reward": "all methods get the same reward",
    "metrics": "all methods are measured alike",
    "seed": "the seeds are those of the comparison (seeds)",
    "total_steps": "it follows from the budget",
    "run": "every cell has a folder of its own in that of the comparison",
    "sampling": "all methods sample alike (ilql may set sampling: {beta: ...})",
    "normalise": "it is for reward models",
}
"""Fields of the recipe that no method may have for itself, and why."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the target of a reward-conditioned model is chosen: on training prompts, within the budget."""

    share: float = 0.1
    """Share of the budget that is kept for it."""
    targets: tuple[float, ...] = ()
    """What is asked for, in the reward's own units; none: the 90th and 98th percentile and the largest of the rewards
    that it learned from."""
    guidance: tuple[float, ...] = (0.0, 1.0, 2.0)
    """Strengths of guidance that are tried with every target; 0 is none."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise ValueError("share must lie above 0 and below 0.5: it is the part of the budget kept for the choice")
        if not all(math.isfinite(target) for target in self.targets):
            raise ValueError("targets must be finite numbers, in the reward's own units")
        for name, given in (("targets", self.targets), ("guidance", self.guidance)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} must list each number once: the budget of the choice is shared by all pairs")
        if not self.guidance or not all(0 <= one < math.inf for one in self.guidance):
            raise ValueError("guidance must list one strength or more, 0 (none) or positive")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The section ``compare`` of a recipe."""

    methods: dict[str, dict[str, Any]]
    """Names of methods, or each name with what its recipe changes: its own fields, `learning_rate`, `trainer`,
    `prompts_per_step`, `lora`; of methods that learn from the pool also `epochs`, of sft `keep`, of best-of-n `n`.
    `ppo@kl_coef=0.1` is ppo with that field, as a line of its own; `ppo@slow: {...}` has a label of yours."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every method is trained once with each; a number N stands for 0 to N - 1."""
    completions: int | None = None
    """The budget: completions that a method may sample and score in training."""
    seconds: float | None = None
    """The budget in seconds of training, instead: each method gets as many completions as it manages in them."""
    samples_per_prompt: int = 4
    """Completions of each held-out prompt, for every method and seed."""
    best_of: int = 16
    """n of best-of-n."""
    against: str | None = None
    """The method that the others are tested against; None: sft where it is compared, else the base model."""
    choice: Choice = field(default_factory=Choice)
    """How the target of `conditioned` is chosen."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"methods is empty; name some of {', '.join(METHODS)}")
        if (self.completions is None) == (self.seconds is None):
            given = "neither is given" if self.completions is None else "both are given"
            raise ValueError(
                f"the budget is completions or seconds, and {given}: give --completions N or --seconds S (completions "
                "or seconds in the section compare)"
            )
        if self.completions is not None and self.completions < 1:
            raise ValueError("completions must be at least 1")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError("seconds must be positive")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be one number or more, each once")
        if self.samples_per_prompt < 1:
            raise ValueError("samples_per_prompt must be at least 1")
        if self.best_of < 2:
            raise ValueError("best_of must be at least 2")
        if self.against is not None and self.against not in (BASE, *self.methods):
            close = get_close_matches(self.against, [BASE, *self.methods], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"against is {self.against!r}, which is not compared here{hint}")


def compare_config(given: Any, **changes: Any) -> CompareConfig:
    """The settings of a comparison.

    Args:
        given: the section of a recipe's file, None where it has none.
        changes: of the command line or the call, None where nothing was said. ``methods`` names those to take; what the
            section says of each stays.

    Raises:
        ConfigError: an unknown setting or method (the closest is named), or one that cannot be.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{SECTION}: expected a mapping with methods, seeds and completions, got {given!r:.60}")
    settings = dict(given or {})
    own = _methods(settings.get("methods") or {}, f"{SECTION}.methods")
    chosen = own if changes.get("methods") is None else _methods(changes["methods"], "methods")
    both = {name: merged(own.get(name, {}), chosen.get(name, {})) for name in own | chosen}
    # A variant is its method as it stands here, but for what the variant says.
    own = {name: merged(both.get(family_of(name), {}), both[name]) for name in chosen}
    if not own:
        raise ConfigError(f"name the methods to compare: --methods sft,ppo,grpo (known: {', '.join(METHODS)})")
    for name in ("completions", "seconds"):  # one on the command line takes the place of both in the file
        if changes.get(name) is not None:
            settings |= {"completions": None, "seconds": None}
    settings |= {name: value for name, value in changes.items() if value is not None and name != "methods"}
    if "seeds" in settings:
        settings["seeds"] = seeds_of(settings["seeds"])
    return build(CompareConfig, {**settings, "methods": own}, path=SECTION)


def _methods(given: Any, where: str) -> dict[str, dict[str, Any]]:
    """Each method with its own settings, in the order given."""
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    if isinstance(given, Mapping):
        pairs = [(str(name), {} if own is None else own) for name, own in given.items()]
    elif isinstance(given, Sequence):
        pairs = [(str(name), {}) for name in given]
    else:
        raise ConfigError(f"{where}: expected names of methods, got {given!r:.60}")
    methods: dict[str, dict[str, Any]] = {}
    for name, own in pairs:
        if not isinstance(own, Mapping):
            raise ConfigError(f"{where}.{name}: expected a mapping of what its recipe changes, got {own!r:.60}")
        family, _, label = name.partition(VARIANT)
        known = _known(family, where)
        own = dict(own)
        if VARIANT in name:
            if not _LABEL.fullmatch(label):
                raise ConfigError(f"{where}: {name!r}: behind the {VARIANT} stand letters, digits and . _ = + - only")
            key, equals, value = label.partition("=")
            if equals and not own:
                own = apply_overrides({}, [f"--{key}={value}"])
            known = f"{known}{VARIANT}{label}"
        if known in methods:
            raise ConfigError(f"{where}: {known} is there twice; a method is compared once")
        _refuse_shared(family_of(known), own, f"{where}.{known}")
        methods[known] = _sorted_in(family_of(known), own, f"{where}.{known}")
    return methods


def merged(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the changes in it, at every depth."""
    result = dict(mapping)
    for name, value in changes.items():
        below = result.get(name)
        result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def family_of(method: str) -> str:
    """The method that a variant is one of: ``ppo`` for ``ppo@kl_coef=0.1``."""
    return method.partition(VARIANT)[0]


def _sorted_in(family: str, own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A method's settings where a recipe has them: its own fields below ``algorithm``, the rate below ``trainer``.

    Raises:
        ConfigError: an unknown one; names the closest.
    """
    fields_of = {one.name for one in fields(ALGORITHMS[family])} if family in ALGORITHMS else set()
    known = [*sorted(fields_of), *OWN_KEYS, *RECIPE_KEYS, "learning_rate", "sampling"]
    sorted_in: dict[str, Any] = {}
    for name, value in own.items():
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"{where}.{name}: {family} has no such setting{hint} (tropism methods {family} lists them)"
            )
        place = "trainer" if name == "learning_rate" else "algorithm" if name in fields_of else None
        if place is None or name in (*OWN_KEYS, *RECIPE_KEYS):
            below = sorted_in.get(name)
            sorted_in[name] = {**value, **below} if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        else:
            below = sorted_in.get(place) or {}
            sorted_in[place] = {**below, name: value} if isinstance(below, Mapping) else below
    return sorted_in


def _known(name: str, where: str) -> str:
    """The name of a method; options of the command line hold underscores for hyphens."""
    hyphened = name.replace("_", "-")
    if hyphened in METHODS:
        return hyphened
    if name == BASE:
        raise ConfigError(f"{where}: the base model is measured always; leave {BASE} out")
    if name == "reward-model":
        raise ConfigError(f"{where}: reward-model trains no policy, so there is nothing to compare; leave it out")
    close = get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError(f"{where}: there is no method {name!r}{hint} The methods are: {', '.join(METHODS)}")


def _refuse_shared(method: str, own: Mapping[str, Any], where: str) -> None:
    """Refuse what would make a method's cell another comparison.

    Raises:
        ConfigError: names the field and the reason.
    """
    for name, reason in SHARED.items():
        only_beta = method == "ilql" and name == "sampling" and set(own.get(name) or {}) <= {"beta"}
        if name in own and not only_beta:
            raise ConfigError(
                f"{where}.{name}: a method cannot have its own: {reason}. Set it for all, or leave it out"
            )
    evaluation = own.get("trainer", {})
    if isinstance(evaluation, Mapping) and "evaluation" in evaluation:
        raise ConfigError(f"{where}.trainer.evaluation: no method can have its own: all methods are measured alike")
    if method == BEST_OF and set(own) - {"n"}:
        raise ConfigError(f"{where}: best-of-n trains nothing; its only setting is n")


def seeds_of(given: Any) -> tuple[int, ...]:
    """Seeds from a number (so many, from 0), a list, or text such as ``3`` or ``0,1,2``.

    Raises:
        ConfigError: something else.
    """
    if isinstance(given, str):
        words = [word.strip() for word in given.split(",")]
        if not all(word.isdecimal() for word in words if word) or not any(words):
            raise ConfigError(f"seeds: expected a number, or numbers parted by commas, not {given!r:.60}")
        given = int(words[0]) if len(words) == 1 else [int(word) for word in words if word]
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise ConfigError(f"seeds: {given} of them leave nothing to do; give at least 1")
        return tuple(range(given))
    if isinstance(given, list | tuple) and all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        return tuple(given)
    raise ConfigError(f"seeds: expected how many there are, or a list of whole numbers, not {given!r:.60}")
