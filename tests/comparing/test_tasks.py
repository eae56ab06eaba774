"""Tasks some at once: what waits, what fails, and what a signal does."""

from __future__ import annotations

import threading
import time

import pytest

from tropism.comparing import tasks
from tropism.comparing.tasks import Task, run_tasks
from tropism.errors import TropismError
from tropism.sweeps.work import Halt


def test_a_task_waits_for_what_it_needs_and_a_failure_loses_none_of_the_others() -> None:
    done: list[str] = []
    lost: dict[str, str] = {}

    def fail() -> None:
        raise TropismError("no model")

    def task(name: str, needs: str | None = None, act: object = None) -> Task:
        does = act if callable(act) else lambda: done.append(name)
        return Task(name=name, act=does, needs=needs, lost=lambda reason: lost.update({name: reason}))

    slow = task("pool", act=lambda: (time.sleep(0.2), done.append("pool")))
    failed = run_tasks(
        [slow, task("bad", act=fail), task("a", "pool"), task("b", "bad"), task("c"), task("d", "gone before")],
        processes=2,
        halt=Halt(),
    )
    assert failed == {"bad": "no model", "b": "no model"} == lost
    assert set(done) == {"pool", "a", "c", "d"} and done.index("a") > done.index("pool")


def test_so_many_are_worked_on_at_once() -> None:
    going, most, lock = [0], [0], threading.Lock()

    def act() -> None:
        with lock:
            going[0] += 1
            most[0] = max(most[0], going[0])
        time.sleep(0.05)
        with lock:
            going[0] -= 1

    run_tasks([Task(name=str(number), act=act) for number in range(6)], processes=3, halt=Halt())
    assert most[0] == 3


def test_a_signal_lets_what_is_going_on_save_before_it_goes_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    halt, saved = Halt(), []

    def act() -> None:
        while not halt.asked:
            time.sleep(0.01)
        saved.append(1)

    calls = [0]
    whole = tasks.wait

    def wait(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        run_tasks([Task(name=str(number), act=act) for number in range(2)], processes=2, halt=halt)
    assert saved == [1, 1]
