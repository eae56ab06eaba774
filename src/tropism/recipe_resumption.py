"""A run that goes on: its newest checkpoint, what is not as it was, and whether there is anything left to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.recipe_changes import Standing, changed_fields
from tropism.recipe_identity import (
    check_identity,
    machine_changes,
    machine_facts,
    note,
    read_environment,
    same_libraries,
)
from tropism.training.checkpoint import Checkpoint, read_newest

logger = logging.getLogger("tropism")


class Resumption:
    """What a resumed run goes on from.

    Args:
        folder: of the run.
        recipe: the one to go on with.
        device: where the run will compute.

    Raises:
        ConfigError: there is no complete checkpoint, or the same run cannot go on with this recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, device: torch.device) -> None:
        self.folder, self.recipe = folder, recipe
        self.checkpoint = _newest_checkpoint(folder)
        self.environment = read_environment(folder)
        same_device = self.environment.get("device") == device_name(device)
        self.changes = changed_fields(folder, recipe, Standing.of(self.checkpoint, same_device=same_device))
        self.notices: list[str] = []

    def compare(self, identity: Mapping[str, Any], *, device: torch.device, processes: int) -> None:
        """Compare model, held-out data, code and machine with those of the run; what may differ is noted.

        Args:
            identity: ``identity_of`` what there is now.

        Raises:
            TropismError: the run cannot go on with them.
        """
        now = machine_facts(self.environment, device=device_name(device), processes=processes)
        machine = machine_changes(self.environment, now)
        same = same_libraries(self.environment, now)
        self.notices = check_identity(self.checkpoint.state.get("identity"), identity, same_libraries=same)
        if machine:
            self.notices.append(
                f"not as when the run began: {', '.join(machine)}; it goes on, but not necessarily to the same bits"
            )

    @property
    def total_steps_read(self) -> bool:
        """Whether the method had asked for ``total_steps`` by the checkpoint."""
        return bool(self.checkpoint.state["identity"]["total_steps_read"])

    @property
    def lines(self) -> list[str]:
        """What is resumed, and what is not as it was."""
        counts = self.checkpoint.state["counts"]
        goes_on = f", in the middle of step {counts['steps'] + 1}" if self.checkpoint.collecting else ""
        return [
            f"resuming {self.folder} after step {counts['steps']} of {self.recipe.total_steps} "
            f"({counts['updates']} updates{goes_on})",
            *(f"changed: {change}" for change in self.changes),
            *self.notices,
        ]

    @property
    def finished(self) -> bool:
        """Whether the run has ended and been exported, and nothing lets it go on."""
        # A model may be there from an earlier end of the run, with fewer steps.
        exported = self.environment.get("exported") == export_of(self.checkpoint.state["counts"])
        whole = all((self.folder / name).is_file() for name in ("model/config.json", "report.html"))
        return exported and whole and not self.changes and (self._done or self._worn_out)

    @property
    def end(self) -> str:
        """What to say of a finished run."""
        steps = self.checkpoint.state["counts"]["steps"]
        how, more = ("is finished", "total_steps") if self._done else ("was stopped", "trainer.checkpoints.patience")
        return (
            f"{self.folder} {how} after step {steps} of {self.recipe.total_steps}: nothing is left to do. Raise {more} "
            "to go on with it"
        )

    @property
    def _done(self) -> bool:
        return bool(self.checkpoint.state["counts"]["steps"] >= self.recipe.total_steps)

    @property
    def _worn_out(self) -> bool:
        patience = self.recipe.trainer.checkpoints.patience
        return patience is not None and self.checkpoint.state["best"]["since"] >= patience

    def write(self) -> bool:
        """Note in ``environment.json`` what differs, if anything does; returns whether the recipe does."""
        differs = [*map(str, self.changes), *self.notices]
        if differs:
            before = self.environment.get("resumed")
            entry = {"step": self.checkpoint.state["counts"]["steps"], "differs": differs}
            note(self.folder, resumed=[*(before if isinstance(before, list) else []), entry])
        return bool(self.changes)


def export_of(counts: Mapping[str, int]) -> dict[str, int]:
    """What ``environment.json`` says, as ``exported``, of the state that model and report were last written from."""
    return {"step": counts["steps"], "update": counts["updates"]}


def device_name(device: torch.device) -> str:
    """The model of a GPU, or the kind of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _newest_checkpoint(folder: Path) -> Checkpoint:
    checkpoint, skipped = read_newest(folder / "checkpoints")
    for message in skipped:
        logger.warning(message)
    if checkpoint is None:
        found = "; ".join(skipped) or "the run ended before one was written"
        raise ConfigError(
            f"{folder} holds no complete checkpoint to resume from ({found}). Start it again in another folder, or "
            "delete this one; with trainer.checkpoints.every it saves on the way"
        )
    return checkpoint
