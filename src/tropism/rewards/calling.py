"""How a reward function is called: by name, with what it asks for, sync or async.

Nothing here imports torch, because worker processes do this too and most rewards need none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropism.errors import RewardError
from tropism.rewards.raw import ReturnError
from tropism.rewards.registry import RewardFn

if TYPE_CHECKING:
    from tropism.types import RewardInputs

DATA_ARGUMENTS = ("prompts", "completions", "completion_ids", "finish_reasons")
"""What the library tells of each completion, beside the columns of the data."""

RUN_ARGUMENTS = ("trainer_state", "log_metric", "log_extra")
"""What concerns the run rather than a completion."""

OWN_ARGUMENTS = (*DATA_ARGUMENTS, *RUN_ARGUMENTS)

_TRL_NAMES = {"global_step": "step", "max_steps": "total_steps"}


class TrainerState(Mapping[str, Any]):
    """Training progress as reward functions see it: ``state["step"]`` or ``state.step``.

    TRL's attribute names ``global_step`` and ``max_steps`` work too.
    """

    def __init__(self, values: Mapping[str, int | float]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> int | float:
        return self._values[_TRL_NAMES.get(name, name)]

    def __getattr__(self, name: str) -> int | float:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            known = ", ".join([*self._values, *(trl for trl, own in _TRL_NAMES.items() if own in self._values)])
            raise AttributeError(f"trainer_state has no {name!r}; it has: {known or 'nothing'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class TermLog:
    """What one reward function logged in one call: the targets of ``log_metric`` and ``log_extra``."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number for this batch; several values of a name are averaged, those that are not finite left out."""
        number = float(value)
        if math.isfinite(number):
            self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Log one value per completion, at once or in consecutive parts, beside the rollouts."""
        self.extras.setdefault(str(column), []).extend(values)

    def check(self, rows: int) -> None:
        """Refuse columns without one value per completion of the call, and metrics under the library's names.

        Raises:
            ReturnError: says what was logged.
        """
        for column, values in self.extras.items():
            if len(values) != rows:
                raise ReturnError(f"logged {len(values)} values as {column!r} for {rows} completions")
        for metric in self.metrics:
            if metric == "reward" or metric.startswith("reward/"):
                raise ReturnError(f"logs {metric!r}: reward/ is the library's, rename it")


class TryAgainError(RewardError):
    """A failure that may pass: the call is made again where its term has retries left, not before ``wait`` seconds."""

    def __init__(self, message: str, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class MissingArgumentError(RewardError):
    """A reward function asks for something that neither the library nor the data has; never skipped."""


def row_data(inputs: RewardInputs) -> dict[str, list[Any]]:
    """Everything there is of each completion: one list of B values per name. The library's names hide columns."""
    return {**inputs.columns, **{name: getattr(inputs, name) for name in DATA_ARGUMENTS}}


def run_arguments(state: Mapping[str, int | float], log: TermLog) -> dict[str, Any]:
    """The arguments of ``RUN_ARGUMENTS``."""
    return {"trainer_state": TrainerState(state), "log_metric": log.log_metric, "log_extra": log.log_extra}


@dataclass(frozen=True, kw_only=True)
class Asks:
    """The arguments that a function asks for."""

    names: frozenset[str]
    needed: frozenset[str]
    """Those of them without a default."""
    everything: bool
    """It has ``**kwargs``."""

    def of(self, available: Iterable[str]) -> list[str]:
        """Those of the available names that it asks for."""
        return [name for name in available if self.everything or name in self.names]

    def check(self, available: Collection[str]) -> None:
        """Raises: MissingArgumentError: an argument that it needs is not there; names it and what is available."""
        for name in sorted(self.needed - set(available)):
            raise MissingArgumentError(
                f"needs the argument {name!r}, which is not there; available: {', '.join(available)}"
            )


def asked_by(function: RewardFn) -> Asks:
    """What a reward function asks for; a builtin that does not reveal its signature gets the completions."""
    parameters, bound = _parameters(function), _bound_keywords(function)
    if parameters is None:
        return Asks(names=frozenset({"completions"}), needed=frozenset(), everything=False)
    own = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in bound]
    return Asks(
        names=frozenset(p.name for p in own),
        needed=frozenset(p.name for p in own if p.default is p.empty),
        everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def call_reward(function: RewardFn, available: Mapping[str, Any]) -> Any:
    """Call with those of the available arguments that the function asks for; an async one gives an awaitable.

    A parameter the caller does not have keeps its default; ``**kwargs`` receives everything; a builtin that does not
    reveal its signature is given the completions.

    Raises:
        MissingArgumentError: a parameter without a default is not available; names it and what is.
    """
    asked_by(function).check(available)
    parameters = _parameters(function)
    if parameters is None:
        return function(available["completions"])
    positional: list[Any] = []
    named: dict[str, Any] = {}
    bound = _bound_keywords(function)
    for parameter in parameters:
        name = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= {key: value for key, value in available.items() if key not in bound}
        elif parameter.kind is parameter.VAR_POSITIONAL or name in bound:
            continue
        elif name in available:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(available[name])
            else:
                named[name] = available[name]
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(parameter.default)
    return function(*positional, **named)


def without_gradients() -> contextlib.AbstractContextManager[Any]:
    """``torch.no_grad`` where torch is loaded."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()


def is_async(function: RewardFn) -> bool:
    """Whether calling it gives a coroutine, as far as one can tell without calling it."""
    function = unwrapped(function)
    if inspect.isfunction(function) or inspect.ismethod(function):
        return inspect.iscoroutinefunction(function)
    return inspect.iscoroutinefunction(type(function).__call__)


def unwrapped(function: RewardFn) -> RewardFn:
    """The function inside of partials."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _parameters(function: RewardFn) -> list[inspect.Parameter] | None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(function, torch.nn.Module):
        function = function.forward  # a module's own ``__call__`` takes anything and hands it to ``forward``
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _bound_keywords(function: RewardFn) -> set[str]:
    """Keywords that partials have fixed: they win over data columns of the same name."""
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        bound |= set(function.keywords)
        function = function.func
    return bound


class AsyncRunner:
    """One event loop in a thread of its own, kept for the whole run.

    A thread, so that it works where the caller already runs a loop (a notebook); kept, because clients made by async
    reward functions (HTTP sessions) belong to the loop they were first used in.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, awaitable: Any) -> Any:
        """What an awaitable gives. From several threads at once, they run concurrently.

        An interrupt of the caller ends the awaitable too.
        """
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name="tropism-rewards", daemon=True).start()
            loop = self._loop
        future = asyncio.run_coroutine_threadsafe(_awaited(awaitable), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            loop.call_soon_threadsafe(_forget, awaitable)
            raise

    def cancel(self) -> None:
        """End whatever is under way."""
        with self._lock:
            loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])

    def close(self) -> None:
        """Stop the loop; the next ``run`` would start another."""
        self.cancel()
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None


def _forget(awaitable: Any) -> None:
    """Close a coroutine that was cancelled before it began, or it would complain of never having been awaited."""
    if inspect.iscoroutine(awaitable) and inspect.getcoroutinestate(awaitable) == inspect.CORO_CREATED:
        awaitable.close()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Until it is stopped; then its descriptors are given back."""
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
