"""The process in which one system does one work: ``python -m benchmarks.worker``, its job as a line on stdin."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from benchmarks.gate import Gate, StoppedError, UnavailableError
from benchmarks.work import Job


def main() -> None:
    # What libraries print goes to stderr, so that stdout carries messages only.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.readline())
    gate = Gate(job.device, sys.stdin, channel)
    try:
        import_module(f"benchmarks.{job.task}").run(job, gate)
    except StoppedError:
        pass
    except UnavailableError as reason:
        gate.send("unavailable", reason=str(reason))


if __name__ == "__main__":
    main()
