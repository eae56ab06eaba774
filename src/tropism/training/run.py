"""A run: the trainer with its log, evaluations, checkpoints, early stop, warnings and signals."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tropism.errors import ModelError, NumericsError, StorageError
from tropism.redaction import redact
from tropism.training.boundary import Boundary, BoundarySaver
from tropism.training.checkpoint import Checkpoint, newest_complete, read_checkpoint
from tropism.training.config import TrainerConfig
from tropism.training.fitting import memory_warnings
from tropism.training.interrupt import Interrupted, ProcessLostError
from tropism.training.monitor import Monitor
from tropism.training.processes import Processes
from tropism.training.profiling import Profile
from tropism.training.progress import ProgressDisplay, Quiet, show_progress
from tropism.training.run_folder import RunFolder
from tropism.training.sources import Collected
from tropism.training.state import load_optimizer_state, load_trainable_state, optimizer_state, trainable_state
from tropism.training.stopwatch import StepClock
from tropism.training.trainer import Trainer
from tropism.types import Metrics

Evaluation = Callable[[int], tuple[Metrics, dict[str, list[Any]] | None]]
TIMINGS = ("time/", "throughput/")


@dataclass
class Best:
    """The best evaluation so far."""

    value: float | None = None
    step: int = 0
    since: int = 0
    """Evaluations since then."""


class Run:
    """Executes a trainer and keeps its books. Every process runs it; only the first writes."""

    def __init__(
        self,
        *,
        folder: RunFolder,
        config: TrainerConfig,
        processes: Processes,
        policy: Any,
        evaluations: list[Evaluation],
        export: Callable[[], None],
        begin: Callable[[], None],
        conclude: Callable[[], None],
        identity: Callable[[], Mapping[str, Any]],
        command: str,
    ) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.policy, self.evaluations, self.export = policy, evaluations, export
        self.interrupts, self.begin, self.identity = processes.interrupts, begin, identity
        self.conclude = conclude  # what all processes do between the last checkpoint and the export
        self.command = command  # that goes on with the run
        self.monitor = Monitor()
        self.best = Best()
        self.display: ProgressDisplay = Quiet()
        self.recent: Metrics = {}
        self.profile: Profile | None = None
        self.advise: Callable[[int], str | None] = lambda step: None  # a warning after the evaluation of a step
        self.clock = StepClock()
        self.saver = BoundarySaver(folder.path, keep=config.checkpoints.keep, processes=processes, gather=self._trained)
        self.trainer: Trainer

    def attach(self, trainer: Trainer) -> None:
        """The trainer, which is built with this run's ``after_update``."""
        self.trainer = trainer

    # The course of a run ---------------------------------------------------------------------------------------------

    def execute(self, total_steps: int, *, resumed: Checkpoint | None) -> None:
        """Train to ``total_steps``, then save and export.

        Raises:
            Interrupted: after a signal; the last update boundary is saved.
            StorageError: something cannot be written; what was complete before still is.
        """
        with self.interrupts.listening():
            self.processes.agree_to_go_on()  # nothing is written unless all have passed their checks
            try:
                self.begin()
                try:
                    with memory_warnings(self.processes, self._warn):
                        self._train(total_steps, resumed=resumed)
                except StorageError as error:
                    raise StorageError(f"{error}{self._way_on()}") from error
            finally:
                self.folder.release()

    def _way_on(self) -> str:
        """How to go on after something could not be written."""
        newest, _ = newest_complete(self.folder.path / "checkpoints", hashes=False)
        if newest is None:
            return ". Nothing is saved yet; start the run again then"
        return f", then go on from {newest.name} with: {self.command}"

    def _train(self, total_steps: int, *, resumed: Checkpoint | None) -> None:
        if resumed is not None:
            self._restore(resumed)
        if not self.trainer.sharded:
            self.processes.check_same_weights(self.policy)
        self.trainer.total_steps = total_steps
        done = self.trainer.counts.steps
        wanted = self.config.progress
        with show_progress(total_steps, done=done, wanted=wanted, main=self.processes.is_main) as self.display:
            self.mark(step_ended=resumed is None or resumed.state["step_ended"])
            self.interrupts.rescue = self._rescue
            try:
                if resumed is None or resumed.state["step_ended"]:
                    self._end_of_step()
                if not self._worn_out:  # or a run that patience had stopped would go on when it is resumed
                    self._begin_step(whole=resumed is None or not resumed.collecting)
                    self.trainer.fit(total_steps)
                number = self.processes.signal_anywhere()
                if number is not None:
                    raise Interrupted(number)
            except (Interrupted, ProcessLostError) as end:
                if self.trainer.sharded and isinstance(end, Interrupted) and not end.left_alone:
                    self.saver.save()
                else:  # nobody waits for a process that may have gone
                    self.saver.save_alone()
                raise
            except Exception as error:
                if not isinstance(error, StorageError):  # which leaves no room for more
                    self._save_after_error()
                raise
            finally:
                self.interrupts.rescue = None
                self._close_profile()
            self._finish()

    def _finish(self) -> None:
        """Save and export. A signal does not stop that, and is only heard when it is done."""
        self.display.stage("saving")
        self.saver.save()
        self.take_best()
        with self.processes.in_step():
            self.policy.gather()
        self.conclude()
        self.processes.together(lambda: self.export() if self.processes.is_main else None, abandon=False)
        number = self.processes.signal_anywhere()
        if number is not None:
            raise Interrupted(number)

    def _save_after_error(self) -> None:
        """Keep what was done before an error, and say how to go on once its cause is mended."""
        try:
            saved = self.saver.save_alone()
        except (StorageError, NumericsError) as error:
            self.display.say(f"what was done before could not be saved: {error}")
            return
        if saved and self.processes.is_main:
            counts = self.trainer.counts
            self.display.say(
                f"saved as after step {counts.steps}, update {counts.updates}; with the cause mended, go on with: "
                f"{self.command}"
            )

    def _rescue(self) -> None:
        """Save after a signal that this run's thread does not get to hear; called by another one."""
        if self.saver.save_alone() and self.processes.is_main:
            self.display.say(f"interrupted: saved; go on with: {self.command}")

    def take_best(self) -> None:
        """With ``use_best``: give the policy the best weights, where they are not those before training.

        Raises:
            ModelError: they are not in best/ (any more).
        """
        if not self.config.checkpoints.use_best or self.best.step == 0:
            return
        saved = read_checkpoint(self.folder.path / "best")
        if saved.state["step"] != self.best.step:  # of a longer run, which this one has gone back from
            raise ModelError(
                f"{self.folder.path / 'best'} holds the weights after step {saved.state['step']}, but the best were "
                f"those after step {self.best.step}. Resume with --trainer.checkpoints.use_best false to take the last"
            )
        load_trainable_state(self.policy, saved.tensors["policy"])

    def after_update(self, metrics: Metrics, ended: bool) -> bool:
        """The books of one update boundary; returns whether to stop."""
        self.clock.add_update(metrics["time/update"])
        if ended:
            metrics |= self._end_step()
        step, stop = self.trainer.counts.steps, False
        self._log("update", metrics, step=step if ended else step + 1)
        self.mark(step_ended=ended)
        if ended:
            self.display.step(step, self.recent)
            stop = self._end_of_step()
        if self.processes.signal_anywhere() is not None:
            self.saver.save()
            return True
        if ended and not stop:
            self._write_profile()
            self._begin_step()
        return stop

    def _end_of_step(self) -> bool:
        """What follows a step, and the start of a run: evaluation, early stop, checkpoint; returns whether to stop.

        A signal may abandon it. A run that is resumed then does all of it anew, so its logs know nothing of that.
        """
        step, total = self.trainer.counts.steps, self.trainer.total_steps
        every, stop = self.config.evaluation.every, False
        if step in (0, total) or (every is not None and step % every == 0):
            stop = self._evaluate(step) and 0 < step < total
        if stop:
            self._warn(f"stopped after step {step}: {self.config.checkpoints.patience} evaluations without a new best")
        self.mark(step_ended=False)
        keep_every = self.config.checkpoints.every
        if keep_every is not None and step % keep_every == 0 and 0 < step < total:
            self.saver.save()
        return stop

    # Time of a step --------------------------------------------------------------------------------------------------

    def _begin_step(self, *, whole: bool = True) -> None:
        counts = self.trainer.counts
        if self.profile is not None:
            self.profile.step_begins()
        self.clock.begin(samples=counts.samples, tokens=counts.tokens, whole=whole)

    def _end_step(self) -> Metrics:
        counts = self.trainer.counts
        timings = self.clock.end(samples=counts.samples, tokens=counts.tokens)
        if self.profile is not None and self.clock.whole:
            self.profile.step_ended()
        return timings

    def _write_profile(self) -> None:
        """Write the profile once it is recorded, and show its table; what cannot be written does not end the run."""
        if self.profile is None or not self.profile.recorded:
            return
        try:
            table = self.profile.write(first_step=self.trainer.counts.steps - self.profile.steps + 1)
            self.display.say(f"{table}\nwritten to {self.profile.folder}")
        except OSError as error:
            self._warn(f"the profile cannot be written: {error}")
        self.profile = None

    def _close_profile(self) -> None:
        """At the end of the run, however it came: write what is recorded, and forget a part of a step."""
        self._write_profile()
        if self.profile is not None:
            self.profile.close()
            self.display.say("no profile is written: the run ended before the step that was to be profiled did")

    def on_collect(self, collected: Collected) -> None:
        """Log what was sampled, and warn about it; a resumed run has the batch and does not log it again."""
        self._log("collect", collected.metrics | collected.timings, step=collected.step)
        with self.clock.logging():
            self._inspect(collected)
        self.mark(step_ended=False)

    def _inspect(self, collected: Collected) -> None:
        """Warnings about a collect, and the file of its rollouts."""
        for message in self.monitor.check(collected.metrics):
            self._warn(message)
        if self.processes.is_main:
            self.folder.write_rollouts(collected.step, collected.inputs, collected.rewards, collected.columns)

    # Parts -----------------------------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> bool:
        """All evaluations; returns whether patience ran out."""
        if not self.evaluations:
            return False
        self.display.stage("evaluating")
        metrics: Metrics = {}
        began = time.perf_counter()
        for evaluation in self.evaluations:
            numbers, table = evaluation(step)
            metrics |= numbers
            if table is not None and self.processes.is_main:
                self.folder.write_evaluation(step, table)
        worn_out = self._judge(step, metrics)
        if self.config.checkpoints.use_best:
            metrics["best/step"] = float(self.best.step)
        metrics["time/evaluation"] = time.perf_counter() - began
        self._log("evaluation", metrics, step=step)
        if self.processes.is_main and (advice := self.advise(step)) is not None:
            self._warn(advice)
        self.display.stage("training")
        return worn_out

    def _judge(self, step: int, metrics: Metrics) -> bool:
        """Keep the weights of a new best; returns whether patience ran out."""
        config = self.config.checkpoints
        value = metrics.get(config.best_metric or "", math.nan)
        if math.isnan(value):
            return False
        sign = 1 if config.best_mode == "max" else -1
        if self.best.value is None or sign * value > sign * self.best.value:
            self.best = Best(value=value, step=step)
            if step > 0:
                with self.processes.in_step():
                    tensors = {"policy": trainable_state(self.policy)}
                state = {"step": step, "metric": config.best_metric, "value": value}
                self.saver.keep_best(Checkpoint(state=state, tensors=tensors))
        else:
            self.best.since += 1
        return self._worn_out

    @property
    def _worn_out(self) -> bool:
        """Whether as many evaluations brought no new best as patience allows."""
        patience = self.config.checkpoints.patience
        return patience is not None and self.best.since >= patience

    def _log(self, kind: str, metrics: Metrics, *, step: int) -> None:
        self.recent = self.recent | metrics
        if not self.processes.is_main:
            return
        with self.clock.logging():
            counts = {name: value for name, value in self.trainer.state_dict().items() if name != "steps"}
            head = {"kind": kind, "step": step, **counts}
            timings = {k: v for k, v in metrics.items() if k.startswith(TIMINGS)}
            self.folder.append("metrics.jsonl", head | {k: v for k, v in metrics.items() if k not in timings})
            if timings:
                self.folder.append("timings.jsonl", head | timings)
            self.processes.accelerator.log(metrics, step=self.trainer.counts.updates)

    def _warn(self, message: str) -> None:
        if self.processes.is_main:
            step = self.trainer.counts.steps + 1
            self.folder.append("warnings.jsonl", {"step": step, "message": message})
            self.display.say(f"warning (step {step}): {redact(message)}")

    def mark(self, *, step_ended: bool) -> None:
        """Note this moment as the one to go on from.

        Args:
            step_ended: whether ``_end_of_step`` is still to come.
        """
        counts = self.trainer.counts
        values, batch = self.trainer.source.state_dict()  # type: ignore[attr-defined]
        state = {
            "counts": self.trainer.state_dict(),
            "step_ended": step_ended,
            "algorithm": self.trainer.algorithm.state_dict(),
            "source": values,
            "monitor": self.monitor.state_dict(),
            "recent": {k: v if math.isfinite(v) else None for k, v in self.recent.items() if not k.startswith(TIMINGS)},
            "identity": self.identity(),
            "best": vars(self.best),
            "logs": self.folder.log_sizes(),
        }
        self.saver.newest = Boundary(
            steps=counts.steps,
            updates=counts.updates,
            state=copy.deepcopy(state),
            batch=batch,
            trained=None if self.trainer.sharded else self._trained(),
        )

    def _trained(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Weights and moments; sharded ones are gathered, which all processes do together."""
        return {
            "policy": trainable_state(self.policy),
            "optimizer": optimizer_state(self.policy, self.trainer.optimizer),
        }

    def take_up(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was written, but for the run folder."""
        state, tensors = checkpoint.state, checkpoint.tensors
        load_trainable_state(self.policy, tensors["policy"])
        load_optimizer_state(self.policy, self.trainer.optimizer, tensors["optimizer"])
        self.trainer.load_state_dict(state["counts"])
        self.trainer.algorithm.load_state_dict(state["algorithm"])
        self.trainer.source.load_state_dict(state["source"], tensors["batch"])  # type: ignore[attr-defined]
        self.monitor.load_state_dict(state["monitor"])
        self.best = Best(**state["best"])
        self.recent = {name: math.nan if value is None else value for name, value in state["recent"].items()}

    def _restore(self, checkpoint: Checkpoint) -> None:
        """``take_up``, and forget what the run folder holds of later."""
        self.take_up(checkpoint)
        state = checkpoint.state
        if self.processes.is_main:
            # The rollouts of the step in progress are written, its evaluation is not.
            collected = self.trainer.counts.collects + checkpoint.collecting
            for message in self.folder.cut_back(
                state["logs"], collected=collected, evaluated=self.trainer.counts.steps
            ):
                self._warn(message)
