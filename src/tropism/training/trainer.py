"""The trainer: one loop for every method. It alone reduces, clips and steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tropism.errors import NumericsError
from tropism.training.config import TrainerConfig
from tropism.training.fitting import Fitting
from tropism.training.optimizer import rate_factor
from tropism.training.processes import Processes, micro_batches
from tropism.training.profiling import stage
from tropism.training.state import whole
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
        self.fitting = Fitting(processes, of="the update")
        self.sharded = isinstance(policy, FSDPModule)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_let_signals_in)

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
                    metrics |= self.algorithm.after_collect(stats) | stats.timings
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

        Every process is given the whole batch and takes every n-th row. A batch without anything to learn (no trained
        token, or a gradient of exactly zero in every row) skips the step, momentum and decay included. Up to the step a
        signal may abandon it.

        Raises:
            NumericsError: a loss or gradient is not finite; the weights are as before.
        """
        started = time.perf_counter()
        # Dropout is off in every mode; transformers recomputes activations (a ModelConfig field) in train mode alone.
        self.policy.train()
        try:
            metrics = self._update(batch)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            self.policy.eval()
        self.counts.updates += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the end of the step would count in what comes next
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    def _update(self, batch: Batch) -> Metrics:
        with torch.no_grad():
            batch = self.algorithm.prepare(batch)
        totals = {name: weight for name, weight in self.algorithm.weight(batch).items() if weight > 0}
        at_work = torch.nonzero(~self.algorithm.idle(batch)).squeeze(-1)
        learns = bool(totals) and len(at_work) > 0
        metrics: Metrics = {
            "optim/skipped": float(not learns),
            "optim/idle_fraction": 1.0 - len(at_work) / max(1, len(batch)),
        }
        if learns:
            rate = self.learning_rate * rate_factor(self.config, step=self.counts.steps, total_steps=self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            metrics |= self._accumulate(batch.select(at_work) if len(at_work) < len(batch) else batch, totals)
            with stage("optimizer"):
                metrics["optim/grad_norm"] = self._step()
            metrics["optim/lr"] = rate
        return metrics

    def _accumulate(self, batch: Batch, totals: dict[str, float]) -> Metrics:
        """Gradients of sum_k loss_k / total_k over all micro-batches of all processes, and the numbers with them.

        Sums do not depend on how rows are split: where memory runs out, all begin again with smaller micro-batches.
        """
        mine = torch.arange(self.processes.rank, len(batch), self.processes.count)
        own = batch.select(mine)
        shares = self.fitting.together(
            lambda budget: micro_batches(
                own,
                max_tokens=budget,
                max_rows=self.config.micro_batch_size,
                without_padding=self.accelerator.unwrap_model(self.policy).without_padding,
            ),
            lambda plan: self._parts(own, plan, batch),
            lambda parts: self._backward(parts, totals),
            budget=self.config.micro_batch_tokens,
            alone=not self.sharded,
            undo=lambda: self.optimizer.zero_grad(set_to_none=True),
        )
        metrics = self._reduced([numbers for numbers, _ in shares])
        if not self.sharded:  # there every backward pass exchanges them
            used = set[str]().union(*(names for _, names in shares))
            self.processes.sum_gradients([p for name, p in self.policy.named_parameters() if name in used])
        return metrics

    def _backward(self, parts: Iterable[Batch], totals: dict[str, float]) -> tuple[dict[str, float], set[str]]:
        """This process's sums, and the names of the weights that have got a gradient from it."""
        sums: dict[str, Tensor] = {}
        # Sharded gradients are averaged over processes, so each sum is scaled by their number.
        scale = self.processes.count if self.sharded else 1
        for part in parts:
            if self.sharded:
                self.processes.agree_to_go_on()
            with stage("forward"), self.accelerator.autocast():
                # Here, one at a time: what all take together is on no device at once, and counts as this one's.
                losses, ratios = self.algorithm.loss(self.policy, part.to(self.device))
            scaled = {name: loss / totals[name] for name, loss in losses.items() if name in totals}
            with stage("backward"):
                self.accelerator.backward(scale * torch.stack(list(scaled.values())).sum())
            numbers = {f"loss/{name}": value.detach() for name, value in scaled.items()}
            for name, (numerator, denominator) in ratios.items():
                numbers[f"{name}/numerator"], numbers[f"{name}/denominator"] = numerator, denominator
            for name, value in numbers.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
        values = torch.stack([value.double() for value in sums.values()]).tolist() if sums else []
        used = {name for name, parameter in self.policy.named_parameters() if parameter.grad is not None}
        return dict(zip(sums, values, strict=True)), used

    def _parts(self, own: Batch, plan: Sequence[Tensor], batch: Batch) -> list[Batch]:
        """Micro-batches of this process's rows; with sharded weights every process has as many, some of them empty."""
        parts = [own.select(rows) for rows in plan]
        missing = self.processes.maximum(len(parts)) - len(parts) if self.sharded else 0
        parts += [batch.select(torch.zeros(1, dtype=torch.long)).emptied() for _ in range(missing)]
        return parts

    def _reduced(self, shares: list[dict[str, float]]) -> Metrics:
        """The numbers of all processes in one.

        Raises:
            NumericsError: a loss is not finite.
        """
        names = sorted(set[str]().union(*shares))
        reduced = {name: sum(share.get(name, 0.0) for share in shares) for name in names}
        metrics: Metrics = {}
        for name, value in reduced.items():
            if name.endswith("/numerator"):
                key = name.removesuffix("/numerator")
                metrics[key] = value / max(1.0, reduced[f"{key}/denominator"])
            elif not name.endswith("/denominator"):
                metrics[name] = value
        for name, value in metrics.items():
            if name.startswith("loss/") and not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} at update {self.counts.updates + 1} (step {self.counts.steps + 1}); "
                    "the weights are unchanged. Lower the learning rate, or clip or normalise the reward"
                )
        return metrics

    def _step(self) -> float:
        """Clip, refuse non-finite gradients, step; returns the gradient norm before clipping."""
        named = [(name, p) for name, p in self.policy.named_parameters() if p.grad is not None]
        with self.processes.in_step():
            total = whole(get_total_norm([p.grad for _, p in named if p.grad is not None]))
        norm = float(total)
        if not math.isfinite(norm):
            # Clipping would spread NaN to every gradient, so the culprit is looked for before.
            bad = next(
                (name for name, p in named if p.grad is not None and not whole(p.grad).isfinite().all()),
                "all weights together",
            )
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


def _let_signals_in(parameter: Tensor) -> None:
    """Python hears signals when it runs, and on a CPU a backward pass may take minutes without it."""
