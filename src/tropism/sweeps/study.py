"""The study of a sweep: every trial with its values and outcome, in a journal that survives whatever ends a sweep."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from tropism.errors import StorageError
from tropism.storage import writing
from tropism.sweeps.config import LISTED, SweepConfig
from tropism.sweeps.space import distribution, recipe_value, study_value, suggested

JOURNAL = "study.journal"

_UNDONE = (TrialState.RUNNING, TrialState.WAITING)


class SweepStudy:
    """The study in a sweep's folder, made where there is none.

    The sampler is made anew for every trial from the sweep's seed, the trial's number and the trials before it. So a
    sweep that is interrupted and goes on chooses what an uninterrupted one chooses.

    Args:
        folder: of the sweep, which nobody else is using.

    Raises:
        StorageError: the journal cannot be read or written.
    """

    def __init__(self, folder: Path, config: SweepConfig) -> None:
        self.config = config
        self.path = folder / JOURNAL
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with writing(self.path):
            _mend(self.path)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    self._study = self._open()
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise StorageError(
                    f"{self.path} cannot be read ({type(error).__name__}: {error}): it was changed or damaged. Take a "
                    "copy of it from elsewhere, or begin the sweep in another folder (--out)"
                ) from error
        self._given: set[int] = set()

    def _open(self) -> Study:
        mode = self.config.mode
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.path))),
            study_name=f"sweep-{mode}",  # which may change as long as nothing is measured
            direction=StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE,
            pruner=self._pruner(),
            load_if_exists=True,
        )

    def _pruner(self) -> BasePruner:
        if self.config.pruner == "none":
            return NopPruner()
        return MedianPruner(n_warmup_steps=self.config.prune_after)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, by number."""
        return sorted(self._study.get_trials(deepcopy=False), key=lambda trial: trial.number)

    @property
    def left(self) -> int:
        """Trials that are not done."""
        trials = self.trials
        undone = sum(trial.state in _UNDONE for trial in trials)
        return undone + max(0, self.config.total - len(trials))

    def next(self) -> tuple[Trial, dict[str, Any]] | None:
        """The next trial with its values by key: one that was interrupted, or else a new one; None when all are done.

        A trial is given out once.
        """
        trials = self.trials
        begun = next((t for t in trials if t.state == TrialState.RUNNING and t.number not in self._given), None)
        if begun is not None:
            number = begun.number
            self._study.sampler = self._sampler(number)
            trial = Trial(self._study, begun._trial_id)
        else:
            waiting = next((t.number for t in trials if t.state == TrialState.WAITING), None)
            number = len(trials) if waiting is None else waiting
            if number >= self.config.total:
                return None
            cells = self.config.grid
            if waiting is None and cells[0]:
                self._study.enqueue_trial(self._as_called(cells[number % len(cells)]))
            self._study.sampler = self._sampler(number)
            trial = self._study.ask()
        self._given.add(number)
        return trial, suggested(trial, self.config)

    def complete(self, number: int, value: float) -> None:
        self._study.tell(number, value, state=TrialState.COMPLETE)

    def fail(self, number: int) -> None:
        self._study.tell(number, state=TrialState.FAIL)

    def prune(self, number: int) -> None:
        self._study.tell(number, state=TrialState.PRUNED)

    def _as_called(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        return {key: study_value(self.config.parameters[key], value) for key, value in cell.items()}

    def _sampler(self, number: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
        if self.config.sampler == "tpe":
            return TPESampler(seed=seed)
        if self.config.sampler == "cmaes":
            from tropism.sweeps.evolution import EvolutionSampler

            parameters = self.config.parameters.items()
            ranges = {key: distribution(one) for key, one in parameters if one.strategy not in LISTED}
            return EvolutionSampler(ranges, seed=seed)
        return RandomSampler(seed=seed)


def values_of(trial: FrozenTrial, config: SweepConfig) -> dict[str, Any]:
    """The values of a trial by key; fewer where it was cut off while they were chosen."""
    parameters = config.parameters.items()
    return {key: recipe_value(one, trial.params[key]) for key, one in parameters if key in trial.params}


def _mend(path: Path) -> None:
    """Take away what a process left that was killed while it wrote: half a line, or the journal's own lock."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
