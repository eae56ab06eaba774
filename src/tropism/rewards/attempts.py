"""One attempt to score some rows by one function: what it said, or why it came to nothing.

Nothing here imports torch, because worker processes do this too.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tropism.errors import RewardError
from tropism.rewards.calling import (
    MissingArgumentError,
    TermLog,
    TryAgainError,
    call_reward,
    run_arguments,
    without_gradients,
)
from tropism.rewards.raw import ReturnError, RowError, Value, checked_values
from tropism.rewards.registry import RewardFn


@dataclass(frozen=True, kw_only=True)
class Call:
    """Rows that are scored together by one term."""

    data: Mapping[str, list[Any]]
    """What there is of N rows, by name: N values each."""
    token_counts: list[int]
    """[N] tokens of each completion."""
    state: Mapping[str, int | float] | None
    """Progress of the run; None where rewards are kept in a cache, so that they cannot depend on it, nor log."""

    def __len__(self) -> int:
        return len(self.token_counts)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a function said of the N rows of a call."""

    values: list[Value]
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    extras: Mapping[str, list[Any]] = field(default_factory=dict)


class CallError(Exception):
    """An attempt that came to nothing.

    Args:
        what: goes on where "reward 'warmth', after step 3" ends: " raised KeyError: 'label'", ": the server is gone".
        row: the row of the call that it is about, where it is about one.
        again: whether another attempt may do better.
        timed_out: it took too long.
        missing: the function asks for something that is not there.
        wait: seconds to wait at least before another attempt.
    """

    def __init__(
        self,
        what: str,
        *,
        row: int | None = None,
        again: bool = False,
        timed_out: bool = False,
        missing: bool = False,
        wait: float = 0.0,
    ) -> None:
        super().__init__(what)
        self.what, self.row, self.again = what, row, again
        self.timed_out, self.missing, self.wait = timed_out, missing, wait

    def fields(self) -> dict[str, Any]:
        """The arguments that make it again in another process."""
        return dict(vars(self))


def attempt(function: RewardFn, call: Call, wait_for: Callable[[Any], Any]) -> Said:
    """Call a function once and check what it returns and logs; ``wait_for`` gives the result of an awaitable.

    Raises:
        CallError: it raised, or returned or logged something unusable.
    """
    log = TermLog()
    try:
        with without_gradients():
            returned = begin(function, call, log)
            return finish(wait_for(returned) if inspect.isawaitable(returned) else returned, call, log)
    except (Exception, SystemExit) as error:  # sys.exit() in a reward must not end a run as if all were well
        raise failure_of(error) from error


def begin(function: RewardFn, call: Call, log: TermLog) -> Any:
    """Call a function on fresh lists, which it may change."""
    data = {name: [v.copy() if type(v) is list else v for v in values] for name, values in call.data.items()}
    return call_reward(function, data if call.state is None else data | run_arguments(call.state, log))


def finish(returned: Any, call: Call, log: TermLog) -> Said:
    """What it returned and logged, checked."""
    values = checked_values(returned, call.token_counts)
    log.check(len(call))
    return Said(values=values, metrics=log.metrics, extras=log.extras)


def failure_of(error: BaseException) -> CallError:
    """What an error means for its call: exceptions may be tried again, wrong returns and wrong data may not."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, MissingArgumentError):
        return CallError(f" {error}", missing=True)
    if isinstance(error, RowError):
        return CallError(f": {error}", row=error.row)
    if isinstance(error, ReturnError):
        return CallError(f" {error}")
    if isinstance(error, TryAgainError):
        return CallError(f": {error}", again=True, wait=error.wait)
    if isinstance(error, RewardError):  # a reward of the library says itself what is wrong
        return CallError(f": {error}")
    return CallError(f" raised {type(error).__name__}: {error}{_location(error)}", again=True)


def _location(error: BaseException) -> str:
    """Where in the user's code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
