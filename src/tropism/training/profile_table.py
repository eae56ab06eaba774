"""From the events of ``torch.profiler`` to a table of stages and the operators inside each."""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STAGE = "stage/"
"""Begins the names of ranges that are stages."""
STEP = "step"
"""The outermost stage."""
TOP_OPERATORS = 6
"""Operators shown of each stage."""
SMALL = 0.01
"""Stages whose own operators and Python take less than this share of the step are shown without them."""
_WIDTH = 43


@dataclass(frozen=True, slots=True)
class Event:
    """One call of an operator, one stage, or one kernel of a GPU. Times in nanoseconds."""

    name: str
    start: int
    end: int
    thread: int = 0
    flops: int = 0
    """Floating-point operations of a matrix product."""
    number: int = 0
    """What kernels that an operator launched name as their ``launched_by``."""
    launched_by: int | None = None
    """Of a kernel of a GPU: the number of its operator. None: this ran on the CPU."""


@dataclass
class OperatorTime:
    """All calls of one operator inside a stage, without what they called in turn."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    flops: int = 0

    def add(self, seconds: float, *, flops: int) -> None:
        self.calls += 1
        self.seconds += seconds
        self.flops += flops

    @property
    def rate(self) -> float:
        """FLOP/s while it ran (its kernels, where it has some)."""
        seconds = self.kernel_seconds or self.seconds
        return self.flops / seconds if seconds else 0.0


@dataclass
class StageTime:
    """All passes through one stage."""

    path: tuple[str, ...]
    """From the outermost stage to this one."""
    calls: int = 0
    seconds: float = 0.0
    """Between entering and leaving, parts included."""
    python_seconds: float = 0.0
    """In none of its parts and in no operator: Python, and waiting."""
    operators: dict[str, OperatorTime] = field(default_factory=dict)
    """Of this stage itself, not of its parts."""

    def add(self, seconds: float, *, python_seconds: float) -> None:
        self.calls += 1
        self.seconds += seconds
        self.python_seconds += python_seconds

    @property
    def own_seconds(self) -> float:
        """In its operators and its Python, without its parts."""
        return self.python_seconds + sum(operator.seconds for operator in self.operators.values())

    def operator(self, name: str) -> OperatorTime:
        return self.operators.setdefault(name, OperatorTime(name))


def read_events(profiler: Any) -> list[Event]:
    """The events of a stopped ``torch.profiler.profile``.

    They are read as they were recorded: the profiler's own ``events()`` makes a tree of Python objects of them, which
    takes fifty times as long and more memory than the recording.
    """
    events = []
    for event in profiler.profiler.kineto_results.events():
        on_cpu = event.device_type().name == "CPU"
        nested = not event.is_async() and event.start_thread_id() == event.end_thread_id()
        if event.is_hidden_event() or (on_cpu and not nested) or (not on_cpu and event.is_user_annotation()):
            continue  # the last is a GPU's copy of a range
        name = sys.intern(event.name())
        events.append(
            Event(
                name=name,
                start=event.start_ns(),
                end=event.start_ns() + event.duration_ns(),
                thread=event.start_thread_id(),
                flops=product_flops(name, event.shapes()) if name in PRODUCTS else 0,
                # Calls of a GPU's runtime have numbers of another kind, which may be equal to an operator's.
                number=0 if event.linked_correlation_id() else event.correlation_id(),
                launched_by=None if on_cpu else event.linked_correlation_id(),
            )
        )
    return events


PRODUCTS = {
    "aten::mm": (0, -1),
    "aten::bmm": (0, -1),
    "aten::addmm": (1, -1),
    "aten::baddbmm": (1, -1),
    "mkldnn::_linear_pointwise": (0, 0),
}
"""Matrix products: the place of the left matrix, which the right one follows, and the right one's axis of columns."""


