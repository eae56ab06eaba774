"""CMA-ES as a sampler of the study, whose state is the history of trials.

Optuna's own keeps its state as a pickle in the study, and reading a sweep of others would run what is in it. This one
tells the history to a new optimizer before every trial: some milliseconds for hundreds of trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

FIRST_SIGMA = 1 / 4
"""Standard deviation of the first generation, as a share of each range."""


class EvolutionSampler(BaseSampler):
    """CMA-ES (https://arxiv.org/abs/1604.00772) over the ranges; listed values are drawn uniformly.

    Args:
        ranges: the numbers it optimizes, at least two.
        seed: of this trial.
    """

    def __init__(self, ranges: Mapping[str, BaseDistribution], *, seed: int) -> None:
        self.ranges, self.seed = dict(ranges), seed
        self._others = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.ranges

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        count = len(search_space)
        optimizer = CMA(
            mean=np.full(count, 0.5), sigma=FIRST_SIGMA, bounds=np.tile([0.0, 1.0], (count, 1)), seed=self.seed
        )
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        done = [one for one in study.get_trials(deepcopy=False) if one.state == TrialState.COMPLETE]
        size = optimizer.population_size
        for begin in range(0, len(done) - size + 1, size):
            told = [(self._place(one.params), sign * (one.value or 0.0)) for one in done[begin : begin + size]]
            optimizer.tell(told)
        place = optimizer.ask()
        return {key: _value(kind, share) for (key, kind), share in zip(search_space.items(), place, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def _place(self, params: Mapping[str, Any]) -> NDArray[np.float64]:
        """[ranges] values as shares of their ranges."""
        return np.array([_share(kind, params[key]) for key, kind in self.ranges.items()])


def _ends(kind: BaseDistribution) -> tuple[float, float]:
    """Ends of a range as it is drawn from; half a unit beyond for whole numbers, so that all get equal room."""
    assert isinstance(kind, FloatDistribution | IntDistribution)
    margin = 0.5 if isinstance(kind, IntDistribution) else 0.0
    low, high = kind.low - margin, kind.high + margin
    return (math.log(low), math.log(high)) if kind.log else (low, high)


def _share(kind: BaseDistribution, value: float) -> float:
    assert isinstance(kind, FloatDistribution | IntDistribution)
    low, high = _ends(kind)
    return ((math.log(value) if kind.log else value) - low) / (high - low)


def _value(kind: BaseDistribution, share: float) -> float:
    assert isinstance(kind, FloatDistribution | IntDistribution)
    low, high = _ends(kind)
    number = low + float(share) * (high - low)
    number = math.exp(number) if kind.log else number
    if isinstance(kind, IntDistribution):
        return min(kind.high, max(kind.low, round(number)))
    if kind.step is not None:
        number = kind.low + round((number - kind.low) / kind.step) * kind.step
    return min(kind.high, max(kind.low, number))
