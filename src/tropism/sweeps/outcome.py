"""What a sweep came to: a row per trial, as a table, a summary, pictures, and the best recipe."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tropism.redaction import redact, redact_values
from tropism.storage import write_whole, writing
from tropism.sweeps.config import SweepConfig
from tropism.sweeps.space import recipe_of
from tropism.sweeps.study import values_of

State = Literal["complete", "pruned", "failed", "unfinished"]

_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "unfinished",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial."""

    number: int
    state: State
    value: float | None
    """The metric, over several seeds their mean; of a pruned trial the last that was seen."""
    by_seed: tuple[float, ...]
    """The metric of each run."""
    interval: tuple[float, float] | None
    """95 % interval over held-out prompts, of a single run."""
    values: Mapping[str, Any]
    """Dotted key -> value."""
    reason: str | None
    """Why a trial failed."""
    seconds: float
    folder: str
    """Of its run, or its runs, from the sweep's folder."""

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (of the population that they are a sample of); None of a single one."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    def told(self, metric: str) -> str:
        """The outcome in words."""
        if self.state == "failed":
            return f"failed: {self.reason}"
        if self.value is None:
            return self.state
        return f"{metric} {self.measured}" + (f" ({self.state})" if self.state != "complete" else "")

    @property
    def measured(self) -> str:
        """The metric with what is known of its uncertainty."""
        if self.value is None:
            return ""
        if self.spread is not None:
            return f"{self.value:.4g} ± {self.spread:.2g}"
        if self.interval is not None:
            return f"{self.value:.4g} [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        return f"{self.value:.4g}"


def row_of(trial: FrozenTrial, config: SweepConfig, folder: Path) -> Row:
    """What the study knows of a trial."""
    state = _STATES[trial.state]
    interval = trial.user_attrs.get("interval")
    return Row(
        number=trial.number,
        state=state,
        value=trial.value if state in ("complete", "pruned") else None,
        by_seed=tuple(trial.user_attrs.get("values", ())),
        interval=None if interval is None else (interval[0], interval[1]),
        values=values_of(trial, config),
        reason=trial.user_attrs.get("reason"),
        seconds=float(trial.user_attrs.get("seconds", 0.0)),
        folder=f"trials/{trial.number:03d}",
    )


def ranked(rows: Sequence[Row], mode: str) -> list[Row]:
    """Complete trials, best first; then pruned ones, failed ones and those that are not done."""
    sign = -1 if mode == "max" else 1
    order = {"complete": 0, "pruned": 1, "failed": 2, "unfinished": 3}
    return sorted(rows, key=lambda r: (order[r.state], math.inf if r.value is None else sign * r.value, r.number))


def best_of(rows: Sequence[Row], mode: str) -> Row | None:
    """The best complete trial; of equals the first."""
    first = next(iter(ranked(rows, mode)), None)
    return first if first is not None and first.state == "complete" else None


def shown_value(value: Any) -> str:
    """A parameter's value for a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cautions(rows: Sequence[Row], config: SweepConfig) -> list[str]:
    """What the table does not show by itself."""
    best = best_of(rows, config.mode)
    if best is None:
        return []
    told = []
    complete = [row for row in rows if row.state == "complete"]
    low, high = best.interval or (math.nan, math.nan)
    near = [r for r in complete if r is not best and r.interval and r.interval[0] <= high and r.interval[1] >= low]
    if near:
        told.append(
            f"The intervals of {len(near)} other trial{'s' if len(near) > 1 else ''} overlap with that of the best: "
            "these held-out prompts do not tell them apart."
        )
    if len(complete) > 1:
        told.append(
            f"The best of {len(complete)} owes something to luck as well: before its number is reported, measure it "
            "again with another seed, on prompts that the sweep did not see."
        )
    return told


# ---- files -----------------------------------------------------------------------------------------------------------


def write_outcome(
    rows: Sequence[Row], config: SweepConfig, base: Mapping[str, Any], folder: Path, *, pictures: bool
) -> None:
    """``table.csv``, ``summary.json``, ``best.yaml`` where a trial is complete, and ``plots/``.

    Raises:
        StorageError: a file cannot be written; an older one is as it was.
    """
    best = best_of(rows, config.mode)
    write_whole(folder / "table.csv", _csv(rows, config).encode())
    write_whole(folder / "summary.json", _summary(rows, config, best).encode())
    if best is not None:
        write_whole(folder / "best.yaml", _best(best, len(rows), config, base).encode())
    if pictures and any(row.value is not None for row in rows):
        from tropism.sweeps.plots import draw

        with writing(folder / "plots"):
            (folder / "plots").mkdir(mode=0o700, exist_ok=True)
            draw(rows, config, folder / "plots")


def _csv(rows: Sequence[Row], config: SweepConfig) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    several = config.seeds > 1
    uncertain = ["deviation", *(f"seed {seed}" for seed in range(config.seeds))] if several else ["low", "high"]
    keys = list(config.parameters)
    writer.writerow(["trial", "state", config.metric, *uncertain, *keys, "seconds", "reason", "folder"])
    for row in ranked(rows, config.mode):
        low_high = row.interval or ("", "")
        by_seed = [*row.by_seed, *[""] * config.seeds][: config.seeds]
        numbers = ["" if row.spread is None else row.spread, *by_seed] if several else list(low_high)
        settings = [_cell(row.values.get(key, "")) for key in keys]
        value = "" if row.value is None else row.value
        reason = redact(row.reason or "")
        writer.writerow([row.number, row.state, value, *numbers, *settings, row.seconds, reason, row.folder])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Numbers and text as they are, all else as JSON."""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def _summary(rows: Sequence[Row], config: SweepConfig, best: Row | None) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in ("complete", "pruned", "failed")}
    summary = {
        "metric": config.metric,
        "mode": config.mode,
        "take": config.take,
        "trials": config.total,
        **counts,
        "best": None if best is None else best.number,
        "seconds": sum(row.seconds for row in rows),
        "rows": [
            {
                "trial": row.number,
                "state": row.state,
                "value": row.value,
                "by_seed": list(row.by_seed),
                "deviation": row.spread,
                "interval": None if row.interval is None else list(row.interval),
                "parameters": dict(row.values),
                "seconds": row.seconds,
                "reason": row.reason,
                "folder": row.folder,
            }
            for row in ranked(rows, config.mode)
        ],
    }
    return json.dumps(redact_values(summary), indent=1, ensure_ascii=False) + "\n"


def _best(best: Row, count: int, config: SweepConfig, base: Mapping[str, Any]) -> str:
    """A whole recipe that trains the best trial again, in a run folder of its own."""
    recipe = recipe_of(base, best.values, run=None)
    lines = [
        f"# The best of {count} trials by {config.metric} ({config.mode}): {best.measured}, trial {best.number:03d}.",
        *(f"#     {key}: {shown_value(value)}" for key, value in best.values.items()),
    ]
    if config.seeds > 1:
        lines.append(f"# That is the mean over {config.seeds} seeds, of which this recipe has the first.")
    text = "\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines)
    return redact(f"{text}\n{recipe.to_yaml()}")