def product_flops(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Floating-point operations of one of ``PRODUCTS``: 2 * rows * inner * columns.

    Args:
        name: of the operator.
        shapes: of its arguments.
    """
    argument, axis = PRODUCTS[name]
    return 2 * math.prod(shapes[argument]) * shapes[argument + 1][axis]


def stage_times(events: Sequence[Event]) -> list[StageTime]:
    """Seconds of every stage and of the operators inside it, in order of first entry; the first is the outermost.

    The stages' thread is taken apart without remainder: a stage's seconds are those of its parts, its operators and its
    ``python_seconds``. Operators of other threads (the backward pass on a GPU) count for the stage in which they began.
    """
    on_cpu = sorted((e for e in events if e.launched_by is None), key=lambda e: (e.start, -e.end))
    main = next((e.thread for e in on_cpu if e.name.startswith(STAGE)), None)
    stages: dict[tuple[str, ...], StageTime] = {}
    own: dict[int, OperatorTime] = {}
    marks = _walk([e for e in on_cpu if e.thread == main], None, stages, own)
    for thread in {e.thread for e in on_cpu} - {main}:
        _walk([e for e in on_cpu if e.thread == thread], marks, stages, own)
    for event in events:
        if event.launched_by in own:
            own[event.launched_by].kernel_seconds += (event.end - event.start) / 1e9
    return list(stages.values())


Marks = tuple[list[int], list[tuple[str, ...]]]
"""Times at which the innermost stage changes, and the stage from each on."""


@dataclass
class _Open:
    """An event that has begun and not ended."""

    event: Event
    path: tuple[str, ...]
    inside: float = 0.0
    """Seconds of what it called."""


def _walk(
    events: Sequence[Event], marks: Marks | None, stages: dict[tuple[str, ...], StageTime], own: dict[int, OperatorTime]
) -> Marks:
    """Add up the events of one thread, which are nested; without ``marks`` it is the stages' thread."""
    changes: Marks = ([], [])
    stack: list[_Open] = []

    def leave() -> None:
        left = stack.pop()
        event, spent = left.event, (left.event.end - left.event.start) / 1e9
        if marks is None and event.name.startswith(STAGE):
            stages[left.path].add(spent, python_seconds=spent - left.inside)
            changes[0].append(event.end)
            changes[1].append(left.path[:-1])
        elif left.path in stages:
            own[event.number] = stages[left.path].operator(event.name)
            own[event.number].add(spent - left.inside, flops=event.flops)
        if stack:
            stack[-1].inside += spent

    for event in events:
        while stack and stack[-1].event.end <= event.start:
            leave()
        if marks is None:
            path = stack[-1].path if stack else ()
        else:
            index = bisect.bisect_right(marks[0], event.start) - 1
            path = marks[1][index] if index >= 0 else ()
        if marks is None and event.name.startswith(STAGE):
            path = (*path, event.name.removeprefix(STAGE))
            stages.setdefault(path, StageTime(path))
            changes[0].append(event.start)
            changes[1].append(path)
        stack.append(_Open(event, path))
    while stack:
        leave()
    return changes


def format_table(stages: Sequence[StageTime], *, first_step: int, steps: int) -> str:
    """The stages with seconds, share of the step and GFLOP/s; then the operators of each by their own time.

    Args:
        stages: of ``stage_times``.
        first_step: number of the first recorded step.
        steps: how many were recorded.
    """
    stages = [one for one in stages if one.path[0] == STEP]  # without what happened between two steps
    if not stages:
        return "no stage was recorded\n"
    whole = stages[0].seconds or 1e-9
    on_gpu = any(o.kernel_seconds for s in stages for o in s.operators.values())
    which = f"step {first_step}" if steps == 1 else f"steps {first_step} to {first_step + steps - 1}"
    lines = [f"Where {which} went: {whole:.3f} s, what recording cost included", ""]
    lines += [_row("stage", "calls", "seconds", "share", "GFLOP/s"), *_stage_rows(stages, whole), ""]
    lines.append("Operators by their own time, without what they call in turn")
    for one in (*stages[1:], stages[0]):
        if one.own_seconds >= SMALL * whole:
            lines += ["", *_operator_rows(one, whole, on_gpu=on_gpu)]
    return "\n".join(lines) + "\n"


def _stage_rows(stages: Sequence[StageTime], whole: float) -> list[str]:
    """One row per stage, parts below what they are parts of, and what no part holds; these rows add up."""
    rows = []

    def show(one: StageTime, depth: int) -> None:
        parts = [s for s in stages if s.path[:-1] == one.path]
        if depth >= 0:
            rows.append(_seconds("  " * depth + one.path[-1], one.calls, one.seconds, whole, _flops(one, stages)))
        for part in parts:
            show(part, depth + 1)
        if parts:
            rest = one.seconds - sum(part.seconds for part in parts)
            rows.append(_seconds("  " * (depth + 1) + "the rest", None, rest, whole, 0.0))

    show(stages[0], -1)
    rows.append(_seconds("together", None, whole, whole, _flops(stages[0], stages)))
    return rows


def _flops(one: StageTime, stages: Sequence[StageTime]) -> float:
    """Floating-point operations per second of a stage, parts included."""
    inside = [s for s in stages if s.path[: len(one.path)] == one.path]
    return sum(o.flops for s in inside for o in s.operators.values()) / (one.seconds or 1e-9)


def _operator_rows(one: StageTime, whole: float, *, on_gpu: bool) -> list[str]:
    """The operators with the most time of their own (on a GPU: of their kernels), and what is left of the stage."""
    ranked = sorted(one.operators.values(), key=lambda o: o.kernel_seconds if on_gpu else o.seconds, reverse=True)

    def row(name: str, calls: int, seconds: float, rate: float, kernels: float) -> str:
        return _seconds("  " + name, calls, seconds, whole, rate, f"{kernels:.3f}" if on_gpu else "")

    heading = " / ".join(one.path[1:]) or "the rest of the step"
    rows = [_row(heading, "calls", "seconds", "share", "GFLOP/s", "kernels" if on_gpu else "")]
    rows += [row(o.name, o.calls, o.seconds, o.rate, o.kernel_seconds) for o in ranked[:TOP_OPERATORS]]
    others = ranked[TOP_OPERATORS:]
    if others:
        calls, seconds = sum(o.calls for o in others), sum(o.seconds for o in others)
        kernels = sum(o.kernel_seconds for o in others)
        rows.append(row(f"{len(others)} other operators", calls, seconds, 0.0, kernels))
    rows.append(_seconds("  outside of operators", None, one.python_seconds, whole, 0.0))
    return rows


def _seconds(name: str, calls: int | None, seconds: float, whole: float, rate: float, last: str = "") -> str:
    """One row; a rate below 0.05 GFLOP/s says nothing and is left out."""
    shown = f"{rate / 1e9:.1f}" if rate >= 5e7 else ""
    share = f"{100 * seconds / whole:.1f} %"
    return _row(name, "" if calls is None else str(calls), f"{seconds:.3f}", share, shown, last)


def _row(name: str, calls: str, seconds: str, share: str, rate: str, last: str = "") -> str:
    name = name if len(name) <= _WIDTH else name[: _WIDTH - 3] + "..."
    return f"{name:<{_WIDTH}}{calls:>8}{seconds:>10}{share:>9}{rate:>9}{last:>9}".rstrip()
