"""A method's own losses on batches that are not trained on, in micro-batches, shared among processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

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

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, float]:
        """Named sums over a whole batch. Every process is given all of it and computes its share."""
        mine = torch.arange(self.processes.rank, len(batch), self.processes.count)
        plan = micro_batches(
            batch.select(mine),
            max_tokens=self.max_tokens,
            max_rows=self.max_rows,
            without_padding=self.policy.without_padding,
        )
        parts = [batch.select(mine[rows]) for rows in plan]
        sharded = isinstance(self.policy, FSDPModule)
        if sharded:  # all processes gather the weights together, so that all make the same number of passes
            missing = self.processes.maximum(len(parts)) - len(parts)
            parts += [batch.select(torch.zeros(1, dtype=torch.long)).emptied()] * missing

        def compute() -> dict[str, float]:
            sums: dict[str, float] = {}
            for part in parts:
                if sharded:
                    self.processes.agree_to_go_on()
                losses, _ = self.algorithm.loss(self.policy, part.to(self.policy.device))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            return sums

        with self.processes.accelerator.autocast():
            shares = self.processes.together(compute, alone=not sharded)
        names = dict.fromkeys(name for share in shares for name in share)
        return {name: sum(share.get(name, 0.0) for share in shares) for name in names}
