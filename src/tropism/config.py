"""The recipe: everything about a run, as one composition of the configurations that live beside their owners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tropism.algorithms import ALGORITHMS, AlgorithmConfig
from tropism.data.config import DataConfig
from tropism.errors import ConfigError
from tropism.models.loading import ModelConfig
from tropism.models.lora import LoRA
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.schema import build, dump_yaml, read_yaml, to_plain
from tropism.training.config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run in full. From Python, ``model`` and ``data`` may also be objects (a loaded model, lists, data sets)."""

    model: Any
    """Hub id, folder, .gguf file, "demo", or the fields of ModelConfig."""
    algorithm: AlgorithmConfig
    """The method: its name, or its name and fields (and a preset)."""
    data: Any
    """File, folder, hub id, or the fields of DataConfig: prompts, or demonstrations for sft."""
    eval_data: Any = None
    """Held-out data in the same forms; None: the eval_fraction of data, if that is set."""
    reward: RewardConfig | None = None
    """What is rewarded: a name, or terms with weights."""
    run: str | None = None
    """Run folder; None: runs/<method>-<number>."""
    total_steps: int = 100
    """Collects for methods that sample, optimizer updates for sft."""
    prompts_per_step: int = 16
    """Prompts per collect (each is answered group_size times), or demonstrations per update."""
    seed: int = 0
    """All randomness follows from it."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are sampled, in training and evaluation."""
    lora: LoRA | None = None
    """Train an adapter; None trains the model's own weights."""
    train_layers: int | None = None
    """Train only that many of the last transformer blocks, the final norm, and the output embedding where it is not
    tied to the input embedding; None trains all weights. Not together with lora."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Optimizer, precision, evaluation, checkpoints, tracking."""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError("total_steps must be at least 1")
        if self.prompts_per_step < 1:
            raise ConfigError("prompts_per_step must be at least 1")
        if self.train_layers is not None and self.train_layers < 1:
            raise ConfigError(
                f"train_layers is {self.train_layers}; it must be at least 1 (leave it out to train all weights)"
            )
        if self.train_layers is not None and self.lora is not None:
            raise ConfigError(
                "lora and train_layers cannot go together: lora trains an adapter, train_layers some of the model's "
                "own weights. Leave one of them out"
            )
        if self.algorithm.on_policy and self.reward is None:
            raise ConfigError(
                f"{self.algorithm.name} needs a reward: a registered name such as vader, a callable, or named terms"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values, strictly checked.

        Raises:
            ConfigError: names the field by its dotted path, and the closest valid one where it is unknown.
        """
        values = dict(mapping)
        if "algorithm" not in values:
            raise ConfigError(f"algorithm: required, one of {', '.join(ALGORITHMS)}")
        values["algorithm"] = algorithm_from(values["algorithm"])
        if values.get("reward") is not None:
            values["reward"] = RewardConfig.of(values["reward"])
        if isinstance(values.get("model"), Mapping):
            values["model"] = build(ModelConfig, values["model"], path="model")
        for name in ("data", "eval_data"):
            if isinstance(values.get(name), Mapping):
                values[name] = build(DataConfig, values[name], path=name)
        return build(cls, values)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file; relative paths in it are relative to the working directory."""
        return cls.from_mapping(read_yaml(path))

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included. Objects given from Python are described, not stored."""
        plain: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, AlgorithmConfig):
                plain[f.name] = {"name": value.name, **to_plain(value)}
            elif f.name in ("model", "data", "eval_data") and not isinstance(value, (str, type(None), *_CONFIGS)):
                plain[f.name] = _describe(value)
            else:
                plain[f.name] = to_plain(value)
        return dump_yaml(plain)


_CONFIGS = (ModelConfig, DataConfig)


def algorithm_from(value: Any) -> AlgorithmConfig:
    """A method from its name, or from ``{name, preset, field: value, ...}``.

    Raises:
        ConfigError: unknown name (the closest is named), preset or field.
    """
    if isinstance(value, AlgorithmConfig):
        return value
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError("algorithm: give a method's name, or a mapping with name and the method's fields")
    rest = {key: entry for key, entry in given.items() if key not in ("name", "preset")}
    method = method_named(given["name"])
    if given.get("preset") is None:
        return build(method, rest, path="algorithm")
    base = method.preset(str(given["preset"]))
    return build(method, {**to_plain(base), **rest}, path="algorithm")


def method_named(name: Any) -> type[AlgorithmConfig]:
    """The configuration class of a method."""
    if name not in ALGORITHMS:
        from difflib import get_close_matches

        close = get_close_matches(str(name), ALGORITHMS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"algorithm: there is no method {name!r}; {hint}The methods are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def _describe(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size} given from Python>"
