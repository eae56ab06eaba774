from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from tropism.training.interrupt import Interrupted, Interrupts, signals_raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_between_updates(number: int) -> None:
    interrupts = Interrupts()
    before = signal.getsignal(number)
    with interrupts.listening():
        os.kill(os.getpid(), number)
        assert interrupts.received == number
    assert signal.getsignal(number) is before


def test_a_signal_abandons_what_may_be_abandoned() -> None:
    interrupts, reached = Interrupts(), []

    def work() -> None:
        with interrupts.abandonable():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("not here")

    with interrupts.listening(), pytest.raises(Interrupted) as caught:
        work()
    assert reached == [] and caught.value.signal_number == signal.SIGTERM
    assert isinstance(caught.value, KeyboardInterrupt) and str(caught.value) == "SIGTERM"


def test_what_may_be_abandoned_does_not_begin_after_a_signal() -> None:
    interrupts = Interrupts()
    with interrupts.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted), interrupts.abandonable():
            pytest.fail("began")


def test_after_the_block_a_signal_is_only_noted() -> None:
    interrupts = Interrupts()
    with interrupts.listening():
        with interrupts.abandonable():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.received == signal.SIGTERM


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from tropism.training.interrupt import Interrupts\n"
        "with Interrupts().listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.4)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(5)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout == ""


def test_other_threads_do_without_signals() -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            with Interrupts().listening():
                pass
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallowed_ends_the_run_that_begins(number: signal.Signals) -> None:
    interrupts = Interrupts()
    with signals_raise():
        with contextlib.suppress(KeyboardInterrupt):  # as an import with a bare except does
            os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught, interrupts.listening(), interrupts.abandonable():
            pytest.fail("the run began")
    assert caught.value.signal_number == number
    with signals_raise(), Interrupts().listening():  # the next one is not told of it
        pass
