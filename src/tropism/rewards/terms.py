"""One term of the reward at work: a batch in calls, calls side by side, tried again, taken from the cache."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tropism.rewards.attempts import Call, CallError, Said, attempt, failure_of
from tropism.rewards.caching import RewardCache, check_cacheable, identity_of
from tropism.rewards.calling import RUN_ARGUMENTS, Asks, AsyncRunner, asked_by, is_async, row_data
from tropism.rewards.config import RewardTerm
from tropism.rewards.raw import RowError, Value
from tropism.rewards.registry import FACTORIES, RewardFn
from tropism.rewards.resolve import announce_code, check_allowed, resolve_reward
from tropism.rewards.reward_model import names_folder, warn_without_scale
from tropism.rewards.workers import Workers

if TYPE_CHECKING:
    from tropism.types import RewardInputs

logger = logging.getLogger("tropism")

FIRST_WAIT = 0.5
"""Seconds before the first repetition; doubled for each further one."""
LONGEST_WAIT = 60.0


class TermRunner:
    """Calls the function of one term, here or in worker processes.

    Raises:
        ConfigError: the function cannot be found, called, sent to a worker, or kept in a cache as the term says.
    """

    def __init__(
        self, name: str, term: RewardTerm, *, timeout: float | None, allow_code: bool, runner: AsyncRunner
    ) -> None:
        self.name, self.term = name, term
        self.timeout = term.timeout if term.timeout is not None else timeout
        self._runner = runner
        self.function: RewardFn | None = None
        self.workers: Workers | None = None
        warn_without_scale(term)
        if self.timeout is None:
            self.function = resolve_reward(term, allow_code=allow_code)
        else:
            self.workers = Workers(term, self._traveller(allow_code), self.timeout, name=name)
        self.cache: RewardCache | None = None
        if term.cache is not None:
            try:
                check_cacheable(self._asks, name)
                self.cache = RewardCache(term.cache, identity_of(term, self.function, name))
            except BaseException:
                self.close()
                raise

    def _traveller(self, allow_code: bool) -> RewardFn | None:
        """The function that goes to a worker, or None where the worker finds it by its name."""
        check_allowed(self.term, allow_code=allow_code)
        use = self.term.use
        if isinstance(use, str) and ":" in use:
            announce_code(use)
            return None
        by_name = isinstance(use, str) and (use in FACTORIES or names_folder(use))
        return None if by_name else resolve_reward(self.term)

    @property
    def _asks(self) -> Asks:
        if self.workers is not None:
            return self.workers.asks
        assert self.function is not None
        return asked_by(self.function)

    @property
    def in_background(self) -> bool:
        """Whether its calls run in threads of their own, so that other terms need not wait."""
        if self.workers is not None or self.term.concurrency > 1:
            return True
        assert self.function is not None
        return is_async(self.function)

    def plan(self, inputs: RewardInputs, *, use_cache: bool, stopped: threading.Event) -> TermBatch:
        """A batch in calls, without the rows that the cache knows.

        Raises:
            MissingArgumentError: the function asks for something that is not there.
            StorageError: the cache is damaged.
            CallError: a row cannot be part of a cache key.
        """
        return TermBatch(self, inputs, cache=self.cache if use_cache else None, stopped=stopped)

    def call(self, call: Call, slot: int, stopped: threading.Event) -> Said:
        """One attempt. Raises: CallError."""
        if self.workers is not None:
            return self.workers.call(call, slot, stopped)
        assert self.function is not None
        return attempt(self.function, call, self._runner.run)

    def wanted(self, inputs: RewardInputs) -> dict[str, list[Any]]:
        """What goes into its calls: for workers and keys only what the function asks for."""
        data = row_data(inputs)
        if self.workers is None and self.cache is None:
            return data
        asks = self._asks
        asks.check([*data, *(() if self.cache else RUN_ARGUMENTS)])
        return {name: data[name] for name in asks.of(data)}

    def interrupt(self) -> None:
        """Leave nothing under way in other processes."""
        if self.workers is not None:
            self.workers.kill()

    def close(self) -> None:
        """End workers; the next call would start them again."""
        self.interrupt()


class TermBatch:
    """The calls of one term for one batch, and what became of them.

    ``work`` may run in several threads at once; results are by row, so their order does not matter.
    """

    def __init__(
        self, runner: TermRunner, inputs: RewardInputs, *, cache: RewardCache | None, stopped: threading.Event
    ) -> None:
        self.runner, self.rows = runner, len(inputs)
        self.stopped = stopped
        self.counts: Counter[str] = Counter()
        self.outcomes: dict[int, Said | CallError] = {}
        self._inputs = inputs
        self._data = runner.wanted(inputs)
        self._lock = threading.Lock()
        self._taken = 0
        self._cache, self._keys, self._known = cache, [""] * self.rows, dict[str, Value]()
        self.calls = self._split(self._rows_to_score())

    def _rows_to_score(self) -> Sequence[int]:
        """Rows that the cache does not know; of rows with equal keys the first."""
        if self._cache is None:
            return range(self.rows)
        try:
            self._keys = self._cache.keys(self._data, self.rows)
        except RowError as error:
            raise failure_of(error) from error
        self._known = self._cache.read(self._keys)
        missing: dict[str, int] = {}
        for row, key in enumerate(self._keys):
            if key not in self._known:
                missing.setdefault(key, row)
        self.counts["cached"] = self.rows - len(missing)
        return list(missing.values())

    def _split(self, rows: Sequence[int]) -> list[Sequence[int]]:
        size = self.runner.term.rows_per_call or max(len(rows), 1)
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)]

    @property
    def threads(self) -> int:
        return min(self.runner.term.concurrency, len(self.calls))

    @property
    def done(self) -> bool:
        return len(self.outcomes) == len(self.calls)

    @property
    def exhausted(self) -> bool:
        """Whether no call is left to make; some may still be under way."""
        return self._taken >= len(self.calls)

    @property
    def rows_done(self) -> int:
        with self._lock:
            return self.rows - sum(len(call) for number, call in enumerate(self.calls) if number not in self.outcomes)

    @property
    def failures(self) -> list[tuple[Sequence[int], CallError]]:
        """Rows and reason of each call that failed for good, in order."""
        with self._lock:
            found = sorted((number, said) for number, said in self.outcomes.items() if isinstance(said, CallError))
        return [(self.calls[number], failure) for number, failure in found]

    def work(self, slot: int = 0, *, most: int | None = None) -> None:
        """Make calls until none is left or the batch is stopped; at most so many."""
        made = 0
        while not self.stopped.is_set() and (most is None or made < most):
            with self._lock:
                number = self._taken
                if number >= len(self.calls):
                    return
                self._taken += 1
            outcome = self._outcome(self._call(self.calls[number]), slot)
            with self._lock:
                self.outcomes[number] = outcome
            made += 1

    def _call(self, rows: Sequence[int]) -> Call:
        ids = self._inputs.completion_ids
        return Call(
            data={name: [values[row] for row in rows] for name, values in self._data.items()},
            token_counts=[len(ids[row]) for row in rows],
            state=None if self.runner.cache is not None else dict(self._inputs.trainer_state),
        )

    def _outcome(self, call: Call, slot: int) -> Said | CallError:
        """What a call came to after as many attempts as it takes and the term allows."""
        for number in range(self.runner.term.retries + 1):
            try:
                return self.runner.call(call, slot, self.stopped)
            except CallError as failure:
                last = failure
            except BaseException as error:
                if not self.runner.in_background:
                    raise
                last = CallError(f" raised {type(error).__name__}: {error}")
            if last.timed_out:
                self._count("timeouts")
            if not last.again or self.stopped.is_set():
                break
            if number < self.runner.term.retries:
                self._count("retries")
                logger.info("reward %r%s; trying again", self.runner.name, last.what)
                self.stopped.wait(min(max(last.wait, FIRST_WAIT * 2**number), LONGEST_WAIT))
        if number > 0:
            last.what += f" (the last of {number + 1} attempts)"
        return last

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def keep(self) -> None:
        """Write what was newly said to the cache.

        Raises:
            StorageError: it cannot be written.
        """
        if self._cache is None:
            return
        new: dict[str, Value] = {}
        with self._lock:
            for number, said in self.outcomes.items():
                if isinstance(said, Said):
                    new |= {self._keys[row]: value for row, value in zip(self.calls[number], said.values, strict=True)}
        self._cache.write(new)
        self._known |= new

    def result(self) -> tuple[list[Value], dict[str, list[float]], dict[str, list[Any]]]:
        """Values, logged metrics and logged columns of all rows; None for rows whose call failed."""
        values: list[Value] = [self._known.get(key) for key in self._keys]
        metrics: dict[str, list[float]] = {}
        extras: dict[str, list[Any]] = {}
        for number in sorted(self.outcomes):
            said, rows = self.outcomes[number], self.calls[number]
            if isinstance(said, CallError):
                continue
            for row, value in zip(rows, said.values, strict=True):
                values[row] = value
            for name, numbers in said.metrics.items():
                metrics.setdefault(name, []).extend(numbers)
            for name, entries in said.extras.items():
                column = extras.setdefault(name, [None] * self.rows)
                for row, entry in zip(rows, entries, strict=True):
                    column[row] = entry
        return values, metrics, extras
