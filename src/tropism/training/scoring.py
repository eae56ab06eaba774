"""Log-probs and values of whole rollout batches, without gradients, in micro-batches, shared among processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tropism.training.processes import Processes, micro_batches
from tropism.types import Tokens


class ModelScorer:
    """A policy (or its reference) as a ``Scorer``.

    Args:
        active: enters the model to score with, e.g. ``Reference.active``; called once per batch.
    """

    def __init__(
        self,
        active: Callable[[], AbstractContextManager[Any]],
        processes: Processes,
        *,
        max_tokens: int,
        max_rows: int | None,
    ) -> None:
        self.active = active
        self.processes = processes
        self.max_tokens, self.max_rows = max_tokens, max_rows

    def logprobs(self, tokens: Tokens, *, temperature: float) -> Tensor:
        """[B, T] log-probs of the completion tokens, on the CPU."""
        shape = tokens.completion_ids.shape
        return self._fill(tokens, {"logprobs": shape}, temperature)["logprobs"]

    def values(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[B, T] values before each completion token and [B] after the last, on the CPU."""
        shape = tokens.completion_ids.shape
        filled = self._fill(tokens, {"values": shape, "bootstrap_values": shape[:1]}, 1.0)
        return filled["values"], filled["bootstrap_values"]

    @torch.no_grad()
    def _fill(self, tokens: Tokens, shapes: dict[str, tuple[int, ...]], temperature: float) -> dict[str, Tensor]:
        results = {name: torch.zeros(shape) for name, shape in shapes.items()}
        mine = torch.arange(self.processes.rank, len(tokens), self.processes.count)
        with self.active() as policy, self.processes.accelerator.autocast():
            plan = micro_batches(
                tokens.select(mine),
                max_tokens=self.max_tokens,
                max_rows=self.max_rows,
                without_padding=policy.without_padding,
            )
            for chosen in plan:
                rows = mine[chosen]
                part = tokens.select(rows)
                output = policy(**part.to(policy.device).inputs, temperature=temperature, want=frozenset(shapes))
                for name, result in results.items():
                    value = getattr(output, name).float().cpu()
                    if value.dim() == 2:
                        result[rows, : value.shape[1]] = value
                    else:
                        result[rows] = value
        if self.processes.count == 1:
            return results
        device = self.processes.accelerator.device
        return {name: self.processes.sum(result.to(device)).cpu() for name, result in results.items()}
