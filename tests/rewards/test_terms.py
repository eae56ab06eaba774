"""A batch in several calls: retries, calls side by side, row numbers, progress."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness, harness, terms
from tropism.rewards.calling import MissingArgumentError, TryAgainError
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]
FIVE = ["a", "bb", "ccc", "dddd", "eeeee"]
LENGTHS = [1.0, 2.0, 3.0, 4.0, 5.0]


def harness_of(use: Any, **settings: Any) -> RewardHarness:
    return RewardHarness(RewardConfig.of({"use": use, **settings}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which take no time."""
    waited: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread() is threading.main_thread() and timeout is not None:
                waited.append(timeout)
                return self.is_set()
            return super().wait(timeout)

    monkeypatch.setattr("tropism.rewards.harness.threading.Event", Event)
    return waited


@pytest.mark.parametrize(("size", "calls"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_a_batch_is_split_and_put_together_again(size: int | None, calls: list[int], make_inputs: Make) -> None:
    seen: list[list[str]] = []

    def reward(completions: list[str], label: list[int], log_extra: Any, log_metric: Any) -> list[float]:
        seen.append(completions)
        log_extra("label", label)
        log_metric("calls", len(completions))
        return [float(len(text)) for text in completions]

    raw = harness_of(reward, rows_per_call=size).evaluate(make_inputs(FIVE, label=[5, 4, 3, 2, 1]))
    assert raw.values["reward"] == LENGTHS and raw.extras == {"label": [5, 4, 3, 2, 1]}
    assert [len(texts) for texts in seen] == calls == raw.metrics["calls"]
    assert [text for texts in seen for text in texts] == FIVE  # every completion once, in order


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_run_side_by_side_up_to_the_limit(is_async: bool, make_inputs: Make) -> None:
    lock, seen = threading.Lock(), list[str]()
    running = most = 0

    def enter(text: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            seen.append(text)

    def leave() -> None:
        nonlocal running
        with lock:
            running -= 1

    def reward(completions: list[str]) -> list[float]:
        enter(completions[0])
        time.sleep(0.02 * (6 - len(completions[0])))  # later rows are done sooner
        leave()
        return [float(len(completions[0]))]

    async def reward_async(completions: list[str]) -> list[float]:
        enter(completions[0])
        await asyncio.sleep(0.02 * (6 - len(completions[0])))
        leave()
        return [float(len(completions[0]))]

    built = harness_of(reward_async if is_async else reward, rows_per_call=1, concurrency=3)
    (values,) = built.evaluate(make_inputs(FIVE)).values.values()
    assert values == LENGTHS
    assert most == 3 and sorted(seen) == sorted(FIVE)


def test_a_function_may_change_its_lists_and_nobody_else_sees_it(make_inputs: Make) -> None:
    def reward(completions: list[str], label: list[int]) -> list[float]:
        label.clear()
        completions.sort(reverse=True)
        return [1.0] * len(completions)

    inputs = make_inputs(FIVE, label=[1, 2, 3, 4, 5])
    two = {"first": reward, "second": lambda label: [float(x) for x in label]}
    raw = RewardHarness(RewardConfig.of(two)).evaluate(inputs)
    assert raw.values["second"] == LENGTHS
    assert inputs.completions == FIVE and inputs.columns["label"] == [1, 2, 3, 4, 5]


def test_another_attempt_sees_what_the_first_one_did(make_inputs: Make, waits: list[float]) -> None:
    seen: list[Any] = []

    def reward(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.append((list(completions), [list(ids) for ids in completion_ids]))
        completions.clear()
        completion_ids[0].append(99)
        if len(seen) == 1:
            raise OSError("gone")
        return LENGTHS

    inputs = make_inputs(FIVE)
    assert harness_of(reward, retries=1).evaluate(inputs).values["reward"] == LENGTHS
    assert seen[0] == seen[1] and inputs.completion_ids == [[0]] * 5


def failing(times: int, error: BaseException) -> tuple[Any, list[int]]:
    """A function that raises so many times before it works, and the rows of each call."""
    calls: list[int] = []

    def reward(completions: list[str], log_metric: Any) -> list[float]:
        calls.append(len(completions))
        log_metric("attempts", len(calls))
        if len(calls) <= times:
            raise error
        return [float(len(text)) for text in completions]

    return reward, calls


def test_a_call_that_raised_is_made_again(make_inputs: Make, waits: list[float]) -> None:
    reward, calls = failing(2, OSError("gone"))
    batch = harness_of(reward, retries=3).score(make_inputs(FIVE))
    assert batch.per_completion.tolist() == LENGTHS and calls == [5, 5, 5]
    assert batch.metrics["reward/reward/retries"] == 2.0 and "reward/reward/failed" not in batch.metrics
    assert batch.metrics["attempts"] == 3.0  # what a failed attempt logged is dropped
    assert waits == [0.5, 1.0]  # the same every time


def test_waits_double_up_to_a_minute_and_heed_what_a_failure_asks_for(make_inputs: Make, waits: list[float]) -> None:
    with pytest.raises(RewardError, match=r"raised OSError: gone at .*the last of 10 attempts"):
        harness_of(failing(99, OSError("gone"))[0], retries=9).evaluate(make_inputs(FIVE))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    waits.clear()
    with pytest.raises(RewardError, match="busy"):
        harness_of(failing(99, TryAgainError("busy", wait=7.0))[0], retries=2).evaluate(make_inputs(FIVE))
    assert waits == [7.0, 7.0]
    waits.clear()
    with pytest.raises(RewardError, match="busy"):
        harness_of(failing(99, TryAgainError("busy", wait=9e9))[0], retries=1).evaluate(make_inputs(FIVE))
    assert waits == [60.0]


@pytest.mark.parametrize(
    "reward",
    [
        lambda completions: ["x"] * len(completions),
        lambda completions: [1.0],
        lambda completions: None,
        lambda completions, log_extra: log_extra("x", [1]) or [1.0] * len(completions),
        lambda completions, label: [1.0],
    ],
)
def test_wrong_returns_and_arguments_are_not_tried_again(reward: Any, make_inputs: Make, waits: list[float]) -> None:
    with pytest.raises(RewardError) as caught:
        harness_of(reward, retries=3).evaluate(make_inputs(FIVE))
    assert waits == [] and "attempts" not in str(caught.value)


def bad_at(row: int, error: Any) -> Any:
    def reward(completions: list[str], prompts: list[str]) -> list[Any]:
        texts = [f"prompt {row}" == prompt for prompt in prompts]
        if isinstance(error, Exception) and any(texts):
            raise error
        return [error if bad else 1.0 for bad in texts]

    return reward


@pytest.mark.parametrize(
    "how", [{}, {"rows_per_call": 2}, {"rows_per_call": 1}, {"rows_per_call": 2, "concurrency": 2}]
)
def test_messages_count_rows_over_the_whole_batch(how: dict[str, Any], make_inputs: Make) -> None:
    """Whatever the call and whatever the process, whose first row is the 10th here."""
    with pytest.raises(RewardError, match=r"step 3, row 13 \(prompt 'prompt 3'\): returned NaN"):
        harness_of(bad_at(3, float("nan")), **how).evaluate(make_inputs(FIVE), first_row=10)
    rows = {None: r"rows 10 to 14, first prompt: 'prompt 0'", 2: r"rows 12 to 13, first prompt: 'prompt 2'"}
    where = rows.get(how.get("rows_per_call"), r"row 13, prompt: 'prompt 3'")
    with pytest.raises(RewardError, match=rf"step 3 raised OSError: gone at .*\({where}\)"):
        harness_of(bad_at(3, OSError("gone")), **how).evaluate(make_inputs(FIVE), first_row=10)


def test_rewards_of_the_library_name_the_row_of_the_batch(make_inputs: Make) -> None:
    numbers = {"use": "number_answer", "rows_per_call": 2}
    with pytest.raises(RewardError, match=r"row 13 \(prompt 'prompt 3'\): the column 'answer' holds no number"):
        harness_of(**numbers).evaluate(make_inputs(FIVE, answer=[1, 2, 3, "none", 5]), first_row=10)
    slow = {"use": "regex", "rows_per_call": 2, "args": {"pattern": r"(?:a|aa|(a+)b?\1?)+$", "timeout": 0.05}}
    with pytest.raises(RewardError, match=r"row 2 \(prompt 'prompt 2'\): the pattern .* took more than 0.05 s"):
        harness_of(**slow).evaluate(make_inputs(["b", "b", "a" * 200 + "!"]))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_skip_leaves_only_the_rows_of_failed_calls_unscored(
    concurrency: int, make_inputs: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def reward(completions: list[str], prompts: list[str], log_extra: Any) -> list[float | None]:
        log_extra("seen", prompts)
        if "prompt 1" in prompts or "prompt 4" in prompts:
            raise OSError("gone")
        return [None if prompt == "prompt 2" else 0.0 for prompt in prompts]

    built = harness_of(reward, rows_per_call=1, concurrency=concurrency, on_error="skip")
    batch = built.score(make_inputs(FIVE))
    assert batch.scored.tolist() == [True, False, False, True, False]
    assert [reason is not None for reason in batch.errors["reward"]] == [False, True, False, False, True]
    assert "row 4, prompt: 'prompt 4'" in str(batch.errors["reward"][4])
    assert batch.extras == {"seen": ["prompt 0", None, "prompt 2", "prompt 3", None]}
    assert batch.metrics["reward/reward/failed"] == 2.0 and batch.metrics["reward/reward/skipped"] == 2.0
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.count("prompt 1") + text.count("prompt 4") for text in warned] == [1, 1]


def test_many_failures_do_not_flood(make_inputs: Make, caplog: pytest.LogCaptureFixture) -> None:
    def reward(completions: list[str]) -> list[float]:
        raise OSError("gone")

    harness_of(reward, rows_per_call=1, on_error="skip").evaluate(make_inputs(FIVE))
    assert [record.message for record in caplog.records][3:] == [
        "left unscored: 2 more calls of reward 'reward', after step 3 failed"
    ]


def test_a_missing_argument_is_never_skipped(make_inputs: Make) -> None:
    async def reward(completions: list[str], label: list[int]) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(MissingArgumentError, match="needs the argument 'label'"):
        harness_of(reward, on_error="skip").evaluate(make_inputs(FIVE))


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()])
def test_threads_end_with_what_a_function_raises(error: BaseException, make_inputs: Make) -> None:
    def reward(completions: list[str]) -> list[float]:
        raise error

    with pytest.raises(RewardError, match=rf"raised {type(error).__name__}"):
        harness_of(reward, rows_per_call=1, concurrency=2).evaluate(make_inputs(FIVE))
    if isinstance(error, SystemExit):  # in the thread of the run, too: or it would end as if all were well
        with pytest.raises(RewardError, match=r"raised SystemExit: 0"):
            harness_of(reward).evaluate(make_inputs(FIVE))


def test_after_a_failure_no_further_call_is_made(make_inputs: Make) -> None:
    calls: list[str] = []

    def reward(completions: list[str]) -> list[float]:
        calls.append(completions[0])
        if completions[0] == "bb":
            raise OSError("gone")
        return [1.0]

    with pytest.raises(RewardError, match="gone"):
        harness_of(reward, rows_per_call=1).evaluate(make_inputs(FIVE))
    assert calls == ["a", "bb"]


def test_an_interrupt_abandons_calls_under_way(make_inputs: Make) -> None:
    ended = threading.Event()

    async def reward(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return [1.0] * len(completions)

    def interrupted(completions: list[str]) -> list[float]:
        time.sleep(0.1)
        raise KeyboardInterrupt

    both = RewardHarness(RewardConfig.of({"a": reward, "b": interrupted}))
    with pytest.raises(KeyboardInterrupt):
        both.evaluate(make_inputs(FIVE))
    assert ended.wait(5)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_progress_is_reported_in_the_callers_thread_once_it_takes_long(
    concurrency: int, make_inputs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((done, total))

    def reward(completions: list[str]) -> list[float]:
        time.sleep(0.03)
        return [1.0]

    built = harness_of(reward, rows_per_call=1, concurrency=concurrency)
    built.on_progress = tell
    built.evaluate(make_inputs(FIVE))
    assert told == []  # below a second
    monkeypatch.setattr(harness, "SHOW_AFTER", 0.02)
    monkeypatch.setattr(harness, "LOOK_EVERY", 0.01)
    built.evaluate(make_inputs(FIVE))
    assert told[-1] == (5, 5) and told == sorted(told) and {total for _, total in told} == {5}
    assert any(0 < done < 5 for done, _ in told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "timeout: expected a positive number of seconds"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"retries": -1}, "retries: expected a whole number of at least 0"),
        ({"retries": 1.5}, "retries"),
        ({"rows_per_call": 0}, "rows_per_call: expected a whole number of at least 1"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 2}, "2 calls at a time need rows_per_call"),
        ({"concurrency": 1000, "rows_per_call": 1}, "at most 256"),
        ({"cache": ""}, "cache: expected the path of a file"),
        ({"timeuot": 1}, "unknown key 'timeuot'.*Did you mean 'timeout'"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig.of({"use": "length", **settings})
    with pytest.raises(ConfigError, match="timeout"):
        RewardConfig.of({"terms": {"a": "length"}, "timeout": -1})
    assert terms.LONGEST_WAIT == 60.0


def test_a_batch_that_is_abandoned_while_a_worker_starts_leaves_none(make_inputs: Make) -> None:
    scored = harness_of(lambda completions: [1.0] * len(completions), timeout=30.0)
    (term,) = scored.terms.values()
    assert term.workers is not None
    workers, start = term.workers, term.workers._worker
    started: list[Any] = []

    def late(index: int) -> Any:
        stopped.set()
        scored.close()
        started.append(start(index))
        return started[-1]

    workers._worker = late  # type: ignore[method-assign]
    stopped = threading.Event()
    batch = term.plan(make_inputs(FIVE), use_cache=False, stopped=stopped)
    batch.work()
    assert [worker.ended for worker in started] == [True]
    assert "was abandoned" in str(batch.failures[0][1])
