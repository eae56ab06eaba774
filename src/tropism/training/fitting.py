"""Work on micro-batches that is done again with smaller ones where memory runs out, by all processes alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tropism.errors import NoRoomError
from tropism.out_of_memory import BatchSize, is_out_of_memory, reason_of, warnings_to
from tropism.training.processes import Processes

logger = logging.getLogger("tropism")

Part = TypeVar("Part")
Result = TypeVar("Result")
Plan = Callable[[int], Sequence[Tensor]]
"""From a budget of tokens to the rows of each micro-batch; a budget of 1 gives every row its own."""


def memory_warnings(processes: Processes, warn: Callable[[str], None]) -> AbstractContextManager[None]:
    """A block in which the run's ``warn`` tells of halved batches.

    What a process samples and scores by itself it alone knows of; other processes than the first write it to the log.
    """
    if processes.is_main:
        return warnings_to(warn)
    return warnings_to(lambda message: logger.error("process %d: %s", processes.rank, message))


@dataclass(frozen=True, kw_only=True)
class _TooLarge:
    """What became of a process's work that did not fit."""

    tried: int
    budget: int
    """Tokens with which the micro-batch that failed is split."""
    reason: str


class Fitting:
    """The budget of tokens of a kind of pass, which halves when memory runs out.

    Each process finds out by itself whether its part fits; they meet after the work, as ever, and if it did not fit on
    one of them, all do theirs again with its smaller budget. Sharded weights are exchanged in the middle of a pass,
    where a process cannot turn back without leaving the others waiting: there the error ends the run.

    Args:
        of: the kind of pass, such as "the update".
        times: how many times ``trainer.micro_batch_tokens`` the budget is.
    """

    def __init__(self, processes: Processes, *, of: str, times: int = 1) -> None:
        self.processes = processes
        self.size = BatchSize(
            f"tokens in a micro-batch of {of}",
            setting="trainer.micro_batch_tokens",
            times=times,
            advice="Shorten prompts or completions, choose a smaller model, or set model.gradient_checkpointing, lora "
            "or model.quantization",
        )

    def together(
        self,
        plan: Plan,
        parts_of: Callable[[Sequence[Tensor]], Sequence[Part]],
        work: Callable[[Iterable[Part]], Result],
        *,
        budget: int,
        alone: bool = True,
        undo: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """What ``work`` makes of this process's parts, of every process, in order of rank.

        Args:
            plan: of this process's rows. parts_of: the parts of a plan; all processes call it together.
            budget: tokens of a micro-batch, as long as they fit.
            alone: see ``Processes.together``.
            undo: takes back what a failed attempt has left behind.

        Raises:
            NoRoomError: a part of one row does not fit, or weights are sharded.
        """
        while True:
            now = self.size.at_most(budget)
            rows = plan(now)
            attempt = _Attempt(now, rows, parts_of(rows))
            shares = self.processes.together(lambda a=attempt: self._try(a, work, plan, alone), alone=alone)  # type: ignore[misc]
            del attempt
            failed = [share for share in shares if isinstance(share, _TooLarge)]
            if not failed:
                return [share for share in shares if not isinstance(share, _TooLarge)]
            undo()
            worst = min(failed, key=lambda share: share.budget)
            self.size.lower(worst.tried, worst.budget, worst.reason)

    def _try(
        self, attempt: _Attempt[Part], work: Callable[[Iterable[Part]], Result], plan: Plan, alone: bool
    ) -> Result | _TooLarge:
        try:
            return work(attempt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not alone:
                raise NoRoomError(
                    f"out of memory with up to {attempt.budget} {self.size.what} ({reason_of(error)}). Weights are "
                    "sharded, so no process can begin again by itself; set trainer.micro_batch_tokens to half"
                ) from error
            if len(attempt.at_work) < 2 or attempt.budget < 2:
                raise self.size.no_room(error) from error
            reason = reason_of(error)
        return _TooLarge(tried=attempt.budget, budget=self._smaller(plan, attempt), reason=reason)

    @staticmethod
    def _smaller(plan: Plan, attempt: _Attempt[Part]) -> int:
        """The first half, quarter, ... of the budget with which the micro-batch that failed is split.

        Not simply half of it: a batch may have fewer tokens than the budget allows.
        """
        together = set(attempt.at_work.tolist())
        budget = attempt.budget // 2
        while budget > 1 and any(together <= set(rows.tolist()) for rows in plan(budget)):
            budget //= 2
        return budget


class _Attempt(Generic[Part]):
    """Parts in the order of their computation, the budget they were made by, and the rows of the one at work."""

    def __init__(self, budget: int, rows: Sequence[Tensor], parts: Sequence[Part]) -> None:
        self.budget, self.rows, self.parts = budget, rows, parts
        self.at_work = torch.zeros(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Part]:
        # Under sharding there may be further parts, without rows.
        for place, part in enumerate(self.parts):
            self.at_work = self.rows[place] if place < len(self.rows) else self.at_work[:0]
            yield part
