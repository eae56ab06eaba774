"""How a reward function is called: by name, with what it asks for, sync or async."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any

import torch

from tropism.errors import RewardError
from tropism.rewards.registry import RewardFn
from tropism.types import RewardInputs

OWN_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "finish_reasons",
    "trainer_state",
    "log_metric",
    "log_extra",
)
"""What the library offers to every reward function, beside the columns of the data."""

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


def available_arguments(inputs: RewardInputs, log: TermLog) -> dict[str, Any]:
    """Everything a reward function may ask for. The library's own names win over columns of the same name."""
    own = (
        inputs.prompts,
        inputs.completions,
        inputs.completion_ids,
        inputs.finish_reasons,
        TrainerState(inputs.trainer_state),
        log.log_metric,
        log.log_extra,
    )
    return {**inputs.columns, **dict(zip(OWN_ARGUMENTS, own, strict=True))}


def call_reward(function: RewardFn, available: Mapping[str, Any]) -> Any:
    """Call with those of the available arguments that the function asks for; an async one gives an awaitable.

    A parameter the caller does not have keeps its default; ``**kwargs`` receives everything; a builtin that does not
    reveal its signature is given the completions.

    Raises:
        RewardError: a parameter without a default that is not available; names it and what is available.
    """
    try:
        parameters = inspect.signature(_described(function)).parameters.values()
    except (TypeError, ValueError):
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
        elif parameter.default is parameter.empty:
            raise MissingArgumentError(
                f"needs the argument {name!r}, which is not there; available: {', '.join(available)}"
            )
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(parameter.default)
    with torch.no_grad():
        return function(*positional, **named)


class MissingArgumentError(RewardError):
    """A reward function asks for something that neither the library nor the data has; never skipped."""


def _described(function: RewardFn) -> Callable[..., Any]:
    """Where the signature is: a module's own ``__call__`` takes anything and hands it to ``forward``."""
    return function.forward if isinstance(function, torch.nn.Module) else function


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

    def gather(self, awaitables: Mapping[str, Awaitable[Any]]) -> dict[str, Any]:
        """Await all of them concurrently; results by name, an exception in the place of a result that failed."""
        if not awaitables:
            return {}
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="tropism-rewards", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(_gather(awaitables), self._loop)
        try:
            return future.result()
        except BaseException:  # an interrupt: what is still under way must not outlive this call
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the loop; the next ``gather`` would start another."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


def _gather(awaitables: Mapping[str, Awaitable[Any]]) -> Coroutine[Any, Any, dict[str, Any]]:
    async def run() -> dict[str, Any]:
        results = await asyncio.gather(*awaitables.values(), return_exceptions=True)
        return dict(zip(awaitables, results, strict=True))

    return run()
