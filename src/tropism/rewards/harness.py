"""Calls the reward functions of a run, checks what they return, and combines it."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tropism.errors import RewardError
from tropism.rewards.calling import (
    OWN_ARGUMENTS,
    AsyncRunner,
    MissingArgumentError,
    TermLog,
    available_arguments,
    call_reward,
)
from tropism.rewards.combine import RunningMoments, combine_rewards
from tropism.rewards.config import RewardConfig, callable_name
from tropism.rewards.raw import RawRewards, RowError, Value, checked_values
from tropism.rewards.registry import RewardFn
from tropism.rewards.resolve import resolve_reward
from tropism.types import RewardBatch, RewardInputs

logger = logging.getLogger("tropism")


class RewardHarness:
    """The reward of a run.

    ``evaluate`` calls every function once, on the rows of this process; ``combine`` turns the rows of all processes
    into rewards. ``score`` does both where there is one process.
    """

    def __init__(self, config: RewardConfig, *, allow_code: bool = False) -> None:
        self.config = config
        self.functions: dict[str, RewardFn] = {
            name: resolve_reward(term, allow_code=allow_code) for name, term in config.terms.items()
        }
        self.moments = RunningMoments()
        self._runner = AsyncRunner()
        self._warned: set[str] = set()

    def evaluate(self, inputs: RewardInputs) -> RawRewards:
        """Call every reward function once on B completions and check what it returns. With B = 0 none is called.

        Raises:
            RewardError: a function raised, or returned something unusable (unless ``on_error="skip"``), or asks for an
                argument that is not available (always).
        """
        return self._evaluate(inputs, skip=self.config.on_error == "skip")

    def dry_call(self, inputs: RewardInputs) -> RawRewards:
        """Call the functions on sample rows before training, so that a broken one fails now, ``skip`` or not."""
        return self._evaluate(inputs, skip=False)

    def combine(
        self, raw: RawRewards, lengths: Tensor, width: int, *, update_moments: bool = True, unscaled: bool = False
    ) -> RewardBatch:
        """Weighted sum, clip and scale of the gathered rows of all processes.

        Evaluation passes ``update_moments=False, unscaled=True``: the running moments stay as they are, and the reward
        is the plain weighted sum, neither clipped nor scaled. Metrics are of the plain weighted sum either way.

        Args:
            raw: what ``evaluate`` gave, of all processes (``RawRewards.concat``).
            lengths: [B] tokens of each completion.
            width: T of the per-token rewards, at least the longest length.
        """
        return combine_rewards(
            raw, self.config, self.moments, lengths, width, update_moments=update_moments, unscaled=unscaled
        )

    def score(
        self, inputs: RewardInputs, width: int | None = None, *, update_moments: bool = True, unscaled: bool = False
    ) -> RewardBatch:
        """``evaluate`` and ``combine`` in one process, ``width`` tokens wide (None: as the longest completion)."""
        lengths = torch.tensor([len(ids) for ids in inputs.completion_ids], dtype=torch.long)
        if width is None:
            width = int(lengths.max()) if len(lengths) else 0
        return self.combine(self.evaluate(inputs), lengths, width, update_moments=update_moments, unscaled=unscaled)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the running moments."""
        return self.moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the running moments of ``state_dict``."""
        self.moments.load_state_dict(state)

    def close(self) -> None:
        """Stop the event loop of async reward functions, if one was started."""
        self._runner.close()

    def _evaluate(self, inputs: RewardInputs, *, skip: bool) -> RawRewards:
        self._check_inputs(inputs)
        if len(inputs) == 0:
            return RawRewards(values={name: [] for name in self.functions})
        logs = {name: TermLog() for name in self.functions}
        outcomes = self._call(inputs, logs)
        values: dict[str, list[Value]] = {}
        metrics: dict[str, list[float]] = {}
        extras: dict[str, list[Any]] = {}
        skipped: dict[str, int] = {}
        for name, outcome in outcomes.items():
            try:
                values[name] = self._checked(name, outcome, inputs)
                self._check_extras(name, logs[name], extras, inputs)
            except MissingArgumentError:
                raise
            except RewardError as error:
                if not skip:
                    raise
                logger.warning("skipped for this batch: %s", error)
                values[name], skipped[name] = [None] * len(inputs), 1
                continue
            extras |= logs[name].extras
            for metric, numbers in logs[name].metrics.items():
                metrics.setdefault(metric, []).extend(numbers)
        return RawRewards(values=values, metrics=metrics, extras=extras, skipped=skipped)

    def _call(self, inputs: RewardInputs, logs: Mapping[str, TermLog]) -> dict[str, Any]:
        """What each function returned, or the exception it raised; async ones run together after the others."""
        outcomes: dict[str, Any] = {}
        pending: dict[str, Awaitable[Any]] = {}
        try:
            for name, function in self.functions.items():
                outcomes[name] = None  # keeps the order of the terms
                try:
                    returned = call_reward(function, available_arguments(inputs, logs[name]))
                except Exception as error:
                    outcomes[name] = error
                    continue
                if inspect.isawaitable(returned):
                    pending[name] = returned
                else:
                    outcomes[name] = returned
        except BaseException:  # an interrupt: coroutines that never ran are closed, or they would complain
            for awaitable in pending.values():
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
            raise
        return outcomes | self._runner.gather(pending)

    def _checked(self, name: str, outcome: Any, inputs: RewardInputs) -> list[Value]:
        if isinstance(outcome, MissingArgumentError):
            raise MissingArgumentError(f"{self._where(name, inputs)} {outcome}") from outcome
        if isinstance(outcome, BaseException):
            what = f" raised {type(outcome).__name__}: {outcome}{_location(outcome)}"
            if isinstance(outcome, RewardError):  # a reward of the library says itself what is wrong
                what = f": {outcome}"
            raise RewardError(f"{self._where(name, inputs)}{what} (first prompt: {_head(inputs, 0)})") from outcome
        try:
            return checked_values(outcome, [len(ids) for ids in inputs.completion_ids])
        except RowError as error:
            where = f"{self._where(name, inputs)}, row {error.row} (prompt {_head(inputs, error.row)})"
            raise RewardError(f"{where}: {error}") from error
        except RewardError as error:
            raise RewardError(f"{self._where(name, inputs)} {error} (first prompt: {_head(inputs, 0)})") from error
        except Exception as error:  # a generator that raised
            what = f"{type(error).__name__}: {error}{_location(error)}"
            raise RewardError(
                f"{self._where(name, inputs)} raised {what} (first prompt: {_head(inputs, 0)})"
            ) from error

    def _check_extras(self, name: str, log: TermLog, others: Mapping[str, Any], inputs: RewardInputs) -> None:
        for column, values in log.extras.items():
            if column in others:
                raise RewardError(
                    f"{self._where(name, inputs)} logs the column {column!r}, as another term does; rename it"
                )
            if len(values) != len(inputs):
                raise RewardError(
                    f"{self._where(name, inputs)} logged {len(values)} values as {column!r} for {len(inputs)} "
                    "completions"
                )
        for metric in log.metrics:
            if metric == "reward" or metric.startswith("reward/"):
                raise RewardError(f"{self._where(name, inputs)} logs {metric!r}: reward/ is the library's, rename it")

    def _check_inputs(self, inputs: RewardInputs) -> None:
        """Every list has B entries; a column with a name of the library's own arguments is hidden, and said so once."""
        lists: dict[str, Sequence[Any]] = {
            **inputs.columns,
            "prompts": inputs.prompts,
            "completion_ids": inputs.completion_ids,
            "finish_reasons": inputs.finish_reasons,
        }
        for column, values in lists.items():
            if len(values) != len(inputs):
                raise RewardError(f"{column!r} has {len(values)} entries for {len(inputs)} completions")
        for column in sorted((inputs.columns.keys() & set(OWN_ARGUMENTS)) - self._warned):
            self._warned.add(column)
            logger.warning("the data column %r is hidden from reward functions by the argument of that name", column)

    def _where(self, name: str, inputs: RewardInputs) -> str:
        """'reward 'warmth' (my_function), step 3', as error messages begin."""
        use = self.config.terms[name].use
        function = use if isinstance(use, str) else callable_name(use)
        step = inputs.trainer_state.get("step")
        return (
            f"reward {name!r}"
            + (f" ({function})" if function != name else "")
            + (f", step {step}" if step is not None else "")
        )


def _head(inputs: RewardInputs, row: int) -> str:
    """The beginning of a prompt, for messages."""
    prompt = inputs.prompts[row]
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _location(error: BaseException) -> str:
    """Where in the user's code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
