"""Rewards with a timeout: called in worker processes that are killed, restarted, and end with the run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness, register, registry, workers
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]
TWO = ["a b c", "d"]


@pytest.fixture
def harness_of() -> Iterator[Callable[..., RewardHarness]]:
    made: list[RewardHarness] = []

    def make(use: Any, *, timeout: float = 20.0, on_error: str = "raise", **term: Any) -> RewardHarness:
        made.append(RewardHarness(RewardConfig.of({"use": use, "timeout": timeout, "on_error": on_error, **term})))
        return made[-1]

    yield make
    for harness in made:
        harness.close()


def values(harness: RewardHarness, inputs: RewardInputs) -> Any:
    (found,) = harness.evaluate(inputs).values.values()
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(seconds: float, pids: list[int]) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_function_sees_and_logs_there_what_it_does_here(
    make_inputs: Make, harness_of: Callable[..., RewardHarness], capfd: pytest.CaptureFixture[str]
) -> None:
    bonus = 10.0  # travels with the function

    def reward(completions: Any, answer: Any, trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
        print("printed in", os.getpid())  # noqa: T201
        log_metric("half", trainer_state.step / 2)
        log_extra("pid", [os.getpid()] * len(completions))
        return [len(text) + bonus + extra for text, extra in zip(completions, answer, strict=True)]

    raw = harness_of(reward).evaluate(make_inputs(TWO, answer=[0.5, 1.0]))
    assert raw.values == {"reward": [15.5, 12.0]} and raw.metrics == {"half": [1.5]}
    (pid,) = set(raw.extras["pid"])
    assert pid != os.getpid()
    captured = capfd.readouterr()
    assert captured.out == "" and f"printed in {pid}" in captured.err


@pytest.mark.parametrize("how", ["name", "file", "registered", "method", "async", "lambda of async"])
def test_functions_of_every_kind_travel(
    how: str, make_inputs: Make, harness_of: Callable[..., RewardHarness], tmp_path: Path
) -> None:
    class Judge:
        scale = 2.0

        def method(self, completions: list[str]) -> list[float]:
            return [self.scale * len(text.split()) for text in completions]

    async def in_turn(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [2.0 * len(text.split()) for text in completions]

    if how == "name":
        assert values(harness_of("length", args={"goal": "maximise"}), make_inputs(TWO)) == [3.0, 1.0]
        return
    if how == "file":
        (tmp_path / "mine.py").write_text(
            "def score(completions, k=1):\n    return [k * len(c) for c in completions]\n"
        )
        config = {"use": f"{tmp_path}/mine.py:score", "args": {"k": 2}, "timeout": 20}
        with pytest.raises(ConfigError, match="--allow-code"):
            RewardHarness(RewardConfig.of(config))
        harness = RewardHarness(RewardConfig.of(config), allow_code=True)
        assert values(harness, make_inputs(TWO)) == [10.0, 2.0]
        (tmp_path / "mine.py").write_text("def score(completions, k=1):\n    return [9.0 for _ in completions]\n")
        harness.close()
        with pytest.raises(RewardError, match="has changed since the run began"):
            harness.evaluate(make_inputs(TWO))
        return
    if how == "registered":
        register("travels-too")(Judge().method)
        try:
            harness = harness_of("travels-too")
        finally:
            registry._registered.pop("travels-too")
        assert values(harness, make_inputs(TWO)) == [6.0, 2.0]
        return
    kinds = {"method": Judge().method, "async": in_turn, "lambda of async": lambda completions: in_turn(completions)}
    assert values(harness_of(kinds[how]), make_inputs(TWO)) == [6.0, 2.0]


def test_what_cannot_travel_is_refused_at_the_start(harness_of: Callable[..., RewardHarness]) -> None:
    lock = threading.Lock()

    def reward(completions: list[str]) -> list[float]:
        with lock:
            return [0.0] * len(completions)

    with pytest.raises(ConfigError, match=r"'reward'.*cannot pickle.*lock.*inside of the function"):
        harness_of(reward)


def test_a_reward_that_cannot_be_loaded_there_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os\nos._exit(7)\n")
    config = RewardConfig.of({"use": f"{tmp_path}/mine.py:score", "timeout": 5})
    with pytest.raises(ConfigError, match=r"'score' ended its worker process with exit status 7 while it was loaded"):
        RewardHarness(config, allow_code=True)
    with pytest.raises(ConfigError, match=r"takes no argument 'gaol'"):
        RewardHarness(RewardConfig.of({"use": "length", "args": {"gaol": "maximise"}, "timeout": 5}))


def hang(how: str) -> Any:
    """A function that hangs on the completion "loop". Made here, so that it travels without this file."""

    def python(completions: list[str]) -> list[float]:
        while "loop" in completions[0]:
            pass
        return [1.0] * len(completions)

    def c(completions: list[str]) -> list[float]:
        import ctypes

        if "loop" in completions[0]:
            ctypes.PyDLL(None).sleep(100)  # holds the interpreter's lock, so that no other thread runs
        return [1.0] * len(completions)

    async def blocked_loop(completions: list[str]) -> list[float]:
        if "loop" in completions[0]:
            time.sleep(100)
        return [1.0] * len(completions)

    async def waiting(completions: list[str]) -> list[float]:
        if "loop" in completions[0]:
            await asyncio.sleep(100)
        return [1.0] * len(completions)

    return {"python": python, "c": c, "blocked_loop": blocked_loop, "waiting": waiting}[how]


@pytest.mark.parametrize("how", ["python", "c", "blocked_loop", "waiting"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_hang_is_stopped_and_never_scored_as_nought(
    how: str, on_error: str, make_inputs: Make, harness_of: Callable[..., RewardHarness]
) -> None:
    harness = harness_of(hang(how), timeout=0.3, on_error=on_error)
    began = time.monotonic()
    stuck = make_inputs(["loop", "b"])
    message = rf"reward '{how}', after step 3 took longer than its timeout of 0.3 s.*rows 0 to 1.*'prompt 0'"
    if on_error == "raise":
        with pytest.raises(RewardError, match=message):
            harness.evaluate(stuck)
    else:
        raw = harness.evaluate(stuck)
        assert raw.values == {how: [None, None]}
        assert raw.counts == {how: {"failed": 1, "skipped": 2, "timeouts": 1}}
    assert time.monotonic() - began < 15
    assert values(harness, make_inputs(["fine", "b"])) == [1.0, 1.0]


def test_the_timeout_of_the_whole_reward_holds_for_terms_without_their_own(make_inputs: Make) -> None:
    config = RewardConfig.of({"terms": {"a": hang("python")}, "timeout": 0.3})
    harness = RewardHarness(config)
    with pytest.raises(RewardError, match=r"timeout of 0.3 s"):
        harness.evaluate(make_inputs(["loop"]))
    harness.close()


def test_it_works_from_any_thread(make_inputs: Make, harness_of: Callable[..., RewardHarness]) -> None:
    harness, caught = harness_of(hang("python"), timeout=0.3), list[BaseException]()

    def score() -> None:
        try:
            harness.evaluate(make_inputs(["loop"]))
        except RewardError as error:
            caught.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join(20)
    assert len(caught) == 1 and "timeout" in str(caught[0])


def test_functions_may_use_signals_there(make_inputs: Make, harness_of: Callable[..., RewardHarness]) -> None:
    def reward(completions: list[str]) -> list[float]:
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        signal.alarm(0)
        return [1.0] * len(completions)

    assert values(harness_of(reward), make_inputs(TWO)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("die", "said"),
    [("segfault", "by SIGSEGV"), ("exit", "with exit status 3"), ("kill", "by SIGKILL .*lack of memory")],
)
def test_a_worker_that_dies_is_a_stated_failure_and_starts_again(
    die: str, said: str, make_inputs: Make, harness_of: Callable[..., RewardHarness]
) -> None:
    def reward(completions: list[str]) -> list[float]:
        import ctypes

        if completions[0] == "segfault":
            ctypes.string_at(0)
        if completions[0] == "exit":
            os._exit(3)
        if completions[0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0] * len(completions)

    harness = harness_of(reward)
    with pytest.raises(RewardError, match=rf"'reward', after step 3 ended its worker process {said}.*'prompt 0'"):
        harness.evaluate(make_inputs([die]))
    assert values(harness, make_inputs(TWO)) == [1.0, 1.0]


def test_an_exception_there_says_type_message_and_place(
    make_inputs: Make, harness_of: Callable[..., RewardHarness]
) -> None:
    def reward(completions: list[str]) -> list[float]:
        raise LookupError("no such label")

    with pytest.raises(
        RewardError, match=r"step 3 raised LookupError: no such label at .*test_workers.py:\d+ .*'prompt 0'"
    ):
        harness_of(reward).evaluate(make_inputs(TWO))
    with pytest.raises(RewardError, match=r"raised SystemExit: 0"):
        harness_of(lambda completions: sys.exit(0)).evaluate(make_inputs(TWO))
    with pytest.raises(RewardError, match=r"row 1 \(prompt 'prompt 1'\): returned NaN"):
        harness_of(lambda completions: [1.0, float("nan")]).evaluate(make_inputs(TWO))
    with pytest.raises(RewardError, match=r"needs the argument 'label'.*available: answer, prompts, completions"):
        harness_of(lambda completions, label: [1.0, 1.0]).evaluate(make_inputs(TWO, answer=[1, 2]))
    with pytest.raises(RewardError, match=r"its data cannot go to its worker process"):
        harness_of(lambda answer: [1.0, 1.0]).evaluate(make_inputs(TWO, answer=[threading.Lock(), 2]))


def test_only_what_is_asked_for_is_sent(make_inputs: Make, harness_of: Callable[..., RewardHarness]) -> None:
    harness = harness_of(lambda completions: [1.0, 1.0])
    assert values(harness, make_inputs(TWO, unsendable=[threading.Lock(), 2])) == [1.0, 1.0]


def test_calls_side_by_side(make_inputs: Make, harness_of: Callable[..., RewardHarness]) -> None:
    def slow(completions: list[str], log_extra: Any) -> list[float]:
        began = time.monotonic()
        time.sleep(0.4)
        log_extra("when", [(os.getpid(), began, time.monotonic())])
        return [float(len(completions[0]))]

    async def slow_async(completions: list[str], log_extra: Any) -> list[float]:
        began = time.monotonic()
        await asyncio.sleep(0.4)
        log_extra("when", [(os.getpid(), began, time.monotonic())])
        return [float(len(completions[0]))]

    for reward, processes in ((slow, 2), (slow_async, 1)):
        raw = harness_of(reward, rows_per_call=1, concurrency=2).evaluate(make_inputs(["a", "bb", "ccc", "dddd"]))
        assert list(raw.values.values()) == [[1.0, 2.0, 3.0, 4.0]]
        when = raw.extras["when"]
        assert len({pid for pid, _, _ in when}) == processes
        at_once = [sum(begin <= moment < end for _, begin, end in when) for _, moment, _ in when]
        assert max(at_once) <= 2


def test_a_hang_beside_others_costs_only_its_own_rows(
    make_inputs: Make, harness_of: Callable[..., RewardHarness]
) -> None:
    async def reward(completions: list[str]) -> list[float]:
        if completions[0] == "block":
            time.sleep(100)
        await asyncio.sleep(0.05)
        return [1.0]

    harness = harness_of(reward, timeout=8, on_error="skip", rows_per_call=1, concurrency=3)
    raw = harness.evaluate(make_inputs(["a", "b", "block", "c", "d", "e"]))
    # Three calls share the blocked process; on a busy machine calls that take their places go down with it, too.
    assert raw.values["reward"].count(None) < 6 and raw.values["reward"][5] == 1.0
    assert raw.values["reward"][2] is None and 0.0 not in raw.values["reward"]
    assert [reason is None for reason in raw.errors["reward"]] == [v is not None for v in raw.values["reward"]]


def test_workers_end_when_they_are_not_needed(make_inputs: Make) -> None:
    harness = RewardHarness(RewardConfig.of({"use": lambda completions: [os.getpid()] * 2, "timeout": 20}))
    pid = int(values(harness, make_inputs(TWO))[0])
    assert alive(pid)
    harness.close()
    assert gone_within(10, [pid])
    again = int(values(harness, make_inputs(TWO))[0])
    assert again != pid
    del harness
    assert gone_within(10, [again])


PROGRAM = textwrap.dedent(
    """
    import os, subprocess, sys, time
    from tropism.rewards import RewardConfig, RewardHarness
    from tropism.types import RewardInputs

    print("started", flush=True)  # a worker that ran the user's program again would say so twice

    def reward(completions):
        child = subprocess.Popen(["sleep", "300"])
        open(PIDS, "w").write(f"{os.getpid()} {child.pid}")
        HANG

    PIDS = sys.argv[1]
    harness = RewardHarness(RewardConfig.of({"use": reward, "timeout": float(sys.argv[2])}))
    inputs = RewardInputs(prompts=["p"], completions=["c"], completion_ids=[[1]], finish_reasons=["eos"])
    try:
        harness.evaluate(inputs)
    except KeyboardInterrupt:
        sys.exit(130)
    """
)


@pytest.mark.parametrize(
    "hang", ["while True: pass", "__import__('ctypes').PyDLL(None).sleep(100)"], ids=["python", "c"]
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_run(hang: str, number: signal.Signals, tmp_path: Path) -> None:
    """Also when the run is killed while the function hangs, and with them what the function started."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("HANG", hang))
    pids = tmp_path / "pids"
    # Where no thread of the worker can run, the system ends it some seconds after its timeout.
    timeout = "3" if hang.startswith("__") and number == signal.SIGKILL else "60"
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(pids), timeout], stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 30
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < end
        time.sleep(0.02)
    worker, child = map(int, pids.read_text().split())
    run.send_signal(number)
    output, _ = run.communicate(timeout=20)
    assert output == "started\n"
    assert run.returncode == (-9 if number == signal.SIGKILL else 130)
    assert gone_within(15, [worker])
    if not hang.startswith("__") or number == signal.SIGINT:
        assert gone_within(5, [child])
    else:
        os.kill(child, signal.SIGKILL)


def test_a_worker_needs_no_torch(make_inputs: Make, harness_of: Callable[..., RewardHarness]) -> None:
    harness = harness_of(lambda completions: [float("torch" in sys.modules)] * len(completions))
    assert values(harness, make_inputs(TWO)) == [0.0, 0.0]


def test_a_fork_of_the_run_leaves_its_workers_alone(
    make_inputs: Make, harness_of: Callable[..., RewardHarness]
) -> None:
    harness = harness_of(lambda completions: [os.getpid()] * 2)
    (pid, _) = values(harness, make_inputs(TWO))
    end = harness.terms["reward"].workers
    assert end is not None
    workers._end_all(end._workers, owner=os.getpid() + 1)
    assert alive(int(pid)) and values(harness, make_inputs(TWO))[0] == pid
