"""Trials on several machines: Ray Tune places them, the study in the sweep's folder chooses and records them.

The machines have to see the same files under the same names (a shared file system): the sweep's folder, the data and
the models. What a trial runs is what a local one runs, a process of its own.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from optuna.trial import Trial

from tropism.errors import ConfigError
from tropism.sweeps.work import Ended, Job, execute
from tropism.training.interrupt import Interrupted

if TYPE_CHECKING:
    from tropism.sweeps.sweep import Sweep

logger = logging.getLogger("tropism")


def run_with_ray(sweep: Sweep) -> None:
    """Run every trial that is left through Ray Tune.

    Raises:
        ConfigError: Ray Tune is not installed.
        Interrupted: Ray Tune ended before the trials did.
        Exception: what was raised while an outcome was taken in, after all trials that were running.
    """
    try:
        import ray
        from ray import tune
        from ray.tune.search import Searcher
    except ImportError as error:
        raise ConfigError(
            f'backend: ray needs Ray Tune, and it cannot be imported ({error}): pip install "ray[tune]"; or set '
            "backend: local"
        ) from error
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    config = sweep.config.ray
    dispatcher = Dispatcher(sweep)

    class Search(Searcher):  # type: ignore[misc,unused-ignore]
        """Ray Tune's view of the study."""

        def suggest(self, trial_id: str) -> dict[str, Any] | str:
            given = dispatcher.suggest(trial_id)
            return Searcher.FINISHED if given is None else given

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            dispatcher.complete(trial_id, result, error=error)

        def save(self, checkpoint_path: str) -> None:
            """The study is the state, and saves itself."""

        def restore(self, checkpoint_path: str) -> None:
            """See ``save``."""

    if not ray.is_initialized():
        ray.init(address=config.address, log_to_driver=False, include_dashboard=False)
    try:
        tune.Tuner(
            tune.with_resources(work, {"cpu": config.cpus, "gpu": config.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=Search(),
                num_samples=sweep.study.left,
                max_concurrent_trials=config.parallel,
                trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(name="ray", storage_path=str(sweep.folder), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    if dispatcher.problem is not None:
        raise dispatcher.problem
    if sweep.study.left:  # Ray takes Ctrl-C for itself, stops the trials and returns
        raise Interrupted(signal.SIGINT)


def _folder_name(trial: Any) -> str:
    """Ray's own would hold the recipe."""
    return str(trial.trial_id)


def work(config: Mapping[str, Any]) -> dict[str, Any]:
    """All runs of a trial, where Ray has placed it; ends with the first that has no value.

    Args:
        config: ``jobs``, the fields of each.
    """
    outcomes = []
    for job in config["jobs"]:
        ended = execute(Job(**{**job, "options": tuple(job["options"])}))
        outcomes.append(asdict(ended))
        if ended.value is None:
            break
    return {"outcomes": outcomes}


class Dispatcher:
    """Hands the trials of a study to Ray Tune, and takes in what came of them; all in the process of the sweep."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.under_way: dict[str, Trial] = {}
        self.problem: Exception | None = None
        """What ends the sweep: no further trial is handed out."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Ray Tune pickles its search into the folder ray/, which nothing here reads: the study is the state."""
        return object, ()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The jobs of the next trial; None where there is none."""
        while self.problem is None and (given := self.sweep.study.next()) is not None:
            trial, values = given
            try:
                jobs = self.sweep.jobs(trial.number, values)
            except ConfigError as error:
                self._guarded(lambda trial=trial, error=error: self.sweep.end(trial, reason=str(error)))
                continue
            trial.set_user_attr("values", [])  # of a trial that was cut off; its runs say at once that they are done
            self.under_way[trial_id] = trial
            return {"jobs": [asdict(job) for job in jobs]}
        return None

    def complete(self, trial_id: str, result: Mapping[str, Any] | None, *, error: bool) -> None:
        """Take in a trial; one that was stopped from outside stays unfinished, and is run again by the next call."""
        trial = self.under_way.pop(trial_id, None)
        if trial is None:
            return
        if error or result is None or "outcomes" not in result:
            if error:
                self._guarded(lambda: self.sweep.end(trial, reason="Ray lost it; ray/ in the sweep's folder says more"))
            return
        self._guarded(lambda: self._take(trial, result["outcomes"]))

    def _take(self, trial: Trial, outcomes: list[dict[str, Any]]) -> None:
        for outcome in outcomes:
            if not self.sweep.take(trial, Ended(**outcome)):
                return
        self.sweep.end(trial)

    def _guarded(self, action: Any) -> None:
        """Ray Tune would swallow what a searcher raises, or end without the trials that are under way."""
        try:
            action()
        except Exception as error:
            self.problem = self.problem or error
