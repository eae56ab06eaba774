"""From the words of a command line to a recipe: a file, and ``--dotted.key value`` over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.errors import ConfigError
from tropism.foreign.trust import refuse_trust
from tropism.schema import apply_overrides, read_yaml

SHORTHANDS = {"algorithm": "name", "model": "name", "data": "path", "eval_data": "path", "reward": "use"}
"""Sections that may be one word in a recipe, and the field that the word is for."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """A command line taken apart."""

    flags: frozenset[str]
    """Those of the known flags that were given."""
    sources: tuple[str, ...]
    """Words that belong to no key."""
    overrides: tuple[str, ...]
    """Each ``--key=value``, or ``--key`` and ``value`` one after the other."""


def take_apart(arguments: Sequence[str], flags: Mapping[str, str]) -> Words:
    """Flags, sources and overrides.

    Args:
        flags: option -> name of the flag, such as ``{"-h": "help"}``; a flag takes no value.
    """
    found: set[str] = set()
    sources: list[str] = []
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in flags:
            found.add(flags[word])
        elif not word.startswith("-"):
            sources.append(word)
        elif not word.startswith("--"):
            raise ConfigError(f"there is no option {word}; fields of the recipe are set by --dotted.key VALUE")
        else:
            key, equals, value = word.partition("=")
            overrides.append(_field_key(key) + equals + value)
            following = None if equals else next(words, None)
            if following is not None:
                overrides.append(following)
    return Words(flags=frozenset(found), sources=tuple(sources), overrides=tuple(overrides))


def own_options(overrides: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """A command's own options with a value, by name, and what is left: fields of the recipe.

    Args:
        overrides: of ``Words``.
        names: of the command's own options, without hyphens in front.
    """
    own: dict[str, str] = {}
    rest: list[str] = []
    words = iter(overrides)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            following = next(words, None)
            if following is None or (key in names and following.startswith("--")):
                raise ConfigError(f"--{key}: needs a value")
            value = following
        if key in names:
            own[key] = value
        else:
            rest += [word] if equals else [word, value]
    return own, rest


def _field_key(option: str) -> str:
    """``--total-steps`` means ``--total_steps``; names of reward terms and metrics may hold a hyphen, and stay."""
    if option.startswith(("--reward", "--metrics")):
        return option
    return "--" + option.removeprefix("--").replace("-", "_")


def with_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping of a file with the overrides in it; ``--algorithm.kl_coef 0`` keeps the name of ``algorithm: grpo``.

    Raises:
        ConfigError: an override that cannot be, or a file that lets a model's code run where no override does.
    """
    keys = [word[2:].partition("=")[0] for word in overrides if word.startswith("--")]
    merged = apply_overrides(mapping, overrides, shorthands=SHORTHANDS)
    if not {"model", "model.trust_remote_code"} & set(keys):
        refuse_trust(merged, "the recipe")
    return merged


def run_recipe_mapping(folder: Path) -> dict[str, Any]:
    """What ``recipe.yaml`` of a run folder says, with the folder as it is now.

    Raises:
        ConfigError: it is no run folder.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no recipe.yaml; give runs/<name>")
    return {**read_yaml(path), "run": str(folder)}


def was_given_from_python(value: Any) -> bool:
    """Whether a field of a written recipe only describes an object of a Python program."""
    return isinstance(value, str) and value.startswith("<") and value.endswith("given from Python>")


def refuse_python_objects(mapping: Mapping[str, Any], folder: Path) -> None:
    """A recipe that only describes the objects of a Python program cannot be run from its file.

    Raises:
        ConfigError: names the first such field.
    """
    normalise = mapping.get("normalise")
    inner = normalise if isinstance(normalise, Mapping) else {}
    given = {name: mapping.get(name) for name in ("model", "data", "eval_data")}
    for name, value in (given | {f"normalise.{name}": inner.get(name) for name in ("policy", "data")}).items():
        if was_given_from_python(value):
            raise ConfigError(
                f"{name}: the run {folder} was given {str(value).strip('<>')}, which its recipe.yaml cannot hold; "
                f"go on with tropism.train(..., run={str(folder)!r}, resume=True), or give a file (--{name} FILE)"
            )
