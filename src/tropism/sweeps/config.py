"""What a sweep tries: its settings, the values of each dotted key of the recipe, and how both are read from YAML."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.foreign.trust import refuse_trust
from tropism.redaction import find_secret
from tropism.safe_yaml import read_yaml
from tropism.schema import build

Strategy = Literal["uniform", "loguniform", "quniform", "int", "logint", "randint", "lograndint", "choice", "grid"]

LISTED = ("choice", "grid")
"""Strategies whose values are the ones to try; those of the others are ends of a range."""
WHOLE = ("int", "logint", "randint", "lograndint")
LOGARITHMIC = ("loguniform", "logint", "lograndint")
MOST_CELLS = 10_000
"""Cells of a grid."""
_KEY = re.compile(r"[^\s.=]+(\.[^\s.=]+)*")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The values to try of one dotted key."""

    strategy: Strategy
    """How they are drawn."""
    values: tuple[Any, ...]
    """The ends [low, high] of a range, with the step behind them for `quniform`; or the values themselves."""

    def __post_init__(self) -> None:
        if self.strategy in LISTED:
            self._check_list()
        else:
            self._check_range()

    def _check_list(self) -> None:
        if not self.values:
            raise ConfigError(f"{self.strategy} needs at least one value")
        labels = self.labels
        twice = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
        if twice is not None:
            raise ConfigError(f"{twice!r} stands among the values twice (a number and its text count as the same)")

    def _check_range(self) -> None:
        wanted = 3 if self.strategy == "quniform" else 2
        form = "[low, high, step]" if wanted == 3 else "[low, high]"
        if len(self.values) != wanted:
            raise ConfigError(f"{self.strategy} takes values: {form}, not {len(self.values)} of them")
        for value in self.values:
            whole = isinstance(value, int) and not isinstance(value, bool)
            number = whole or (isinstance(value, float) and math.isfinite(value))
            if not (whole if self.strategy in WHOLE else number):
                kind = "whole numbers" if self.strategy in WHOLE else "numbers"
                raise ConfigError(f"{self.strategy} takes {kind}, not {value!r:.60}; 1e-5 and 0.5 are numbers")
        low, high = self.ends
        if not low < high:
            raise ConfigError(f"{self.strategy}: low {low} must be below high {high}; for one value use choice")
        if self.strategy in LOGARITHMIC and not low > 0:
            raise ConfigError(f"{self.strategy}: low {low} must be above 0, as its logarithm is drawn")
        if self.strategy == "quniform":
            self._check_step(low, high)

    def _check_step(self, low: float, high: float) -> None:
        step = self.values[2]
        if not step > 0:
            raise ConfigError(f"quniform: the step {step} must be above 0")
        steps = (high - low) / step
        if abs(steps - round(steps)) > 1e-6:
            raise ConfigError(f"quniform: steps of {step} from {low} do not end at {high}; choose one that they meet")

    @property
    def ends(self) -> tuple[Any, Any]:
        """The smallest and the largest value of a range, both inclusive."""
        low, high = self.values[:2]
        # The source's randint leaves out its high end.
        return (low, high - 1) if self.strategy in ("randint", "lograndint") else (low, high)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the study calls each of the listed values: text as it is, all else as JSON."""
        return tuple(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in self.values
        )

    @property
    def cells(self) -> tuple[Any, ...] | None:
        """Every value there is; None where there are too many to list."""
        if self.strategy in LISTED:
            return self.values
        low, high = self.ends
        if self.strategy in WHOLE:
            return tuple(range(low, high + 1)) if high - low < MOST_CELLS else None
        if self.strategy == "quniform":
            count = round((high - low) / self.values[2]) + 1
            # Without the last bits, in which multiples of 0.1 differ from what a person would write.
            return tuple(float(f"{low + index * self.values[2]:.12g}") for index in range(min(count, MOST_CELLS)))
        return None

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that are tried on the recipe before anything is trained: all of a list, the ends of a range."""
        return self.values if self.strategy in LISTED else self.ends


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How Ray Tune places the trials of a sweep."""

    address: str | None = None
    """Of a cluster that is running, or auto; None starts Ray on this machine alone."""
    cpus: float = 1.0
    """CPU cores of each trial."""
    gpus: float = 0.0
    """GPUs of each trial."""
    parallel: int | None = None
    """Most trials at a time; None: as many as there is room for."""

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise ConfigError("cpus and gpus must not be negative, and not both 0")
        if self.parallel is not None and self.parallel < 1:
            raise ConfigError("parallel must be at least 1, or null for as many as there is room for")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: what is tried, and what counts as better."""

    metric: str
    """Any number of metrics.jsonl or timings.jsonl, such as eval/reward."""
    parameters: Mapping[str, Parameter]
    """Dotted key of the recipe -> the values to try."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of the metric is better."""
    take: Literal["last", "best"] = "last"
    """Which value of a run counts: the last, or the best after its first step."""
    trials: int | None = None
    """Settings to try in all; None: every cell of the grid where there is one, otherwise 20."""
    seeds: int = 1
    """Runs of each setting, with the recipe's seed and those after it; their mean counts."""
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe"
    """What chooses the next setting."""
    pruner: Literal["none", "median"] = "none"
    """What stops a run that is behind: `median`, one that is below the median of the earlier runs at the same step."""
    prune_after: int = 0
    """Steps before which nothing is stopped."""
    seed: int = 0
    """The choice of settings follows from it."""
    backend: Literal["local", "ray"] = "local"
    """Where trials run: one after the other here, or wherever Ray Tune finds room."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Only for `backend: ray`."""

    def __post_init__(self) -> None:
        if not self.metric.strip():
            raise ConfigError("metric is empty; name one such as eval/reward")
        if not self.parameters:
            raise ConfigError("parameters: name at least one dotted key of the recipe, with strategy and values")
        for name, low in (("trials", 1), ("seeds", 1), ("prune_after", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, not {value}")
        for key, parameter in self.parameters.items():
            self._check_key(key, parameter)
        self._check_sampler()
        if self.backend == "ray" and self.pruner != "none":
            raise ConfigError("pruner: trials that Ray runs are not watched step by step; set pruner: none")

    def _check_key(self, key: str, parameter: Parameter) -> None:
        where = f"parameters.{key}"
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{where}: a dotted key has names between its dots, and no spaces or equals signs")
        if key == "run":
            raise ConfigError(f"{where}: every trial has a run folder of its own; choose the sweep's with --out")
        if key == "seed" and self.seeds > 1:
            raise ConfigError(f"{where}: with seeds: {self.seeds} each setting runs with several seeds already")
        if key == "model.trust_remote_code":
            raise ConfigError(f"{where}: a file cannot allow a model's code to run; only the command line can")
        for value in parameter.values if key == "model" else ():
            refuse_trust({"model": value}, where)

    def _check_sampler(self) -> None:
        if self.sampler == "grid":
            endless = next((key for key, parameter in self.parameters.items() if parameter.cells is None), None)
            if endless is not None:
                raise ConfigError(
                    f"parameters.{endless}: a grid needs values that can be listed; use grid, choice, int or quniform, "
                    "or another sampler"
                )
        if math.prod(len(cells) for _, cells in self.gridded) > MOST_CELLS:
            raise ConfigError(f"the grid has more than {MOST_CELLS:,} cells; use sampler: random or fewer values")
        ranges = [key for key, parameter in self.parameters.items() if parameter.strategy not in LISTED]
        if self.sampler == "cmaes" and len(ranges) < 2:
            raise ConfigError("sampler: cmaes needs two ranges of numbers or more among the parameters; use tpe")

    @property
    def gridded(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The keys whose values are gone through one by one, in the order of the file."""
        return [
            (key, parameter.cells or ())
            for key, parameter in self.parameters.items()
            if self.sampler == "grid" or parameter.strategy == "grid"
        ]

    @property
    def grid(self) -> list[dict[str, Any]]:
        """The cells of the grid; one that is empty where nothing is gridded."""
        keys = [key for key, _ in self.gridded]
        return [dict(zip(keys, cell, strict=True)) for cell in itertools.product(*(c for _, c in self.gridded))]

    @property
    def total(self) -> int:
        """Settings to try in all."""
        if self.trials is not None:
            return self.trials
        return len(self.grid) if self.gridded else 20


# ---- reading ---------------------------------------------------------------------------------------------------------

_SOURCE_NAMES = {"metric": "metric", "mode": "mode", "num_samples": "trials"}
_SOURCE_SAMPLERS = {"random": "random", None: "tpe"}
_SOURCE_PRUNERS = {"fifo": "none", None: "none"}


def sweep_from_file(path: str | Path) -> SweepConfig:
    """A sweep from a YAML file.

    Raises:
        ConfigError: as ``sweep_from_mapping`` does, with the file's name.
    """
    return sweep_from_mapping(read_yaml(path), str(path))


def sweep_from_mapping(mapping: Mapping[str, Any], where: str) -> SweepConfig:
    """A sweep from plain values; the form of trlX, with ``tune_config`` and parameters beside it, is read, too.

    Raises:
        ConfigError: an unknown field (the closest is named), a value that cannot be, or a secret; ``where`` is named.
    """
    found = find_secret(dict(mapping))
    if found is not None:
        raise ConfigError(f"{where}: {found[0]} looks like {found[1]}. Sweeps are written into folders: take it out")
    settings = {key: value for key, value in mapping.items() if not _is_parameter(value)}
    beside = {key: value for key, value in mapping.items() if _is_parameter(value)}
    try:
        tune = settings.pop("tune_config", None)
        for key, value in ({} if tune is None else _translated(tune)).items():
            if key in settings:
                raise ConfigError(f"{key}: given in tune_config and beside it; keep one of the two")
            settings[key] = value
        listed = settings.get("parameters")
        if listed is not None and not isinstance(listed, Mapping):
            raise ConfigError("parameters: expected a mapping of dotted keys, each with strategy and values")
        twice = next((key for key in beside if key in (listed or {})), None)
        if twice is not None:
            raise ConfigError(f"{twice}: given under parameters and beside them; keep one of the two")
        if beside or listed is not None:
            settings["parameters"] = {**(listed or {}), **beside}
        bare = next((key for key in settings if "." in key), None)
        if bare is not None:
            raise ConfigError(f"{bare}: a key of the recipe needs a mapping of strategy and values")
        return build(SweepConfig, settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('the settings: ')}") from error


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Mapping) and ("strategy" in value or "values" in value)


def _translated(tune: Any) -> dict[str, Any]:
    """The source's ``tune_config`` in this library's names."""
    if not isinstance(tune, Mapping):
        raise ConfigError("tune_config: expected a mapping with metric, mode, search_alg, scheduler and num_samples")
    settings: dict[str, Any] = {}
    for key, value in tune.items():
        if key in _SOURCE_NAMES:
            settings[_SOURCE_NAMES[key]] = value
        elif key == "search_alg":
            if value not in _SOURCE_SAMPLERS:
                raise ConfigError(f"tune_config.search_alg: {value!r} is not offered; set sampler: tpe, or cmaes")
            settings["sampler"] = _SOURCE_SAMPLERS[value]
        elif key == "scheduler":
            if value not in _SOURCE_PRUNERS:
                raise ConfigError(f"tune_config.scheduler: {value!r} is not offered; set fifo here, or pruner: median")
            settings["pruner"] = _SOURCE_PRUNERS[value]
        else:
            names = ", ".join([*_SOURCE_NAMES, "search_alg", "scheduler"])
            raise ConfigError(f"tune_config.{key}: unknown key (valid: {names})")
    return settings
