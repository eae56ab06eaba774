"""Resuming with a changed recipe: what differs, field by field, and what of it the same run can go on with.

A resumed run is the uninterrupted one bit for bit, so every field that weights, samples, rewards or their rounding
depend on stays as it was. A field that is named nowhere here is such a field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.commands.recipe_arguments import was_given_from_python
from tropism.config import Recipe, method_named
from tropism.data.config import DataConfig
from tropism.errors import ConfigError, TropismError
from tropism.models.loading import ModelConfig
from tropism.redaction import redact
from tropism.safe_yaml import parse_yaml, read_yaml
from tropism.schema import to_plain
from tropism.training.checkpoint import Checkpoint

SILENT = frozenset({"run", "model.trust_remote_code"})
"""Fields that may differ without a word: where the run folder is now, and a permission, which no recipe may keep."""

PLACES = frozenset(
    {"model.name", "model.revision", "data.path", "data.revision", "eval_data.path", "eval_data.revision"}
)
"""Fields that say where something is. They may change, since fingerprints tell whether the same is still there."""

FREE = frozenset(
    {
        "trainer.checkpoints.every",
        "trainer.checkpoints.keep",
        "trainer.checkpoints.use_best",
        "trainer.preflight",
        "trainer.progress",
        "trainer.tracking",
    }
)
"""Fields that no update depends on."""

HOW_REWARDS_ARE_CALLED = re.compile(
    r"(reward|trainer\.evaluation\.gold)\.(timeout|terms\.((?!\.args\.).)+\.(timeout|retries|concurrency|cache))"
)
"""Fields that say how a reward function is called, not what it answers; its own arguments may have the same names."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One field that is not what it was."""

    path: str
    """Dotted, as on the command line."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is, as far as it decides what may still change."""

    steps: int
    """Whole steps that are done."""
    begun: int
    """The same with the step in progress, if there is one."""
    total_steps_read: bool
    """Whether the method has asked for ``total_steps`` so far."""
    held_out: bool
    """Whether something is held out for evaluation."""
    same_device: bool
    """Whether the run computes on the kind of device that it began on."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, same_device: bool) -> Standing:
        """Of a run that goes on from a checkpoint."""
        steps, identity = int(checkpoint.state["counts"]["steps"]), checkpoint.state.get("identity", {})
        return cls(
            steps=steps,
            begun=steps + checkpoint.collecting,
            total_steps_read=bool(identity.get("total_steps_read")),
            held_out=bool(identity.get("held_out")),
            same_device=same_device,
        )


def changed_fields(folder: Path, recipe: Recipe, standing: Standing) -> list[Change]:
    """What differs between the recipe of a run folder and the one it is resumed with; all of it is allowed.

    Raises:
        ConfigError: ``recipe.yaml`` is damaged, or the same run cannot go on with what differs. Every field that
            cannot change is named with its old and new value, and why where it depends on more than the field.
    """
    old, new = saved_fields(folder, recipe), fields_of(recipe)
    changes = [change for change in _differences(old, new) if change.path not in SILENT]
    refused = [(change, reason) for change in changes if (reason := _refusal(change, old, new, standing)) is not None]
    if refused:
        lines = [f"  {change}" + (f" ({reason})" if reason else "") for change, reason in refused]
        raise ConfigError(
            f"{folder} cannot go on with another recipe:\n" + "\n".join(lines) + "\n"
            "What the run has done depends on the old values, so it would be neither the old run nor a new one. Resume "
            "it without these changes, or start a new run (run: another folder) from the model of this one (model: "
            f"{folder / 'model'}, which is written when a run ends)"
        )
    return changes


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe as its file holds it, with model and data as mappings where they are not objects of Python."""
    mapping: dict[str, Any] = parse_yaml(redact(recipe.to_yaml()), "the recipe")
    sections: dict[str, Callable[[str], Any]] = {
        "model": lambda name: ModelConfig(name=name),
        "data": lambda path: DataConfig(path=path),
        "eval_data": lambda path: DataConfig(path=path),
    }
    for name, config in sections.items():
        value = mapping[name]
        if isinstance(value, str) and not was_given_from_python(value):
            mapping[name] = to_plain(config(value))
    return mapping


