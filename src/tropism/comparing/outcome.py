"""What is written of a cell once it is through: ``cell.json``, of which ``docs/compare.md`` names the fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tropism.comparing.cell import CELL, SAMPLES
from tropism.comparing.costs import Cost, run_cost
from tropism.comparing.plan import MethodPlan
from tropism.comparing.samples import read_samples
from tropism.errors import DataError
from tropism.storage import write_whole, writing

WALL = "wall.json"


def cell_name(method: str, seed: int) -> str:
    """The name of a cell's folder."""
    return f"{method}-seed{seed}"


def is_finished(folder: Path) -> bool:
    """Whether a cell has a result, all of whose samples can be read."""
    try:
        facts = json.loads((folder / CELL).read_bytes())
        if not isinstance(facts, dict) or facts.get("failure") is not None:
            return False
        return bool(len(read_samples(folder / SAMPLES)) == facts["prompts"] * facts["samples_per_prompt"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return False


def write_cell(folder: Path, plan: MethodPlan, seed: int, facts: Mapping[str, Any], pooled: Cost) -> None:
    """What a cell has spent, and how it was measured.

    Args:
        facts: of ``measured.json``. pooled: what its part of the pool cost.

    Raises:
        StorageError: it cannot be written.
    """
    trained, choice = run_cost(folder / "run"), facts["choice"]
    # A run that learns from the pool samples nothing itself.
    own = trained if plan.recipe is not None and plan.form is None else Cost()
    cell = {
        "method": plan.method,
        "seed": seed,
        "failure": None,
        "completions": own.samples + pooled.samples + choice["completions"],
        "tokens": own.tokens + pooled.tokens + choice["tokens"],
        "seconds": trained.seconds + pooled.seconds + choice["seconds"],
        "pool_seconds": pooled.seconds,
        "choice_seconds": choice["seconds"],
        "wall_seconds": add_wall(folder, 0.0),
        "updates": trained.updates,
        **{name: value for name, value in facts.items() if name != "choice"},
    }
    write_whole(folder / CELL, json.dumps(cell, indent=1).encode())


def write_failure(folder: Path, plan: MethodPlan, seed: int, reason: str) -> None:
    """Why a cell has no result; the next call tries again.

    Raises:
        StorageError: it cannot be written.
    """
    trained = run_cost(folder / "run")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAMPLES).unlink(missing_ok=True)
    cell: dict[str, Any] = {
        "method": plan.method,
        "seed": seed,
        "failure": reason,
        **dict.fromkeys(("completions", "tokens", "pool_seconds", "choice_seconds"), 0),
        "seconds": trained.seconds,
        "wall_seconds": add_wall(folder, 0.0),
        "updates": trained.updates,
        "completions_per_answer": plan.best_of,
        "settings": {},
        "choices": [],
        "kl_estimator": "none",
        "kl_bound": None,
    }
    write_whole(folder / CELL, json.dumps(cell, indent=1).encode())


def add_wall(folder: Path, seconds: float) -> float:
    """Seconds that all processes of a cell took so far, those of interrupted ones included."""
    path = folder / WALL
    try:
        before = float(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        before = 0.0
    if seconds:
        write_whole(path, json.dumps(before + seconds).encode())
    return before + seconds
