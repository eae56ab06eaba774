"""Two runs never write into one folder, whatever happened to the first."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tropism.errors import StorageError
from tropism.training.run_lock import LOCK, OWNER, RunLock

HOLD = """
import sys
from pathlib import Path
from tropism.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
"""

RACE = """
import sys
from pathlib import Path
from tropism.errors import StorageError
from tropism.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.acquire()
    print("held", flush=True)
except StorageError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


@contextmanager
def python(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``code`` until it is given a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    with python(HOLD, tmp_path) as holder:
        assert said(holder) == "held"
        for attempt in (RunLock(tmp_path).acquire, RunLock(tmp_path).check):
            with pytest.raises(
                StorageError, match=rf"in use by process {holder.pid} on {socket.gethostname()}, started 2"
            ):
                attempt()


def test_what_a_killed_process_held_is_taken_over_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with python(HOLD, tmp_path) as holder:
        assert said(holder) == "held"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == holder.pid
    lock = RunLock(tmp_path)
    lock.check()
    lock.acquire()
    assert f"process {holder.pid}" in caplog.text and "taken over" in caplog.text
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    lock.release()
    caplog.clear()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert caplog.text == "", "a lock that was given back is not stale"


def test_of_processes_that_begin_together_one_gets_it(tmp_path: Path) -> None:
    with python(RACE, tmp_path) as one, python(RACE, tmp_path) as two, python(RACE, tmp_path) as three:
        racers = (one, two, three)
        assert [said(process) for process in racers] == ["ready"] * 3
        for process in racers:
            go(process)
        answers = {process.pid: said(process) for process in racers}
        winners = [pid for pid, answer in answers.items() if answer == "held"]
        assert len(winners) == 1
        losers = [answer for pid, answer in answers.items() if pid not in winners]
        assert all(f"in use by process {winners[0]} on" in answer for answer in losers)


def test_a_run_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    lock.release()
    RunLock(tmp_path).acquire()


def test_nothing_is_left_after_release(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.check()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, OWNER}
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", [0.0, 0.4])
def test_a_child_that_outlives_its_parent_holds_nothing(late: float, tmp_path: Path) -> None:
    """Also where the parent is killed before the child came to let go of what it was born with."""
    code = f"""
import os, sys, time
from pathlib import Path
os.register_at_fork(after_in_child=lambda: time.sleep({late}))
from tropism.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
sys.stdin.readline()
"""
    with python(code, tmp_path) as holder:
        child = int(said(holder))
        holder.kill()
        holder.wait()
        try:
            os.kill(child, 0)
            RunLock(tmp_path).acquire()
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1e400}'])
def test_a_broken_owner_file_stops_nobody(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / OWNER).write_text(text)
    RunLock(tmp_path).acquire()


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        RunLock(tmp_path).acquire()
