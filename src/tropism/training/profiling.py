"""Where a step goes: named stages, and a profile of one step by ``torch.profiler``."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tropism.errors import ConfigError
from tropism.training.profile_table import STAGE, STEP, format_table, read_events, stage_times

WARM_UP = 1
"""Whole steps that pass before the first one is recorded."""

_NOTHING = nullcontext()
_recording = False


def stage(name: str) -> AbstractContextManager[Any]:
    """A named part of a step: a range of the trace and a row of the table, stages inside it being parts of it.

    Where no profile runs, entering it costs a fifth of a microsecond.
    """
    return record_function(STAGE + name) if _recording else _NOTHING


class Profile:
    """Records the first whole step after one to warm up, and writes ``trace.json.gz`` and ``table.txt``.

    Args:
        folder: where to; made when the files are written, which replace earlier ones.
        steps: steps to record, one after the other.
        left: whole steps that the run has before it.

    Raises:
        ConfigError: those are too few.
    """

    def __init__(self, folder: Path, *, left: int, steps: int = 1) -> None:
        needed = WARM_UP + steps
        if left < needed:
            raise ConfigError(
                f"a profile needs {needed} whole steps, the first of them to warm up, and this run has {left}: raise "
                "total_steps, or leave --profile out"
            )
        self.folder, self.steps = folder, steps
        self.passed = 0
        self._profiler: profile | None = None
        self._range = ExitStack()

    @property
    def recorded(self) -> bool:
        """Whether all of it is recorded, so that it can be written."""
        return self.passed >= WARM_UP + self.steps

    def step_begins(self) -> None:
        """Start to record, if this is the step to record."""
        if self.passed == WARM_UP:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            # Shapes, from which the table counts operations: the profiler's own count (with_flops) keeps the tensors
            # that it has seen, which takes gigabytes and slows down what is measured.
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
            self._set_recording(True)
        if self._profiler is not None and not self.recorded:
            self._range.enter_context(stage(STEP))

    def step_ended(self) -> None:
        """Count a whole step; after the last one to record, stop."""
        self._range.close()
        self.passed += 1
        if self.recorded:
            self._stop()

    def write(self, *, first_step: int) -> str:
        """Write both files; returns the table.

        Args:
            first_step: number of the first recorded step, for the heading.

        Raises:
            OSError: the files cannot be written.
        """
        assert self.recorded and self._profiler is not None
        self.folder.mkdir(exist_ok=True)
        table = format_table(stage_times(read_events(self._profiler)), first_step=first_step, steps=self.steps)
        trace, text = self.folder / "trace.json.gz", self.folder / "table.txt"
        writing = self.folder / "writing.json.gz"
        self._profiler.export_chrome_trace(str(writing))
        os.replace(writing, trace)
        text.write_text(table, encoding="utf-8")
        return table

    def close(self) -> None:
        """Stop a recording in progress; of a part of a step nothing is kept."""
        self._range.close()
        if self._profiler is not None:
            self._stop()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._set_recording(False)
        self._profiler.stop()

    @staticmethod
    def _set_recording(value: bool) -> None:
        global _recording
        _recording = value
