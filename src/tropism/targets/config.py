"""How a model is told which reward to reach. Imports no torch: the command line reads the docstrings here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tropism.errors import ConfigError

Mechanism = Literal["linear", "add", "replace", "token", "text"]
ScalerName = Literal["standard", "min_max", "quantile", "standard_times_1000", "times_1000", "none"]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """How targets reach the model."""

    mechanism: Mechanism = "linear"
    """linear: a slot before the text whose embedding is a learned linear map of the target. add, replace: a slot whose
    embedding is a token's plus, or is, the target times a fixed direction. token: a learned control token per quantile
    of the rewards. text: the number written before the prompt."""
    targets: tuple[str, ...] = ("reward",)
    """Names of the rewards that can be asked for; each takes one slot, in this order."""
    scaler: ScalerName = "standard"
    """What the slots of linear, add and replace hold of a reward: standard (mean 0, deviation 1), min_max (0 to 1),
    quantile (the share of training rewards below it), a thousand times the standard or the plain one, or none."""
    bins: int = 10
    """Control tokens per reward, for the mechanism token."""
    direction: Literal["random", "ones"] = "random"
    """Of add and replace: a fixed random direction of the length of a token's embedding, or 1 in every dimension, as
    the original has it, which models with LayerNorm cannot see."""

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            raise ConfigError(f"mechanism is {self.mechanism!r}; choose one of {', '.join(get_args(Mechanism))}")
        if self.scaler not in get_args(ScalerName):
            raise ConfigError(f"scaler is {self.scaler!r}; choose one of {', '.join(get_args(ScalerName))}")
        if isinstance(self.targets, str):
            raise ConfigError(f"targets is the text {self.targets!r}; give a list of names: [{self.targets}]")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or not all(isinstance(name, str) and name.strip() for name in self.targets):
            raise ConfigError("targets must name at least one reward, none of them empty")
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets names a reward twice: {', '.join(self.targets)}")
        if self.bins < 2:
            raise ConfigError("bins must be at least 2")
        if self.direction not in ("random", "ones"):
            raise ConfigError(f"direction is {self.direction!r}; choose random or ones")

    @property
    def used(self) -> tuple[str, ...]:
        """The fields that this mechanism depends on."""
        always = ("mechanism", "targets")
        return {
            "linear": (*always, "scaler"),
            "add": (*always, "scaler", "direction"),
            "replace": (*always, "scaler", "direction"),
            "token": (*always, "bins"),
            "text": always,
        }[self.mechanism]
