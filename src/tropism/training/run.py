"""A run: the trainer with its log, evaluations, checkpoints, early stop, warnings and signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tropism.training.checkpoint import Checkpoint, checkpoint_name, prune, read_checkpoint, write_checkpoint
from tropism.training.config import TrainerConfig
from tropism.training.interrupt import Interrupted, Interrupts
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
        interrupts: Interrupts,
        begin: Callable[[], None],
    ) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.policy, self.evaluations, self.export = policy, evaluations, export
        self.interrupts, self.begin = interrupts, begin
        self.monitor = Monitor()
        self.best = Best()
        self.display: ProgressDisplay = Quiet()
        self.recent: Metrics = {}
        self.profile: Profile | None = None
        self.clock = StepClock()
        self.trainer: Trainer

    def attach(self, trainer: Trainer) -> None:
        """The trainer, which is built with this run's ``after_update``."""
        self.trainer = trainer

    # The course of a run ---------------------------------------------------------------------------------------------

    def execute(self, total_steps: int, *, resumed: Checkpoint | None) -> None:
        """Train to ``total_steps``, then save and export.

        Raises:
            Interrupted: after a signal; the last update boundary is saved.
        """
        self.begin()
        if resumed is not None:
            self._restore(resumed)
        done = self.trainer.counts.steps
        wanted = self.config.progress
        with (
            show_progress(total_steps, done=done, wanted=wanted, main=self.processes.is_main) as self.display,
            self.interrupts.listening(),
        ):
            try:
                if resumed is None:
                    self._evaluate(0)
                self._begin_step(whole=resumed is None or not resumed.tensors["batch"])
                self.trainer.fit(total_steps)
            except Interrupted:
                self._save()
                raise
            finally:
                self._close_profile()
            if self.interrupts.received is not None:
                raise Interrupted(self.interrupts.received)
            self._finish()

    def _finish(self) -> None:
        self.display.stage("saving")
        self._save()
        best = self.folder.path / "best"
        if self.config.checkpoints.use_best and (best / "manifest.json").is_file():
            load_trainable_state(self.policy, read_checkpoint(best).tensors["policy"])
        if self.processes.is_main:
            self.export()
        self.processes.wait()

    def after_update(self, metrics: Metrics, ended: bool) -> bool:
        """The books of one update boundary; returns whether to stop."""
        self.clock.add_update(metrics["time/update"])
        if ended:
            metrics |= self._end_step()
        step, stop = self.trainer.counts.steps, False
        self._log("update", metrics, step=step if ended else step + 1)
        if ended:
            self.display.step(step, self.recent)
            every = self.config.evaluation.every
            last = step == self.trainer.total_steps
            if last or (every is not None and step % every == 0):
                stop = self._evaluate(step) and not last
            if stop:
                self._warn(
                    f"stopped after step {step}: {self.config.checkpoints.patience} evaluations without a new best"
                )
            keep_every = self.config.checkpoints.every
            if keep_every is not None and step % keep_every == 0 and not last:
                self._save()
        if self.processes.any(self.interrupts.received is not None):
            self._save()
            return True
        if ended and not stop:
            self._write_profile()
            self._begin_step()
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
        """Log what was sampled, and warn about it."""
        self._log("collect", collected.metrics | collected.timings, step=collected.step)
        with self.clock.logging():
            self._inspect(collected)

    def _inspect(self, collected: Collected) -> None:
        """Warnings about a collect, and the file of its rollouts."""
        for message in self.monitor.check(collected.metrics):
            self._warn(message)
        if self.processes.is_main:
            batch = collected.batch
            columns = {
                "advantage": (
                    (batch.advantages * batch.loss_mask).sum(-1) / batch.loss_mask.sum(-1).clamp(min=1)
                ).tolist(),
                "sequence_kl": ((batch.old_logprobs - batch.ref_logprobs) * batch.completion_mask).sum(-1).tolist(),
            }
            self.folder.write_rollouts(collected.step, collected.inputs, collected.rewards, columns)

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
            if self.processes.is_main and step > 0:
                state = {"step": step, "metric": config.best_metric, "value": value}
                tensors = {"policy": trainable_state(self.policy)}
                write_checkpoint(self.folder.path / "best", Checkpoint(state=state, tensors=tensors))
        else:
            self.best.since += 1
        return config.patience is not None and self.best.since >= config.patience

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
            self.display.say(f"warning (step {step}): {message}")

    def _save(self) -> None:
        """A checkpoint of this update boundary."""
        self.processes.wait()
        if not self.processes.is_main:
            return
        counts = self.trainer.counts
        values, batch = self.trainer.source.state_dict()  # type: ignore[attr-defined]
        state = {
            "counts": self.trainer.state_dict(),
            "algorithm": self.trainer.algorithm.state_dict(),
            "source": values,
            "monitor": self.monitor.state_dict(),
            "best": vars(self.best),
            "logs": self.folder.log_sizes(),
        }
        tensors = {
            "policy": trainable_state(self.policy),
            "optimizer": optimizer_state(self.policy, self.trainer.optimizer),
            "batch": batch,
        }
        where = self.folder.path / "checkpoints"
        name = checkpoint_name(steps=counts.steps, updates=counts.updates)
        write_checkpoint(where / name, Checkpoint(state=state, tensors=tensors))
        prune(where, keep=self.config.checkpoints.keep)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.state, checkpoint.tensors
        load_trainable_state(self.policy, tensors["policy"])
        load_optimizer_state(self.policy, self.trainer.optimizer, tensors["optimizer"])
        self.trainer.load_state_dict(state["counts"])
        self.trainer.algorithm.load_state_dict(state["algorithm"])
        self.trainer.source.load_state_dict(state["source"], tensors["batch"])  # type: ignore[attr-defined]
        self.monitor.load_state_dict(state["monitor"])
        self.best = Best(**state["best"])
        if self.processes.is_main:
            self.folder.cut_logs(state["logs"])
