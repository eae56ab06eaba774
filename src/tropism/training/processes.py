"""The processes of a run: who does which rows, and how results come together. With one process everything is local."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from tropism.errors import ModelError
from tropism.training.bulletin import Bulletin, Failure
from tropism.training.interrupt import CalledOffError, Interrupted, Interrupts, ProcessLostError
from tropism.types import Tokens, first_with_same_prompt

T = TypeVar("T")

GATHERED = 4
"""Without padding, attention alone works on padded rows; they may have this many times the tokens of a micro-batch."""
BUCKET = 2**24
"""Numbers of gradients that are sent to the other processes at once."""
LAST_WORDS = 5.0
"""Seconds in which the cause of a broken connection has to become known."""


@dataclass(frozen=True, kw_only=True)
class _Outcome(Generic[T]):
    """What became of one process's part of a common work."""

    values: tuple[T, ...] = ()
    signal: int | None = None
    failure: Failure | None = None


class Processes:
    """Thin layer over accelerate, in which no process waits for one that cannot come.

    What processes do apart from each other goes through ``together``: an error or a signal that one of them meets there
    ends the work of all of them, and each raises it. Should one die, whoever waits for it raises ``ProcessLostError``.
    """

    def __init__(self, accelerator: Accelerator, interrupts: Interrupts | None = None) -> None:
        self.accelerator = accelerator
        self.interrupts = Interrupts() if interrupts is None else interrupts
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        if self.count > 1:
            self.interrupts.bulletin = Bulletin.of_group(rank=self.rank, count=self.count)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def leave_talking_to_main(self) -> None:
        """Drop warnings in every process but the first, which gives them, too."""
        if not self.is_main:
            logging.getLogger("tropism").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")

    def share(self, items: Sequence[T]) -> tuple[int, Sequence[T]]:
        """This process's contiguous part of ``items``, and the index at which it begins."""
        first, last = (len(items) * r // self.count for r in (self.rank, self.rank + 1))
        return first, items[first:last]

    def together(self, work: Callable[[], T], *, abandon: bool = True, alone: bool = True) -> list[T]:
        """What ``work`` returns in each process, in order of rank, in every process.

        Args:
            abandon: whether the work may be thrown away, at any moment, once a signal has come.
            alone: whether no process needs the others during the work. Where it does (sharded weights are exchanged in
                every pass) it is done ``in_step``, and asks ``agree_to_go_on`` by itself.

        Raises:
            Interrupted: a process received a signal.
            Exception: what a process raised, in all of them; the others name it.
            ProcessLostError: a process is no longer there.
        """
        if self.count == 1:
            with self._abandonable(abandon):
                return [work()]
        outcome: _Outcome[T] = _Outcome()
        cause: Exception | None = None
        try:
            with self._abandonable(abandon) if alone else self.in_step():
                outcome = _Outcome(values=(work(),))
        except Interrupted as interruption:
            if interruption.left_alone:
                raise
            outcome = _Outcome(signal=interruption.signal_number)
        except CalledOffError:
            pass
        except Exception as error:
            if not alone or hasattr(error, "failure") or isinstance(error, ProcessLostError):
                raise  # somebody will not come to a meeting
            cause, outcome = error, _Outcome(failure=Failure.of(self.rank, error))
            self.interrupts.call_off()
        outcomes = self.gather([outcome])
        self._raise_what_ended(outcomes, cause)
        return [value for outcome in outcomes for value in outcome.values]

    @contextmanager
    def _abandonable(self, may: bool) -> Iterator[None]:
        if not may:
            yield
            return
        with self.interrupts.abandonable():
            yield

    def _raise_what_ended(self, outcomes: Sequence[_Outcome[T]], cause: Exception | None) -> None:
        numbers = [outcome.signal for outcome in outcomes if outcome.signal is not None]
        if numbers:
            self.interrupts.received = self.interrupts.received or numbers[0]
            raise Interrupted(numbers[0])
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        if failures:
            raise failures[0].as_error() from cause
        if any(not outcome.values for outcome in outcomes):  # called off by one that has left
            raise self._why_alone(None)

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, joined in order of rank, on every process."""
        if self.count == 1:
            return items
        with self._meeting():
            return gather_object(items)  # type: ignore[no-any-return]

    def from_main(self, value: T) -> T:
        """The value that the first process has, on every process."""
        if self.count == 1:
            return value
        box = [value]
        with self._meeting():
            broadcast_object_list(box)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        if self.count == 1:
            return tensor
        with self._meeting():
            return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[no-any-return]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place; one that is missing here counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with self._meeting():
                dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def maximum(self, value: int) -> int:
        """The largest of the processes' values."""
        return max(self.gather([value]))

    def signal_anywhere(self) -> int | None:
        """The signal that any of the processes has received; all ask together, and get the same answer."""
        number = self.maximum(self.interrupts.received or 0) or None
        self.interrupts.received = number
        return number

    def agree_to_go_on(self) -> None:
        """End work that processes do in step, once any of them has received a signal; all ask together.

        Raises:
            Interrupted: on every process.
        """
        number = self.signal_anywhere()
        if number is not None:
            raise Interrupted(number)

    def check_same_weights(self, module: nn.Module) -> None:
        """See that all processes begin with the same weights.

        Raises:
            ModelError: they do not.
        """
        if self.count == 1:
            return
        sums = {name: float(p.detach().sum(dtype=torch.float64)) for name, p in module.named_parameters()}
        for rank, other in enumerate(self.gather([sums])):
            odd = [name for name, value in sums.items() if other.get(name) != value]
            if odd:
                raise ModelError(
                    f"process {rank} has another model than process {self.rank}: {len(odd)} weights differ, for "
                    f"instance {odd[0]}. Load the same weights in all processes, or make them from the same seed"
                )

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather([None])

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """A block in which processes wait for each other all along, as those that share sharded weights do.

        No signal interrupts it. Errors of its own are raised as they are, but for those that another process caused by
        leaving or dying: then its error, ``Interrupted`` or ``ProcessLostError`` is.
        """
        if self.count == 1:
            yield
            return
        try:
            with self.interrupts.meeting():
                yield
        except RuntimeError as error:
            of_connection = type(error) is RuntimeError or isinstance(error, dist.DistError)
            cause = self._last_words() if of_connection and not hasattr(error, "failure") else None
            if cause is None:
                raise
            raise cause from error

    @contextmanager
    def entered(self, block: AbstractContextManager[object]) -> Iterator[None]:
        """A block that all processes enter ``in_step``, and leave by themselves."""
        with ExitStack() as stack:
            with self.in_step():
                stack.enter_context(block)
            yield

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """A block that waits for the other processes, and says why, should they not come."""
        try:
            with self.interrupts.meeting():
                yield
        except RuntimeError as error:
            raise self._why_alone(error) from error

    def _why_alone(self, error: RuntimeError | None) -> BaseException:
        """What ended another process, so that this one waits in vain."""
        broken = ProcessLostError(f"the connection to another process of this run broke: {error}")
        return self._last_words() or broken

    def _last_words(self) -> BaseException | None:
        """What ended another process; None where that does not become known."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < LAST_WORDS:
            self.interrupts.hear()
            if self.interrupts.trouble is not None:
                return self.interrupts.trouble
            # Not at once: a launcher signals all processes when it sees that one has died.
            if self.interrupts.received is not None and waited > LAST_WORDS / 10:
                return Interrupted(self.interrupts.received, left_alone=True)
            time.sleep(0.05)
        return None


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one type, up to ``BUCKET`` numbers together."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or buckets[-1][-1].dtype != gradient.dtype or size + gradient.numel() > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    return buckets


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