def saved_fields(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """``fields_of`` the recipe in a run folder.

    Args:
        recipe: the one to resume with; a method that has no registered name is read as this one's.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = folder / "recipe.yaml"
    try:
        mapping = read_yaml(path)
        if isinstance(mapping.get("model"), dict):
            mapping["model"].pop("trust_remote_code", None)
        method = mapping.get("algorithm")
        known = not isinstance(method, Mapping) or _is_registered(method.get("name"))
        plain = fields_of(Recipe.from_mapping(mapping if known else {**mapping, "algorithm": recipe.algorithm}))
        lacking = [field for field in _lacking(mapping, plain) if field not in SILENT]
        if lacking and known:
            raise ConfigError(f"it lacks {', '.join(lacking[:3])}, as if it were cut off or of another version")
    except TropismError as error:
        raise ConfigError(
            f"the run in {folder} cannot be resumed, because its recipe cannot be read: {error}. {path} is written by "
            "the run and never changed by hand: put back what it held"
        ) from error
    return plain if known else {**plain, "algorithm": method}


def _lacking(written: Mapping[str, Any], whole: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted paths of what a written recipe should hold, since it holds every field, and does not."""
    found: list[str] = []
    for key, value in whole.items():
        place = f"{path}.{key}" if path else key
        if key not in written:
            found.append(place)
        elif isinstance(value, Mapping) and isinstance(written[key], Mapping):
            found += _lacking(written[key], value, place)
    return found


def flat_settings(value: Any, path: str = "") -> dict[str, Any]:
    """Plain settings by their dotted keys; an empty section counts as a value.

    Args:
        path: dotted key of ``value`` itself.
    """
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= flat_settings(entry, f"{path}.{key}" if path else str(key))
    return flat


def setting_text(value: Any) -> str:
    """A setting as messages show it, in 120 characters at most."""
    text = "not given" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _is_registered(method: Any) -> bool:
    try:
        method_named(method)
    except ConfigError:
        return False
    return True


def _differences(old: Any, new: Any, path: str = "") -> list[Change]:
    """Changes of the leaves; a section that is there on one side only, or another method, is one change."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [Change(path=path, old=old, new=new)]
    if path == "algorithm" and old.get("name") != new.get("name"):
        return [Change(path=path, old=old.get("name"), new=new.get("name"))]
    found: list[Change] = []
    for key in dict.fromkeys((*old, *new)):
        found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    return found


# ---- may it change? --------------------------------------------------------------------------------------------------


def _refusal(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    """None where the change is allowed, else why not; empty where the field says it all."""
    if change.path in FREE | PLACES or HOW_REWARDS_ARE_CALLED.fullmatch(change.path):
        return None
    if change.path in ("model", "data", "eval_data"):
        from_python = was_given_from_python(change.old) or was_given_from_python(change.new)
        return None if from_python and None not in (change.old, change.new) else ""
    if change.path in _CONDITIONS:
        return _CONDITIONS[change.path](change, old, new, standing)
    if change.path.startswith("metrics."):
        return _what_is_measured(change, old, new, standing)
    return ""


def _total_steps(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    if change.new < standing.begun:
        doing = " and has begun another" if standing.begun > standing.steps else ""
        return f"the run has done {standing.steps} steps{doing}"
    schedule = old["trainer"]["schedule"]
    if schedule != "constant":
        return f"the {schedule} schedule of the learning rate depends on the total"
    if standing.total_steps_read:
        return "the method depends on the total"
    every = old["trainer"]["evaluation"]["every"]
    extra = standing.steps == change.old and standing.held_out and (every is None or change.old % every != 0)
    if extra and _evaluation_matters(new):
        return (
            f"the evaluation after step {change.old}, the last one then, is none of the longer run's, and use_best and "
            "patience would count it"
        )
    return None


def _evaluation_every(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    if standing.held_out and (_evaluation_matters(old) or _evaluation_matters(new)):
        return "use_best and patience depend on when the run is evaluated"
    return None


def _what_is_measured(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    """A metric of the user, or another way to sample held-out completions: refused where the best is judged by it."""
    metric = str(new["trainer"]["checkpoints"]["best_metric"])
    name = change.path.split(".")[1]
    judged = "@" in metric if name == "evaluation" else metric.partition("@")[0] == f"eval/{name}"
    return f"the best weights are those with the best {metric}" if judged else None


def _patience(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    longer = change.new is None or (change.old is not None and change.new > change.old)
    return None if longer else "the run might have ended already"


def _device(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    return None if standing.same_device else "devices round differently"


def _on_error(change: Change, old: Mapping[str, Any], new: Mapping[str, Any], standing: Standing) -> str | None:
    return None if change.old == "raise" else "completions may have been skipped already"


def _evaluation_matters(fields: Mapping[str, Any]) -> bool:
    checkpoints = fields["trainer"]["checkpoints"]
    return bool(checkpoints["use_best"]) or checkpoints["patience"] is not None


_CONDITIONS: dict[str, Callable[[Change, Mapping[str, Any], Mapping[str, Any], Standing], str | None]] = {
    "total_steps": _total_steps,
    "trainer.evaluation.every": _evaluation_every,
    "trainer.evaluation.sampling": _what_is_measured,
    "trainer.checkpoints.patience": _patience,
    "model.device": _device,
    "reward.on_error": _on_error,
}
"""Fields that may change under a condition."""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
