"""The processes of a run: who does which rows, and how results come together. With one process everything is local."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

T = TypeVar("T")


class Processes:
    """Thin layer over accelerate."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> tuple[int, Sequence[T]]:
        """This process's contiguous part of ``items``, and the index at which it begins."""
        first, last = (len(items) * r // self.count for r in (self.rank, self.rank + 1))
        return first, items[first:last]

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, joined in order of rank, on every process."""
        return items if self.count == 1 else gather_object(items)

    def from_main(self, value: T) -> T:
        """The value that the first process has, on every process."""
        if self.count == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return tensor if self.count == 1 else self.accelerator.reduce(tensor, reduction="sum")

    def maximum(self, value: int) -> int:
        """The largest of the processes' values."""
        return value if self.count == 1 else max(gather_object([value]))

    def any(self, value: bool) -> bool:
        """Whether it is true on any process."""
        return value if self.count == 1 else bool(self.maximum(int(value)))

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()


def plan_micro_batches(lengths: Tensor, *, max_tokens: int, max_rows: int | None = None) -> list[Tensor]:
    """Rows split into micro-batches of similar length.

    Args:
        lengths: [B] tokens of each row.
        max_tokens: most padded tokens (rows x longest) of a micro-batch; a longer single row stands alone.

    Returns:
        Index tensors that cover every row once, longest rows first.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    plan: list[Tensor] = []
    begin = 0
    while begin < len(order):
        longest = max(1, int(lengths[order[begin]]))
        rows = max(1, max_tokens // longest)
        rows = rows if max_rows is None else min(rows, max_rows)
        plan.append(order[begin : begin + rows])
        begin += rows
    return plan
