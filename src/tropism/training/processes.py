"""The processes of a run: who does which rows, and how results come together. With one process everything is local."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from tropism.types import Tokens, first_with_same_prompt

T = TypeVar("T")

GATHERED = 4
"""Without padding, attention alone works on padded rows; they may have this many times the tokens of a micro-batch."""


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


def micro_batches(tokens: Tokens, *, max_tokens: int, max_rows: int | None, without_padding: bool) -> list[Tensor]:
    """Rows split into micro-batches for a model that computes pads, or one that does not."""
    if without_padding:
        return plan_shared_micro_batches(tokens, max_tokens=max_tokens, max_rows=max_rows)
    return plan_micro_batches(tokens.total_lengths, max_tokens=max_tokens, max_rows=max_rows)


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


def plan_shared_micro_batches(tokens: Tokens, *, max_tokens: int, max_rows: int | None = None) -> list[Tensor]:
    """Rows split into micro-batches for a model that computes real tokens alone, and equal prompts once.

    Rows with the same prompt stay together as long as they fit; the longest come first, so that a micro-batch has rows
    of similar length.

    Args:
        max_tokens: most tokens of a micro-batch, prompts that its rows share counted once; a longer single row stands
            alone.

    Returns:
        Index tensors that cover every row once.
    """
    first = first_with_same_prompt(tokens.prompt_ids, tokens.prompt_lengths).tolist()
    prompts, completions = tokens.prompt_lengths.tolist(), tokens.completion_lengths.tolist()
    longest: dict[int, int] = {}
    for row, group in enumerate(first):
        longest[group] = max(longest.get(group, 0), prompts[row] + completions[row])
    order = sorted(range(len(first)), key=lambda row: (-longest[first[row]], first[row]))
    plan: list[list[int]] = []
    size, widest, seen = 0, 0, set[int]()
    for row in order:
        cost = completions[row] + (0 if first[row] in seen else prompts[row])
        wide = max(widest, longest[first[row]])
        rows = len(plan[-1]) if plan else 0
        full = size + cost > max_tokens or (rows + 1) * wide > GATHERED * max_tokens
        if not plan or full or (max_rows is not None and rows == max_rows):
            plan.append([])
            size, seen, cost, wide = 0, set(), prompts[row] + completions[row], longest[first[row]]
        plan[-1].append(row)
        size, widest = size + cost, wide
        seen.add(first[row])
    return [torch.tensor(rows) for rows in plan]
