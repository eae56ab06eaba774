"""Calls the reward functions of a run, checks what they return, and combines it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tropism.errors import RewardError
from tropism.rewards.attempts import CallError
from tropism.rewards.calling import OWN_ARGUMENTS, AsyncRunner, MissingArgumentError
from tropism.rewards.combine import RunningMoments, combine_rewards
from tropism.rewards.config import RewardConfig, callable_name
from tropism.rewards.raw import COUNTS, RawRewards, Value
from tropism.rewards.terms import TermBatch, TermRunner
from tropism.types import RewardBatch, RewardInputs

logger = logging.getLogger("tropism")

SHOW_AFTER = 1.0
"""Seconds of scoring after which progress is reported."""
LOOK_EVERY = 0.25
"""Seconds between two reports."""
WARNINGS = 3
"""How many failed calls of a term and batch are warned about one by one."""


class RewardHarness:
    """The reward of a run.

    ``evaluate`` calls every function, on the rows of this process; ``combine`` turns the rows of all processes into
    rewards. ``score`` does both where there is one process.

    Raises:
        ConfigError: a term that cannot work as it is set.
        StorageError: a cache that cannot be used.
    """

    def __init__(self, config: RewardConfig, *, allow_code: bool = False) -> None:
        self.config = config
        self.on_progress: Callable[[int, int], None] | None = None
        """Called in the thread of ``evaluate`` with completions done and in all, over all terms, once scoring takes
        longer than a second; the last time with all done."""
        self._runner = AsyncRunner()
        self.terms: dict[str, TermRunner] = {
            name: TermRunner(name, term, timeout=config.timeout, allow_code=allow_code, runner=self._runner)
            for name, term in config.terms.items()
        }
        self.moments = RunningMoments()
        self._warned: set[str] = set()

    def evaluate(self, inputs: RewardInputs, *, first_row: int = 0) -> RawRewards:
        """Call every reward function on B completions, all at once unless its term says otherwise, and check what it
        returns. No completion is given to a function twice, but by a retry. With B = 0 none is called.

        Args:
            first_row: the number of the first of these rows in the batch of all processes, for messages.

        Raises:
            RewardError: a function raised, took too long or returned something unusable (unless ``on_error="skip"``),
                or asks for an argument that is not available (always).
        """
        return self._evaluate(inputs, first_row, skip=self.config.on_error == "skip", use_cache=True)

    def dry_call(self, inputs: RewardInputs) -> RawRewards:
        """Call the functions on sample rows before training, so that a broken one fails now, ``skip``, cache or not."""
        return self._evaluate(inputs, 0, skip=False, use_cache=False)

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
        """End the workers and the event loop, where there are any; another call starts them again."""
        for term in self.terms.values():
            term.close()
        self._runner.close()

    def _evaluate(self, inputs: RewardInputs, first_row: int, *, skip: bool, use_cache: bool) -> RawRewards:
        self._check_inputs(inputs)
        if len(inputs) == 0:
            return RawRewards(values={name: [] for name in self.terms})
        stopped = threading.Event()
        batches: dict[str, TermBatch] = {}
        try:
            for name, term in self.terms.items():
                batches[name] = self._planned(term, inputs, first_row, use_cache=use_cache, stopped=stopped)
            self._work(batches, stopped, skip=skip)
        except BaseException:  # an interrupt too: nothing of this may go on behind the run's back
            self._abandon(stopped)
            raise
        finally:
            for batch in batches.values():
                batch.keep()
        for name, batch in batches.items():
            for rows, failure in batch.failures:
                if failure.missing:
                    self._abandon(stopped)
                    raise MissingArgumentError(f"{self._where(name, inputs)}{failure.what}") from failure.__cause__
                if not skip:
                    self._abandon(stopped)
                    raise RewardError(self._message(name, rows, failure, inputs, first_row)) from failure.__cause__
        return self._gathered(batches, inputs, first_row, skip=skip)

    def _planned(
        self, term: TermRunner, inputs: RewardInputs, first_row: int, *, use_cache: bool, stopped: threading.Event
    ) -> TermBatch:
        try:
            return term.plan(inputs, use_cache=use_cache, stopped=stopped)
        except MissingArgumentError as error:
            raise MissingArgumentError(f"{self._where(term.name, inputs)} {error}") from error
        except CallError as failure:
            rows = range(len(inputs))
            raise RewardError(self._message(term.name, rows, failure, inputs, first_row)) from failure

    def _work(self, batches: Mapping[str, TermBatch], stopped: threading.Event, *, skip: bool) -> None:
        """Make all calls: those of background terms in threads, the others here; stop at the first failure to raise."""
        progress = _Progress(self.on_progress, batches.values())
        changed = threading.Event()

        def work(batch: TermBatch, slot: int) -> None:
            while not (batch.exhausted or stopped.is_set()):
                batch.work(slot, most=1)
                changed.set()

        def hopeless() -> bool:
            return any(failure.missing or not skip for batch in batches.values() for _, failure in batch.failures)

        here = [batch for batch in batches.values() if not batch.runner.in_background]
        elsewhere = [batch for batch in batches.values() if batch.runner.in_background]
        for batch in elsewhere:
            for slot in range(batch.threads):
                name = f"tropism-reward-{batch.runner.name}-{slot}"
                threading.Thread(target=work, args=(batch, slot), name=name, daemon=True).start()
        for batch in here:
            while not batch.exhausted and not hopeless():
                batch.work(most=1)
                progress.report()
        while not all(batch.done for batch in elsewhere) and not hopeless():
            changed.wait(LOOK_EVERY)
            changed.clear()
            progress.report()
        progress.end()

    def _abandon(self, stopped: threading.Event) -> None:
        stopped.set()
        for term in self.terms.values():
            term.interrupt()
        self._runner.cancel()

    def _gathered(
        self, batches: Mapping[str, TermBatch], inputs: RewardInputs, first_row: int, *, skip: bool
    ) -> RawRewards:
        """What all terms said, and what they failed to."""
        values: dict[str, list[Value]] = {}
        metrics: dict[str, list[float]] = {}
        extras: dict[str, list[Any]] = {}
        counts: dict[str, dict[str, int]] = {}
        errors: dict[str, list[str | None]] = {}
        for name, batch in batches.items():
            values[name], logged, columns = batch.result()
            for column in columns:
                if column in extras:
                    what = f" logs the column {column!r}, as another term does; rename it"
                    raise RewardError(f"{self._where(name, inputs)}{what}")
            extras |= columns
            for metric, numbers in logged.items():
                metrics.setdefault(metric, []).extend(numbers)
            reasons = self._reasons(name, batch, inputs, first_row)
            if batch.failures:
                errors[name] = reasons
                batch.counts |= {"failed": len(batch.failures), "skipped": sum(r is not None for r in reasons)}
            counts[name] = {count: batch.counts[count] for count in COUNTS if batch.counts[count]}
        counts = {name: of_term for name, of_term in counts.items() if of_term}
        return RawRewards(values=values, metrics=metrics, extras=extras, counts=counts, errors=errors)

    def _reasons(self, name: str, batch: TermBatch, inputs: RewardInputs, first_row: int) -> list[str | None]:
        """Why each row is unscored whose call failed, after a warning."""
        reasons: list[str | None] = [None] * len(inputs)
        failures = batch.failures
        for number, (rows, failure) in enumerate(failures):
            message = self._message(name, rows, failure, inputs, first_row)
            for row in rows:
                reasons[row] = message
            if number < WARNINGS:
                logger.warning("left unscored: %s", message)
        if len(failures) > WARNINGS:
            more = len(failures) - WARNINGS
            logger.warning("left unscored: %d more calls of %s failed", more, self._where(name, inputs))
        return reasons

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
        """'reward 'warmth' (my_function), after step 3', as error messages begin."""
        use = self.config.terms[name].use
        function = use if isinstance(use, str) else callable_name(use)
        step = inputs.trainer_state.get("step")
        return (
            f"reward {name!r}"
            + (f" ({function})" if function != name else "")
            + ("" if step is None else f", after step {step}" if step else ", before step 1")
        )

    def _message(self, name: str, rows: Sequence[int], failure: CallError, inputs: RewardInputs, first_row: int) -> str:
        """What failed, why, at which step and for which rows and prompt."""
        where = self._where(name, inputs)
        if failure.row is not None:
            row = rows[failure.row]
            return f"{where}, row {first_row + row} (prompt {_head(inputs, row)}){failure.what}"
        first, last = first_row + rows[0], first_row + rows[-1]
        which = f"row {first}, prompt" if len(rows) == 1 else f"rows {first} to {last}, first prompt"
        return f"{where}{failure.what} ({which}: {_head(inputs, rows[0])})"


class _Progress:
    """Tells how far the scoring of a batch is, once it has taken a while."""

    def __init__(self, tell: Callable[[int, int], None] | None, batches: Iterable[TermBatch]) -> None:
        self._tell, self._batches = tell, list(batches)
        self._total = sum(batch.rows for batch in self._batches)
        self._due = time.monotonic() + SHOW_AFTER
        self._shown = False

    def report(self) -> None:
        now = time.monotonic()
        if self._tell is not None and now >= self._due:
            self._due, self._shown = now + LOOK_EVERY, True
            self._tell(sum(batch.rows_done for batch in self._batches), self._total)

    def end(self) -> None:
        """Take down what is shown."""
        if self._tell is not None and self._shown:
            self._tell(self._total, self._total)


def _head(inputs: RewardInputs, row: int) -> str:
    """The beginning of a prompt, for messages."""
    prompt = inputs.prompts[row]
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    return repr(text if len(text) <= 60 else text[:57] + "...")
