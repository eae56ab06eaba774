"""What a training run cost, read from its logs: they outlive interruptions, and leave evaluation and start-up out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.comparing.forms import Row


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of training, in all."""

    seconds: float = 0.0
    samples: int = 0
    """Completions sampled by the run itself, or texts learned from."""
    tokens: int = 0
    """Of these."""
    updates: int = 0


def run_cost(run: Path) -> Cost:
    """Of a run so far; nothing where there is no run."""
    last: dict[str, Any] = {}
    for row in _rows(run / "metrics.jsonl"):
        if row.get("kind") == "update":
            last = row
    seconds = 0.0
    for row in _rows(run / "timings.jsonl"):
        # Of a step of which another process did a part there are its updates only.
        seconds += row.get("time/step", row.get("time/updates", 0.0))
    return Cost(
        seconds=seconds,
        samples=int(last.get("samples", 0)),
        tokens=int(last.get("tokens", 0)),
        updates=int(last.get("updates", 0)),
    )


def seconds_per_step(run: Path) -> float:
    """Mean over the steps of a run but the first, which is slower; NaN where there are no others."""
    steps = [row["time/step"] for row in _rows(run / "timings.jsonl") if "time/step" in row][1:]
    return sum(steps) / len(steps) if steps else float("nan")


def pool_cost(rows: Sequence[Row]) -> Cost:
    """Of the part of a pool that a method learns from."""
    return Cost(
        seconds=sum(row["seconds"] for row in rows), samples=len(rows), tokens=sum(row["tokens"] for row in rows)
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a log."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
