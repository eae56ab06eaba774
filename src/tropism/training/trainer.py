"""The trainer: one loop for every method. It alone reduces, clips and steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tropism.errors import NumericsError
from tropism.training.config import TrainerConfig
from tropism.training.optimizer import rate_factor
from tropism.training.processes import Processes, micro_batches
from tropism.training.profiling import stage
from tropism.types import Batch, Metrics


@dataclass
class Counts:
    """How far a run is."""

    steps: int = 0
    """Collects for on-policy methods, updates for offline ones: the unit of ``total_steps``."""
    collects: int = 0
    updates: int = 0
    """Optimizer steps."""
    samples: int = 0
    """Completions sampled, or demonstrations seen."""
    tokens: int = 0
    """Completion tokens of those."""


class Source(Protocol):
    """Where batches come from."""

    @property
    def done(self) -> bool:
        """Whether the batch just yielded was the last of its collect."""
        ...

    def collect(self, policy: Any) -> Any:
        """The batches of one collect, one per optimizer step; goes on where a resumed collect stood."""
        ...

    def finish(self) -> Any:
        """End the collect, early or not; returns its ``CollectStats``."""
        ...


class Trainer:
    """Runs a method on its source.

    Args:
        policy: the module to train, prepared (wrapped) by the accelerator.
        after_update: called at every update boundary with the metrics of the update and whether a collect just ended;
            returns whether to stop. All bookkeeping (log, evaluation, checkpoints) hangs on it.
    """

    def __init__(
        self,
        *,
        policy: Any,
        algorithm: Any,
        source: Source,
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        processes: Processes,
        learning_rate: float,
        device: torch.device,
        after_update: Callable[[Metrics, bool], bool],
    ) -> None:
        self.policy, self.algorithm, self.source = policy, algorithm, source
        self.optimizer, self.config, self.processes = optimizer, config, processes
        self.accelerator = processes.accelerator
        self.learning_rate, self.device = learning_rate, device
        self.after_update = after_update
        self.counts = Counts()
        self.total_steps = 0

    def fit(self, total_steps: int) -> None:
        """Train until ``total_steps`` steps are done or ``after_update`` asks to stop."""
        self.total_steps = total_steps
        while self.counts.steps < total_steps:
            stop = False
            for batch in self.source.collect(self.policy):
                with stage("update"):
                    metrics = self.update(batch)
                ended = self.algorithm.after_step(self.policy, metrics).value == "end collect" or self.source.done
                if ended:
                    stats = self.source.finish()
                    metrics |= self.algorithm.after_collect(stats)
                    self.counts.steps += 1
                    self.counts.collects += 1
                    self.counts.samples += stats.samples
                    self.counts.tokens += stats.tokens
                stop = self.after_update(metrics, ended)
                if ended or stop:
                    break
            if stop:
                return

    def update(self, batch: Batch) -> Metrics:
        """One optimizer step; its result depends neither on micro-batch size nor on the number of processes.

        Every process is given the whole batch and takes every n-th row. A batch without anything to learn skips the
        step, momentum and decay included.

        Raises:
            NumericsError: a loss or gradient is not finite; the weights are as before.
        """
        started = time.perf_counter()
        # Dropout is off in every mode; transformers recomputes activations (a ModelConfig field) in train mode alone.
        self.policy.train()
        with torch.no_grad():
            batch = self.algorithm.prepare(batch)
        totals = {name: weight for name, weight in self.algorithm.weight(batch).items() if weight > 0}
        metrics: Metrics = {"optim/skipped": float(not totals)}
        if totals:
            rate = self.learning_rate * rate_factor(self.config, step=self.counts.steps, total_steps=self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            at_work = self._at_work(batch)
            metrics["optim/idle_fraction"] = 1.0 - len(at_work) / len(batch)
            metrics |= self._accumulate(batch.select(at_work) if len(at_work) < len(batch) else batch, totals)
            with stage("optimizer"):
                metrics["optim/grad_norm"] = self._step()
            metrics["optim/lr"] = rate
        self.policy.eval()
        self.counts.updates += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the end of the step would count in what comes next
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    def _accumulate(self, batch: Batch, totals: dict[str, float]) -> Metrics:
        """Gradients of sum_k loss_k / total_k over all micro-batches, and the numbers that go with them."""
        sums: dict[str, Tensor] = {}
        parts = self._micro_batches(batch)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with self.accelerator.no_sync(self.policy) if not last else nullcontext():
                with stage("forward"), self.accelerator.autocast():
                    losses, ratios = self.algorithm.loss(self.policy, part)
                scaled = {name: loss / totals[name] for name, loss in losses.items() if name in totals}
                # Gradients are averaged over processes, so each sum is scaled by their number.
                with stage("backward"):
                    self.accelerator.backward(self.processes.count * torch.stack(list(scaled.values())).sum())
            numbers = {f"loss/{name}": value.detach() for name, value in scaled.items()}
            for name, (numerator, denominator) in ratios.items():
                numbers[f"{name}/numerator"], numbers[f"{name}/denominator"] = numerator, denominator
            for name, value in numbers.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
        return self._reduced(sums)

    def _at_work(self, batch: Batch) -> Tensor:
        """Rows whose gradient is not known to be exactly zero; one row of an idle batch, so that the step is taken."""
        rows = torch.nonzero(~self.algorithm.idle(batch)).squeeze(-1)
        return rows if len(rows) else torch.zeros(1, dtype=torch.long)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """This process's rows in micro-batches; every process has the same number, empty ones where rows ran out."""
        mine = torch.arange(self.processes.rank, len(batch), self.processes.count)
        config = self.config
        plan = micro_batches(
            batch.select(mine),
            max_tokens=config.micro_batch_tokens,
            max_rows=config.micro_batch_size,
            without_padding=self.accelerator.unwrap_model(self.policy).without_padding,
        )
        parts = [batch.select(mine[rows]) for rows in plan]
        for _ in range(self.processes.maximum(len(parts)) - len(parts)):
            row = batch.select(torch.zeros(1, dtype=torch.long))
            parts.append(type(row)(**{**vars(row), "loss_mask": torch.zeros_like(row.loss_mask)}))
        return [part.to(self.device) for part in parts]

    def _reduced(self, sums: dict[str, Tensor]) -> Metrics:
        names = sorted(sums)
        values = self.processes.sum(torch.stack([sums[name].double() for name in names])).tolist()
        reduced = dict(zip(names, values, strict=True))
        metrics: Metrics = {}
        for name, value in reduced.items():
            if name.endswith("/numerator"):
                key = name.removesuffix("/numerator")
                metrics[key] = value / max(1.0, reduced[f"{key}/denominator"])
            elif not name.endswith("/denominator"):
                metrics[name] = value
        for name, value in metrics.items():
            if name.startswith("loss/") and not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise NumericsError(
                    f"{name} is {value} at update {self.counts.updates + 1} (step {self.counts.steps + 1}); "
                    "the weights are unchanged. Lower the learning rate, or clip or normalise the reward"
                )
        return metrics

    def _step(self) -> float:
        """Clip, refuse non-finite gradients, step; returns the gradient norm before clipping."""
        named = [(name, p) for name, p in self.policy.named_parameters() if p.grad is not None]
        total = get_total_norm([p.grad for _, p in named if p.grad is not None])
        norm = float(total)
        if not math.isfinite(norm):
            # Clipping would spread NaN to every gradient, so the culprit is looked for before.
            bad = next(
                (name for name, p in named if p.grad is not None and not p.grad.isfinite().all()),
                "all weights together",
            )
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(
                f"the gradient of {bad} is not finite at update {self.counts.updates + 1} "
                f"(step {self.counts.steps + 1}); the weights are unchanged. Lower the learning rate, or clip or "
                "normalise the reward"
            )
        if self.config.max_grad_norm is not None:
            clip_grads_with_norm_([p for _, p in named], self.config.max_grad_norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, int]:
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts = Counts(**state)
