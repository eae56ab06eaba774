"""Update boundaries: the moments that a run can go on from, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tropism.errors import NumericsError
from tropism.training.checkpoint import Checkpoint, checkpoint_name, prune, write_checkpoint
from tropism.training.finite import first_not_finite
from tropism.training.processes import Processes
from tropism.training.run_folder import flush_logs

Named = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A moment between two updates."""

    steps: int
    updates: int
    state: dict[str, Any]
    """JSON-able, and a copy."""
    batch: Mapping[str, Tensor]
    """What the source holds: the batch in use, or the pool."""
    trained: Named | None
    """Weights and moments themselves, not copies: they stay as they are until the next update. None where they are
    sharded, and are gathered to be saved."""

    def checkpoint(self, trained: Named) -> Checkpoint:
        return Checkpoint(state=self.state, tensors={"batch": self.batch, **trained})


class BoundarySaver:
    """Saves the newest boundary of a run, once. Only the first process writes.

    Args:
        folder: of the run.
        keep: how many checkpoints stay.
        gather: weights and moments; of sharded ones all processes call it together.
    """

    def __init__(self, folder: Path, *, keep: int, processes: Processes, gather: Callable[[], Named]) -> None:
        self.folder, self.keep = folder, keep
        self.processes, self.gather = processes, gather
        self.newest: Boundary | None = None
        self._saved: Boundary | None = None

    def save(self) -> None:
        """A checkpoint of the newest boundary; all processes call this together.

        Raises:
            NumericsError: it holds numbers that are not finite.
            StorageError: it cannot be written.
        """
        boundary = self.newest
        if boundary is None or boundary is self._saved:
            return
        with self.processes.in_step():
            trained = self.gather() if boundary.trained is None else boundary.trained
        self.processes.together(lambda: self._write(boundary, trained), abandon=False)
        self._saved = boundary

    def save_alone(self) -> bool:
        """The same without the other processes, who may have gone; from any thread, as long as no update is made.

        Returns:
            Whether the newest boundary is saved: sharded weights cannot be had then.
        """
        boundary = self.newest
        if boundary is not None and boundary is not self._saved and boundary.trained is not None:
            self._write(boundary, boundary.trained)
            self._saved = boundary
        return boundary is not None and boundary is self._saved

    def keep_best(self, checkpoint: Checkpoint) -> None:
        """Write ``best/``; all processes call this together. Raises as ``save`` does."""
        where = f"step {checkpoint.state['step']}"
        self.processes.together(
            lambda: self._write_finite(self.folder / "best", checkpoint, where=where), abandon=False
        )

    def _write(self, boundary: Boundary, trained: Named) -> None:
        where = self.folder / "checkpoints"
        path = where / checkpoint_name(steps=boundary.steps, updates=boundary.updates)
        step = boundary.state["counts"]["steps"] + boundary.state["source"]["collecting"]
        if self.processes.is_main:
            flush_logs(self.folder)
        self._write_finite(path, boundary.checkpoint(trained), where=f"update {boundary.updates} (step {step})")
        if self.processes.is_main:
            prune(where, keep=self.keep, newest=path)

    def _write_finite(self, path: Path, checkpoint: Checkpoint, *, where: str) -> None:
        if not self.processes.is_main:
            return
        for part, what in (("policy", "the weight"), ("optimizer", "the optimizer's")):
            bad = first_not_finite(checkpoint.tensors.get(part, {}))
            if bad is not None:
                raise NumericsError(
                    f"{what} {bad} is not finite after {where}, so {path.name} is not written; what was saved before "
                    "is as it was. Lower the learning rate, and set max_grad_norm"
                )
        write_checkpoint(path, checkpoint)
