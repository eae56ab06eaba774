"""What a comparison is a comparison of, as fingerprints: cells of another model, prompts or reward are never put into
one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tropism.comparing.config import CompareConfig
from tropism.comparing.prompts import ComparedPrompts
from tropism.config import Recipe
from tropism.errors import ConfigError, StorageError
from tropism.recipe_changes import flat_settings, setting_text
from tropism.recipe_identity import file_digest, model_files, reward_sources
from tropism.rewards import RewardConfig, RewardTerm
from tropism.schema import to_plain
from tropism.storage import write_whole

IDENTITY, PLAN = "identity.json", "compare.yaml"
MAY_CHANGE = ("compare.methods", "compare.seeds", "compare.against")
"""Settings that may differ when a comparison goes on; what is there of each method may not."""
MARKS = ("files", "files of the judges")
"""Entries of ``identity.json`` by which files are known that nobody has touched; they may differ."""


def plan_of(config: CompareConfig, recipe: Recipe, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """``compare.yaml``: everything that is not the machine's.

    Args:
        recipe: what all methods share. mapping: its plain values as they were given, for the method's own.
    """
    shared = {k: v for k, v in to_plain(recipe).items() if k not in ("algorithm", "run", "total_steps", "normalise")}
    own = {"algorithm": to_plain(mapping.get("algorithm"))}
    if "prompts_per_step" in mapping:
        own["prompts_per_step"] = mapping["prompts_per_step"]
    return {"recipe": {**shared, **own}, "compare": to_plain(config)}


def identity_of(recipe: Recipe, prompts: ComparedPrompts, before: Mapping[str, Any]) -> dict[str, Any]:
    """Fingerprints of what the files that a recipe names hold.

    Args:
        before: those of the same folder, whose digests of files that nobody has touched are taken over.
    """
    assert recipe.reward is not None
    model = model_files(recipe.model, _mapping(before.get("files")))
    metrics = {name: metric.as_reward() for name, metric in recipe.metrics.items()}
    judges = _judges({"reward": recipe.reward.terms, "metric": metrics}, _mapping(before.get("files of the judges")))
    allowed = recipe.sampling.allowed_tokens
    return {
        **prompts.fingerprints,
        "weights of the model": {name: facts["digest"] for name, facts in model.items()},
        "code of the reward": reward_sources(recipe.reward),
        "code of the metrics": reward_sources(RewardConfig(terms=metrics)) if metrics else {},
        "weights of reward and metrics": {
            f"{place}/{name}": facts["digest"] for place, files in judges.items() for name, facts in files.items()
        },
        "allowed tokens": None if allowed is None else file_digest(Path(allowed)),
        "files": model,
        "files of the judges": judges,
    }


def _judges(kinds: Mapping[str, Mapping[str, RewardTerm]], before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The model files of every argument that names a folder of this machine, such as that of a classifier."""
    found = {}
    for kind, terms in kinds.items():
        for name, term in terms.items():
            for argument, value in term.args.items():
                if isinstance(value, str) and value and Path(value).is_dir():
                    place = f"{kind} {name}: {argument}"
                    found[place] = model_files(value, _mapping(before.get(place)))
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a comparison.

    Raises:
        ConfigError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another folder for the comparison (--out)")
    there = (folder / PLAN).is_file()
    if folder.is_dir() and not there and any(not path.name.startswith(".lock") for path in folder.iterdir()):
        raise ConfigError(f"{folder} holds something that is no comparison; choose another folder (--out)")
    return there


# Going on -------------------------------------------------------------------------------------------------------------


def read_identity(folder: Path) -> dict[str, Any]:
    """``identity.json`` of a folder; empty where there is none."""
    path = folder / IDENTITY
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); choose another folder (--out)") from error
    return found if isinstance(found, dict) else {}


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    write_whole(folder / IDENTITY, json.dumps(identity, indent=1).encode())


def check_identity(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a folder's cells are of the same model, prompts and reward.

    Raises:
        ConfigError: names what has changed.
    """
    for name, value in now.items():
        was = before.get(name)
        if name in MARKS or was == value or (name == "weights of the model" and not was):  # not loaded by then
            continue
        changed = name
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            different = sorted(key for key in {*was, *value} if was.get(key) != value.get(key))
            changed = f"{name} ({', '.join(different[:3])})"
        raise ConfigError(
            f"{folder} holds a comparison whose {changed} were others: what is there could not be compared with new "
            "cells. Choose another folder (--out), or set that back"
        )


def merged_plan(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a folder with the methods and seeds that come in.

    Raises:
        ConfigError: another setting differs; names it.
    """
    old, new = flat_settings(before), flat_settings(now)
    methods = [section.get("compare", {}).get("methods", {}) for section in (before, now)]
    both = set(methods[0]) & set(methods[1])
    for name in sorted(both):
        if methods[0][name] != methods[1][name]:
            _refuse(folder, f"compare.methods.{name}", methods[0][name], methods[1][name])
    for key in sorted(old.keys() | new.keys()):
        if not key.startswith(MAY_CHANGE) and old.get(key) != new.get(key):
            _refuse(folder, key, old.get(key), new.get(key))
    seeds = list(dict.fromkeys([*before["compare"]["seeds"], *now["compare"]["seeds"]]))
    return {**now, "compare": {**now["compare"], "methods": {**methods[0], **methods[1]}, "seeds": seeds}}


def _refuse(folder: Path, key: str, was: Any, now: Any) -> None:
    what = "its budget was another" if key in ("compare.completions", "compare.seconds") else "its settings were others"
    raise ConfigError(
        f"{folder} holds a comparison, and {what}: {key} was {setting_text(was)} and is {setting_text(now)}. Methods "
        "and seeds may come in, all else stays: choose another folder (--out), or set that back"
    )
