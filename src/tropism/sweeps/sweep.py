"""The course of a sweep: trial after trial, each a run of its own, all of it resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from tropism.errors import ConfigError, TropismError
from tropism.recipe_changes import flat_settings, setting_text
from tropism.redaction import find_secret, redact
from tropism.safe_yaml import read_yaml
from tropism.schema import dump_yaml, to_plain
from tropism.storage import write_whole, writing
from tropism.sweeps.config import SweepConfig, sweep_from_file
from tropism.sweeps.outcome import Row, row_of, shown_value, write_outcome
from tropism.sweeps.space import recipe_of
from tropism.sweeps.study import SweepStudy
from tropism.sweeps.work import Ended, Job, Watch, execute
from tropism.training.run_lock import RunLock

Execute = Callable[[Job, Watch | None], Ended]

MOST_ALIKE = 3
"""So many trials that fail for the same reason, before any succeeds, end a sweep: the next would, too."""
MAY_GROW = ("trials", "backend", "ray")
"""Settings that may differ when a sweep goes on."""
MEASURED = ("metric", "mode", "take")
"""Settings that may differ as long as no trial has been measured by them."""


class Sweep:
    """A sweep and its folder.

    Args:
        config: what is tried.
        base: the recipe's plain values.
        folder: of the sweep; one that was interrupted goes on.
        options: of ``tropism train`` for every run, such as --allow-code.
        execute: what trains.
        say: told one line per trial.

    Raises:
        ConfigError: the folder holds something else, or a sweep of another recipe or other settings.
        StorageError: another sweep uses it.
    """

    def __init__(
        self,
        config: SweepConfig,
        base: Mapping[str, Any],
        folder: Path,
        *,
        options: Sequence[str] = (),
        execute: Execute = execute,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.base, self.folder = config, dict(base), folder.absolute()
        self.options, self.execute, self.say = tuple(options), execute, say
        self.study: SweepStudy
        _refuse_launchers()
        found = find_secret(self.base)
        if found is not None:
            raise ConfigError(f"{found[0]} looks like {found[1]}. Recipes are written into folders: take it out")

    def run(self) -> list[Row]:
        """Run every trial that is left, and write what came of all; returns them by number.

        Raises:
            Interrupted, KeyboardInterrupt: after a signal; the next call goes on.
            TropismError: every trial fails for the same reason, or no run has the metric.
        """
        lock = self._open()
        try:
            self.study = SweepStudy(self.folder, self.config)
            if self.config.backend == "ray":
                from tropism.sweeps.ray_backend import run_with_ray

                run_with_ray(self)
            else:
                while (given := self.study.next()) is not None:
                    self.run_trial(*given)
            return self.write(pictures=True)
        except BaseException:
            if hasattr(self, "study"):
                self.write(pictures=False)
            raise
        finally:
            lock.release()

    def write(self, *, pictures: bool) -> list[Row]:
        """Table, summary and best recipe of the trials so far."""
        rows = [row_of(trial, self.config, self.folder) for trial in self.study.trials]
        write_outcome(rows, self.config, self.base, self.folder, pictures=pictures)
        return rows

    # One trial -------------------------------------------------------------------------------------------------------

    def run_trial(self, trial: Trial, values: Mapping[str, Any]) -> None:
        """All runs of a trial, here; those that were measured before an interruption are not run again."""
        try:
            jobs = self.jobs(trial.number, values)
        except ConfigError as error:
            self.end(trial, reason=str(error))
            return
        for index, job in enumerate(jobs):
            if index < len(_attribute(trial, "values", [])):
                continue
            ended = self.execute(job, self._watch(trial) if index == 0 else None)
            if not self.take(trial, ended):
                return
        self.end(trial)

    def jobs(self, number: int, values: Mapping[str, Any]) -> list[Job]:
        """The runs of a trial.

        Raises:
            ConfigError: no recipe can be built of its values.
        """
        jobs = []
        for seed in range(self.config.seeds):
            name = f"{number:03d}"
            run = self.folder / "trials" / name
            if self.config.seeds > 1:
                run, name = run / f"seed-{seed}", f"{name}-seed-{seed}"
            recipe = recipe_of(self.base, values, run=str(run), seed=seed)
            job = Job(
                run=str(run),
                recipe=recipe.to_yaml(),
                recipe_path=str(self.folder / "recipes" / f"{name}.yaml"),
                log=str(self.folder / "logs" / f"{name}.log"),
                working_directory=os.getcwd(),
                options=self.options,
                metric=self.config.metric,
                mode=self.config.mode,
                take=self.config.take,
            )
            jobs.append(job)
        return jobs

    def take(self, trial: Trial, ended: Ended) -> bool:
        """Note what came of one run of a trial; returns whether the trial goes on.

        Raises:
            ConfigError: the run has no such metric, and no trial before it had; the trial stays as it is.
        """
        trial.set_user_attr("seconds", round(_attribute(trial, "seconds", 0.0) + ended.seconds, 3))
        if ended.stopped:
            self.study.prune(trial.number)
            self._tell(trial.number)
            return False
        if ended.value is None:
            if ended.there_are is not None and not self._any_measured():
                names = ", ".join(ended.there_are) or "none"
                raise ConfigError(
                    f"metric: the first run has no {self.config.metric}. It has: {names}. Change metric in the sweep's "
                    "file, and start the same command again: nothing is trained twice"
                )
            self.end(trial, reason=ended.reason or "it has no value")
            return False
        trial.set_user_attr("values", [*_attribute(trial, "values", []), ended.value])
        if ended.interval is not None and self.config.seeds == 1:
            trial.set_user_attr("interval", list(ended.interval))
        return True

    def end(self, trial: Trial, *, reason: str | None = None) -> None:
        """The end of a trial, with the mean of its runs, or with a reason why there is none.

        Raises:
            TropismError: as many trials in a row have failed for this reason as show that the next will.
        """
        if reason is None:
            self.study.complete(trial.number, fmean(_attribute(trial, "values", [])))
        else:
            trial.set_user_attr("reason", redact(reason))
            self.study.fail(trial.number)
        self._tell(trial.number)
        self.write(pictures=False)
        if reason is not None and not self._any_measured():
            reasons = [t.user_attrs.get("reason") for t in self.study.trials if t.state == TrialState.FAIL]
            if len(reasons) >= MOST_ALIKE and len(set(reasons[-MOST_ALIKE:])) == 1:
                raise TropismError(
                    f"{len(reasons)} trials have failed and none has succeeded, the last {MOST_ALIKE} for the same "
                    f"reason: {reason}. Mend that; the same command goes on with the next trial"
                )

    def _watch(self, trial: Trial) -> Watch | None:
        """Tells the pruner of a trial's metric, and asks it."""
        if self.config.pruner == "none":
            return None
        before = self._frozen(trial.number).last_step or 0

        def watch(step: int, value: float) -> bool:
            if step > before:
                trial.report(value, step)
            return step >= self.config.prune_after and trial.should_prune()

        return watch

    def _any_measured(self) -> bool:
        return any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in self.study.trials)

    def _frozen(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.study.trials if trial.number == number)

    def _tell(self, number: int) -> None:
        row = row_of(self._frozen(number), self.config, self.folder)
        done = self.config.total - self.study.left
        settings = ", ".join(f"{key}={shown_value(value)}" for key, value in row.values.items())
        self.say(f"trial {number:03d} ({done} of {self.config.total}) {row.told(self.config.metric)}  [{settings}]")

    # The folder ------------------------------------------------------------------------------------------------------

    def _open(self) -> RunLock:
        """Make the folder, or see that it holds this sweep; the lock is held then."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose another folder for the sweep (--out)")
        is_sweep = (folder / "sweep.yaml").is_file()
        if folder.is_dir() and not is_sweep and any(not path.name.startswith(".lock") for path in folder.iterdir()):
            raise ConfigError(f"{folder} holds something that is no sweep; choose another folder (--out)")
        with writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = RunLock(folder)
        lock.acquire()
        try:
            if is_sweep:
                self._compare()
            with writing(folder):
                for name in ("trials", "recipes", "logs"):
                    (folder / name).mkdir(mode=0o700, exist_ok=True)
            write_whole(folder / "recipe.yaml", redact(dump_yaml(self.base)).encode())
            write_whole(folder / "sweep.yaml", redact(dump_yaml(to_plain(self.config))).encode())
        except BaseException:
            lock.release()
            raise
        return lock

    def _compare(self) -> None:
        """Whether the sweep in the folder is this one.

        Raises:
            ConfigError: it is not; names what differs.
        """
        before = to_plain(sweep_from_file(self.folder / "sweep.yaml"))
        now = to_plain(self.config)
        free = MAY_GROW if _measured(self.folder) else (*MAY_GROW, *MEASURED)
        changed = {f"sweep: {k}": (before[k], now[k]) for k in now if k not in free and before[k] != now[k]}
        old, new = flat_settings(read_yaml(self.folder / "recipe.yaml")), flat_settings(to_plain(self.base))
        keys = sorted(old.keys() | new.keys())
        changed |= {f"recipe: {k}": (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k) and k != "run"}
        if changed:
            name, (was, is_now) = next(iter(changed.items()))
            others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.folder} holds a sweep with other settings: {name} was {setting_text(was)} and is "
                f"{setting_text(is_now)}{others}. Its trials could not be compared with new ones: choose another "
                "folder (--out), or set that back"
            )


def _refuse_launchers() -> None:
    """A sweep starts its runs by itself, each with one process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "tropism sweep starts its runs by itself, each in one process: call it without a launcher such as torchrun"
        )


def _attribute(trial: Trial, name: str, default: Any) -> Any:
    return trial.user_attrs.get(name, default)


def _measured(folder: Path) -> bool:
    """Whether a trial of the sweep in a folder has been measured, by the summary of it."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return bool(summary["complete"] or summary["pruned"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
