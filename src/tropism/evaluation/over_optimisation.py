"""Is the reward being gamed? Training reward against an independent gold reward along a run, and where they part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tropism.errors import ConfigError, DataError
from tropism.evaluation.number_texts import change_text
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.evaluation.statistics import Interval, bootstrap_interval, paired_difference
from tropism.evaluation.student import student_quantile
from tropism.safe_yaml import parse_yaml

Floats = NDArray[np.float64]
Verdict = Literal["parted", "fell", "not parted", "too few"]

GOLD = "gold"
"""The name of the gold reward among the metrics of an evaluation."""
LEVEL = 0.05
"""Probability of claiming a fall of a gold reward that never fell, over all comparisons of a run."""
FEWEST_PROMPTS = 10
"""With fewer prompts nothing is claimed: Student's quantiles far out presume means that are nearly normal."""


@dataclass(frozen=True, kw_only=True)
class OverOptimisation:
    """Training reward and gold reward of the same held-out completions, along training."""

    steps: tuple[int, ...]
    """[K] steps of the evaluations that have both."""
    proxy: tuple[Interval, ...]
    """[K] mean training reward, with its interval over prompts."""
    gold: tuple[Interval, ...]
    """[K] mean gold reward, with its interval over prompts."""
    spread: tuple[float, float]
    """Standard deviation of training and gold reward over all completions: what one unit of each is worth."""
    prompts: int
    """Held-out prompts."""
    best: int
    """The step with the highest mean gold reward, among those with enough scored prompts."""
    verdict: Verdict
    """``parted``: the gold reward fell while the training reward rose. ``fell``: it fell, and the training reward did
    not rise. ``not parted``: no fall is shown. ``too few``: prompts or evaluations to say."""
    parted: int | None
    """The last step before they parted; None unless the verdict is ``parted``."""
    fall: Interval | None
    """Gold reward at the last step less that at ``best``, over the same prompts (an interval of its own, for reading:
    the verdict has a stricter bound)."""
    rise: Interval | None
    """Training reward at the last step less that at ``best``."""
    comparisons: int
    """Pairs of evaluations that the verdict accounts for."""

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        last = self.steps[-1]
        if self.verdict == "too few":
            least = f"at least {FEWEST_PROMPTS} held-out prompts and two evaluations with both rewards"
            return f"Whether training and gold reward part cannot be said: that takes {least}."
        if self.verdict == "not parted":
            return (
                f"No parting of training and gold reward is seen up to step {last}: the gold reward is not "
                f"significantly below its best (step {self.best})."
            )
        fall = f"the gold reward changed by {change_text(self.fall)} from step {self.best} to step {last}"
        if self.verdict == "fell":
            return f"The run lost gold reward without a gain: {fall}, and the training reward did not rise meanwhile."
        return (
            f"Training and gold reward part after step {self.parted}: {fall}, while the training reward changed "
            f"by {change_text(self.rise)}. The gold reward does not agree with what was gained since."
        )


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The verdict on a run, and the places of the evaluations that it rests on."""

    verdict: Verdict
    best: int
    """Place of the evaluation with the highest mean gold reward, among those with enough scored prompts."""
    last_before: int | None
    """Place of the last evaluation before the rewards part; None unless they do."""
    comparisons: int


def parting(proxies: Sequence[Floats], golds: Sequence[Floats], *, planned: int | None = None) -> Parting:
    """Where a training reward parts from a gold reward.

    With g(s) the gold reward and p(s) the training (proxy) reward of the held-out prompts at evaluation s, and z the
    last evaluation:

    - the best step b has the highest mean of g, among the evaluations whose g and that of z share at least
      FEWEST_PROMPTS scored prompts;
    - g(s) is *significantly below its best* where s > b and the mean of g(s) - g(b) over prompts is below
      -q sd / sqrt(n), q the upper LEVEL / m quantile of Student's distribution with n - 1 degrees of freedom, m =
      K (K - 1) / 2 the number of pairs of the K evaluations. A paired test over prompts, by Bonferroni for all pairs:
      so it also holds although b was chosen as the best, and however often one looks while the run goes on;
    - the proxy *goes on rising* where the 95 % interval of the mean of p(z) - p(b) over prompts lies above 0;
    - the two **part** where g(z) is significantly below its best while the proxy goes on rising, and the step where
      they part is the last one from b on at which g is not significantly below its best.

    Where no gold reward ever falls, a parting is claimed in at most 5 % of runs. The idea (a proxy that goes on rising
    while a gold reward falls) is that of Gao, Schulman and Hilton 2023, https://arxiv.org/abs/2210.10760, who fit a
    curve over many runs; a single run is tested here.

    Args:
        proxies: [K] training rewards [N] of the same prompts, NaN where unscored. golds: the same of the gold reward.
        planned: evaluations that the run will have in all, where it is still in progress; the bound is that of its end
            then, so that looking early costs nothing. None: those that there are.
    """
    scored = np.isfinite(np.stack(golds))
    shared = (scored & scored[-1]).sum(axis=1)
    # The mean over few scored prompts is high by chance, and nothing can be claimed against it.
    usable = [place for place in range(len(golds)) if shared[place] >= FEWEST_PROMPTS] or range(len(golds))
    best = max(usable, key=lambda place: float(np.nanmean(golds[place])))
    looks = max(len(golds), planned or 0)
    comparisons = looks * (looks - 1) // 2
    if len(golds) < 2 or shared[best] < FEWEST_PROMPTS:
        return Parting(verdict="too few", best=best, last_before=None, comparisons=comparisons)
    below = [place > best and _is_below(golds[best], golds[place], comparisons) for place in range(len(golds))]
    if not below[-1]:
        return Parting(verdict="not parted", best=best, last_before=None, comparisons=comparisons)
    rise = _paired(proxies[best], proxies[-1])
    if rise is None or not rise.known or rise.low <= 0:
        return Parting(verdict="fell", best=best, last_before=None, comparisons=comparisons)
    last_before = max(place for place in range(best, len(golds)) if not below[place])
    return Parting(verdict="parted", best=best, last_before=last_before, comparisons=comparisons)


def over_optimisation(run: RunData, *, planned: int | None = None) -> OverOptimisation | None:
    """Where the training reward of a run parts from its gold reward; None where it has no such two rewards.

    Args:
        planned: as of ``parting``, which says what parting means.

    Raises:
        DataError: two evaluations hold different prompts.
    """
    usable = _usable(run)
    if not usable:
        return None
    proxies, golds = _rewards(usable)
    steps = tuple(one.step for one in usable)
    found = parting(proxies, golds, planned=planned)
    best, later = found.best, found.best < len(steps) - 1
    return OverOptimisation(
        steps=steps,
        proxy=tuple(bootstrap_interval(values, resamples=2000) for values in proxies),
        gold=tuple(bootstrap_interval(values, resamples=2000) for values in golds),
        spread=(_spread(proxies), _spread(golds)),
        prompts=len(usable[0]),
        best=steps[best],
        verdict=found.verdict,
        parted=None if found.last_before is None else steps[found.last_before],
        fall=_paired(golds[best], golds[-1]) if later else None,
        rise=_paired(proxies[best], proxies[-1]) if later else None,
        comparisons=found.comparisons,
    )


class StopAdvice:
    """What to warn of after an evaluation: that the rewards have parted, where they had not one evaluation earlier.

    Advice ends no run: where evaluations cannot be read or compared it is silent but for one sentence that says so.

    Args:
        folder: of the run.
        planned: evaluations that it will have in all.
    """

    def __init__(self, folder: str | Path, *, planned: int | None = None) -> None:
        self.folder, self.planned = folder, planned
        self._said = False

    def __call__(self, step: int) -> str | None:
        """The advice after the evaluation of a step, whatever follows it; None where there is none."""
        try:
            return self._advice(step)
        except DataError as error:
            said, self._said = self._said, True
            return None if said else f"whether training and gold reward part cannot be said: {error}"

    def _advice(self, step: int) -> str | None:
        run, planned = RunData.read(self.folder), self.planned
        now = RunData(folder=run.folder, evaluations=[one for one in run.evaluations if one.step <= step])
        usable = _usable(now)
        proxies, golds = _rewards(usable)
        if not usable or parting(proxies, golds, planned=planned).verdict != "parted":
            return None
        if parting(proxies[:-1], golds[:-1], planned=planned).verdict == "parted":
            return None
        found = over_optimisation(now, planned=planned)
        assert found is not None
        return (
            f"stop advice: {found.sentence} Stop, and take the weights of step {found.best} "
            "(trainer.checkpoints.best_metric: eval/gold with use_best or patience), or hold the policy closer to the "
            "reference"
        )


def evaluations_in(total_steps: int, every: int | None) -> int:
    """How often a run is evaluated: before its first step, after every so many, and after the last."""
    return 2 if every is None else 1 + -(-total_steps // every)


def planned_by(run: RunData) -> int | None:
    """The evaluations that the recipe in a run's folder plans in all; None where it does not say.

    An unfinished run is judged by it as it will be at its end.
    """
    try:
        found = parse_yaml(run.recipe, "recipe.yaml")
    except ConfigError:
        return None
    steps, every = _entry(found, "total_steps"), _entry(found, "trainer", "evaluation", "every")
    if type(steps) is not int or steps < 1 or not (every is None or (type(every) is int and every > 0)):
        return None
    return evaluations_in(steps, every)


def _entry(found: Any, *names: str) -> Any:
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _usable(run: RunData) -> list[Evaluation]:
    """The evaluations that have both rewards.

    Raises:
        DataError: two of them hold different prompts.
    """
    usable = [one for one in run.evaluations if _has_both(one)]
    for one in usable:
        if one.prompts != usable[0].prompts:
            raise DataError(
                f"the evaluations at steps {usable[0].step} and {one.step} in {str(run.folder)!r} hold different "
                "prompts; rewards along training can only be compared on the same prompts in the same order"
            )
    return usable


def _has_both(evaluation: Evaluation) -> bool:
    gold = evaluation.metrics.get(GOLD)
    return gold is not None and bool(np.isfinite(gold).any() and np.isfinite(evaluation.rewards).any())


def _rewards(evaluations: Sequence[Evaluation]) -> tuple[list[Floats], list[Floats]]:
    """Training and gold rewards; infinite ones count as unscored, since no mean has a use for them."""
    proxies, golds = [one.rewards for one in evaluations], [one.metrics[GOLD] for one in evaluations]
    return [_finite(values) for values in proxies], [_finite(values) for values in golds]


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, math.nan)


def _is_below(best: Floats, other: Floats, comparisons: int) -> bool:
    """Whether the mean of ``other - best`` is below 0 beyond what so many comparisons allow by chance."""
    differences = (other - best)[np.isfinite(other - best)]
    count = len(differences)
    if count < FEWEST_PROMPTS:
        return False
    quantile = student_quantile(1 - 2 * LEVEL / comparisons, count - 1)
    bound = quantile * float(differences.std(ddof=1)) / math.sqrt(count)
    return bool(differences.mean() < -max(bound, 1e-12))


def _paired(before: Floats, after: Floats) -> Interval | None:
    both = np.isfinite(before) & np.isfinite(after)
    return paired_difference(before[both], after[both]) if both.any() else None


def _spread(rewards: Sequence[Floats]) -> float:
    """Standard deviation within evaluations; 1 where all completions of each score the same."""
    found = float(np.sqrt(np.mean([np.nanvar(values) for values in rewards])))
    return found if found > 0 else 1.0
