"""Ctrl-C and SIGTERM: the first asks a run to stop at its last update boundary, a second one ends it at once.

With several processes also what another of them met: a signal, an error, its death.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from tropism.errors import TropismError

if TYPE_CHECKING:  # with torch, which the command line does not wait for
    from tropism.training.bulletin import Bulletin

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.2
"""Seconds within which a second signal is the first once more: some launchers signal a process and then its group."""
DIED = "of this run has died: it was killed, or ran out of memory"
"""What is said of a process that ended without a word."""
GRACE = 3.0
"""Seconds that the main thread has to come back, before the run ends without it."""
POLL = 0.25
"""Seconds between two looks at the main thread, and at what other processes tell."""
FAREWELL = 60.0
"""Most seconds for which other processes wait for the first one to save."""


class Interrupted(KeyboardInterrupt):
    """Raised where work can be abandoned; ``signal_number`` says why.

    Args:
        left_alone: whether another process has gone already, so that none can be met any more.
    """

    def __init__(self, signal_number: int, *, left_alone: bool = False) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number, self.left_alone = signal_number, left_alone


class CalledOffError(BaseException):
    """Raised where work can be abandoned, because another process failed and asks all to meet."""


class ProcessLostError(RuntimeError):
    """Another process of the run died, or the connection to it broke."""


class Interrupts:
    """Listens to SIGINT and SIGTERM inside ``listening``, and to the other processes of the run.

    Outside ``abandonable`` the first signal is only noted; inside, it raises ``Interrupted``. Should the main thread
    not come back (it may be deep in compiled code), a thread saves by ``rescue`` and ends the process. A second signal
    ends it at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal for which the run ends, whichever process received it."""
        self.bulletin: Bulletin | None = None
        """Set where there are several processes."""
        self.rescue: Callable[[], None] | None = None
        """Saves the last update boundary; called by another thread while the main one is in an abandonable block."""
        self.called_off = False
        self.trouble: BaseException | None = None
        """The error of a process that has left, or its death."""
        self.leaving = threading.Lock()
        """Held while the run is ended without the main thread."""
        self.may_abandon = False
        self.meeting_since: float | None = None
        self._listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The course of a run: signals are heard, and what ends it is told to the other processes."""
        if self._listening:
            yield
            return
        self._listening = True
        if _EARLY and self.received is None:
            self.received = _EARLY[0]
        try:
            with self._hearing():
                try:
                    yield
                except BaseException as error:
                    self._leave(error)
                    raise
                self._leave(None)
        finally:
            self._listening = False

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block whose work may be thrown away.

        Raises:
            Interrupted, CalledOffError, or the error of a process that has left: at any moment inside the block.
        """
        before = self.may_abandon
        try:
            self._raise_if_asked()
            self.may_abandon = True
            self._raise_if_asked()
            yield
        except CalledOffError:
            if self.trouble is not None:
                raise self.trouble from None
            raise
        finally:
            self.may_abandon = before
            with self.leaving:  # where the run is being ended without this thread, that is the end of it
                pass

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """A block that waits for other processes; nothing raises in it but the wait itself. May lie in another."""
        before, since = self.may_abandon, self.meeting_since
        self.may_abandon, self.meeting_since = False, time.monotonic()
        try:
            yield
        finally:
            self.meeting_since, self.may_abandon = since, before
            with self.leaving:
                pass

    def call_off(self) -> None:
        """Let the other processes abandon what they do, and meet."""
        if self.bulletin is not None:
            self.bulletin.call_off()

    def hear(self) -> bool:
        """Take up what other processes have told; returns whether there was anything to end the run for.

        A process that died counts more than a signal: whoever started it may end the others because of it.
        """
        if self.bulletin is None:
            return False
        try:
            news, died = self.bulletin.read(), self.bulletin.died()
        except ProcessLostError as error:
            if self.received is None:  # or the first process has saved and gone, as all shall
                self.trouble = self.trouble or error
            return True
        if self.received is None:
            self.received = news.stop or news.signal
        self.called_off = news.called_off
        if news.failure is not None:
            self.trouble = self.trouble or news.failure.as_error()
        elif died is not None:
            self.trouble = self.trouble or ProcessLostError(f"process {died} {DIED}")
        return self.trouble is not None or self.received is not None or self.called_off

    # Signals ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return
        theirs, ours = socket.socketpair()
        theirs.setblocking(False)
        before: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if hasattr(signal, "SIGURG"):  # how the watching thread wakes this one up; ignored by default
            before[signal.SIGURG] = signal.signal(signal.SIGURG, self._on_news)
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        watch = _Watch(self, ours, threading.get_ident())
        watch.start()
        _HEARING.append(before)
        try:
            yield
        finally:
            _HEARING.pop()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            theirs.close()
            watch.join()
            ours.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        self._raise_if_asked(self.may_abandon)

    def _on_news(self, number: int, frame: FrameType | None) -> None:
        self._raise_if_asked(self.may_abandon)

    def _raise_if_asked(self, may: bool = True) -> None:
        if not may:
            return
        if self.trouble is None and self.received is not None:
            raise Interrupted(self.received)
        if self.trouble is not None or self.called_off:
            raise CalledOffError  # and no ordinary error, which what is under way might take for its own

    def _leave(self, error: BaseException | None) -> None:
        """Tell the other processes that this one ends; those after the first wait until that one has saved and told."""
        if self.bulletin is None:
            return
        self.bulletin.leave(error, signal_number=getattr(error, "signal_number", None))
        if error is None:
            return
        if self.bulletin.rank == 0:  # with which the store may go
            until = time.monotonic() + GRACE
            while time.monotonic() < until and not self.bulletin.is_known():
                time.sleep(POLL / 5)
            return
        until = time.monotonic() + FAREWELL
        while time.monotonic() < until and not self._first_has_left():
            time.sleep(POLL / 5)
        until = min(until, time.monotonic() + GRACE)
        while time.monotonic() < until and not self.bulletin.is_gone(0):
            time.sleep(POLL / 5)

    def _first_has_left(self) -> bool:
        assert self.bulletin is not None
        try:
            return 0 in self.bulletin.read().ended or self.bulletin.is_gone(0)
        except ProcessLostError:
            return True


class _Watch(threading.Thread):
    """Hears signals as they come, whatever the main thread does, and the other processes.

    Args:
        ours: gets a byte for every signal, and ends when its other end is closed.
        main: the thread that is to be woken up.
    """

    def __init__(self, interrupts: Interrupts, ours: socket.socket, main: int) -> None:
        super().__init__(name="tropism-signals", daemon=True)
        self.interrupts, self.ours, self.main = interrupts, ours, main
        self.signalled: tuple[int, float] | None = None
        """The first signal of this process, and when it came."""
        self.asked_at: float | None = None
        """When the main thread was first asked to come back."""

    def run(self) -> None:
        while True:
            numbers = b""
            if select.select([self.ours], [], [], POLL)[0]:
                numbers = self.ours.recv(64)
                if not numbers:
                    return
            for number in numbers:
                if number in SIGNALS:
                    self._count(number)
            if self.interrupts.hear() and self.asked_at is None:
                self.asked_at = time.monotonic()
                signal.pthread_kill(self.main, signal.SIGURG)
            self._mind_main()

    def _count(self, number: int) -> None:
        now = time.monotonic()
        if self.signalled is None:
            self.signalled = (number, now)
            self.asked_at = self.asked_at or now
            if self.interrupts.bulletin is not None:
                self.interrupts.bulletin.ask_to_stop(number)
        elif now - self.signalled[1] > ECHO:
            os._exit(128 + number)

    def _mind_main(self) -> None:
        """End the run from here, if the main thread was asked to come back and cannot."""
        interrupts = self.interrupts
        if self.asked_at is None:
            return
        since = self.asked_at
        if interrupts.meeting_since is not None:
            since = max(since, interrupts.meeting_since)
        if time.monotonic() - since < GRACE:
            return
        with interrupts.leaving:
            if interrupts.may_abandon or (interrupts.meeting_since is not None and self._left_alone()):
                self._end_run()

    def _left_alone(self) -> bool:
        """Whether whom the main thread waits for has left."""
        bulletin = self.interrupts.bulletin
        try:
            return bulletin is not None and (self.interrupts.trouble is not None or bool(bulletin.read().ended))
        except ProcessLostError:
            return True

    def _end_run(self) -> None:
        trouble, bulletin = self.interrupts.trouble, self.interrupts.bulletin
        number = self.interrupts.received or (self.signalled[0] if self.signalled else None)
        try:
            if self.interrupts.rescue is not None and (trouble is None or isinstance(trouble, ProcessLostError)):
                self.interrupts.rescue()
            if trouble is not None:
                kind = "" if isinstance(trouble, TropismError) else f"{type(trouble).__name__}: "
                sys.stderr.write(f"error: {kind}{trouble}\n")
                sys.stderr.flush()
            if bulletin is not None:
                bulletin.leave(trouble, signal_number=None if trouble is not None else number)
        finally:
            if trouble is None and number is not None:
                os._exit(128 + number)
            os._exit(2 if isinstance(trouble, TropismError) else 1)  # as the command line does


@contextmanager
def signals_raise() -> Iterator[None]:
    """A block in which SIGTERM raises ``Interrupted``, as Ctrl-C raises KeyboardInterrupt; a run may listen inside.

    What is raised inside of a destructor or import of some library may be swallowed there; a run that begins all the
    same ends at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_it(number: int, frame: FrameType | None) -> None:
        _EARLY.append(number)
        raise Interrupted(number) if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, raise_it) for number in SIGNALS}
    try:
        yield
    finally:
        _EARLY.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


_EARLY: list[int] = []
"""Signals that came inside ``signals_raise`` before a run was listening."""
_HEARING: list[dict[int, Any]] = []
"""Handlers that were there before those of a run that is listening."""


def _forget_in_child() -> None:
    """A forked process (a worker of a reward, say) is not the run: signals to it are its own."""
    if _HEARING:
        signal.set_wakeup_fd(-1)
        for number, handler in _HEARING[0].items():
            signal.signal(number, handler)
        _HEARING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
