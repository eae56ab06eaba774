"""Sweeps of runs that are not trained: their metric is a known function of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tropism.safe_yaml import parse_yaml
from tropism.sweeps.config import SweepConfig, sweep_from_mapping
from tropism.sweeps.work import Ended, Job, Watch

RATES = {"strategy": "loguniform", "values": [1e-5, 1e-1]}


def make_config(**settings: Any) -> SweepConfig:
    """A sweep over the learning rate, changed by ``settings``."""
    defaults = {"metric": "eval/reward", "trials": 5, "parameters": {"trainer.learning_rate": RATES}}
    return sweep_from_mapping({**defaults, **settings}, "sweep.yaml")


class Runs:
    """In the place of training: the metric is highest at a learning rate of 1e-3; notes what it was asked for."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.recipes: list[dict[str, Any]] = []
        self.before: Callable[[int], None] = lambda count: None
        """Called with the number of runs before each run; may raise."""
        self.course: Callable[[float], list[float]] = lambda value: [value]
        """The metric at steps 1, 2, ... of a run that ends with ``value``."""

    def __call__(self, job: Job, watch: Watch | None) -> Ended:
        self.before(len(self.jobs))
        recipe = parse_yaml(job.recipe, "job")
        self.jobs.append(job)
        self.recipes.append(recipe)
        value = 1 - abs(math.log10(recipe["trainer"]["learning_rate"]) + 3) + 0.001 * (recipe["seed"] - 10)
        for step, seen in enumerate(self.course(value), start=1):
            if watch is not None and watch(step, seen):
                return Ended(stopped=True, seconds=1.0)
        return Ended(value=value, interval=(value - 0.1, value + 0.1), seconds=1.0)
