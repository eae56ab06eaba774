"""A method's own losses on batches that are not trained on, in micro-batches, shared among processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tropism.training.fitting import Fitting
from tropism.training.processes import Processes, micro_batches
from tropism.types import Batch


class HasLoss(Protocol):
    """What is asked of a method."""

    def loss(self, policy: Any, batch: Any) -> tuple[Mapping[str, Tensor], Any]:
        """Named sums over the items of a batch."""
        ...


class MethodLosses:
    """The sums of ``Algorithm.loss`` without gradients.

    Args:
        policy: the policy as the trainer calls it.
        max_tokens, max_rows: most of a forward pass.
    """

    def __init__(
        self, algorithm: HasLoss, policy: Any, processes: Processes, *, max_tokens: int, max_rows: int | None
    ) -> None:
        self.algorithm, self.policy, self.processes = algorithm, policy, processes
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.fitting = Fitting(processes, of="the held-out loss", times=2)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, float]:
        """Named sums over a whole batch. Every process is given all of it and computes its share."""
        mine = torch.arange(self.processes.rank, len(batch), self.processes.count)
        own = batch.select(mine)
        sharded = isinstance(self.policy, FSDPModule)

        def plan(budget: int) -> list[Tensor]:
            unpadded = self.policy.without_padding
            return micro_batches(own, max_tokens=budget, max_rows=self.max_rows, without_padding=unpadded)

        def parts_of(rows: Sequence[Tensor]) -> list[Batch]:
            parts = [own.select(chosen) for chosen in rows]
            # Sharded weights are gathered by all processes together, so that all make the same number of passes.
            missing = self.processes.maximum(len(parts)) - len(parts) if sharded else 0
            return parts + [batch.select(torch.zeros(1, dtype=torch.long)).emptied()] * missing

        def compute(parts: Iterable[Batch]) -> dict[str, float]:
            sums: dict[str, float] = {}
            for part in parts:
                if sharded:
                    self.processes.agree_to_go_on()
                losses, _ = self.algorithm.loss(self.policy, part.to(self.policy.device))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            return sums

        with self.processes.accelerator.autocast():
            shares = self.fitting.together(plan, parts_of, compute, budget=self.max_tokens, alone=not sharded)
        names = dict.fromkeys(name for share in shares for name in share)
        return {name: sum(share.get(name, 0.0) for share in shares) for name in names}
