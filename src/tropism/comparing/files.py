"""What measuring a comparison leaves in its folder: tables, statistics, the frontier and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tropism.comparing.cautions import cautions, headlines
from tropism.comparing.frontier import Frontier
from tropism.comparing.page import write_page_of
from tropism.comparing.results import Comparison
from tropism.comparing.table import as_csv, as_markdown, pairs_csv
from tropism.evaluation.result_files import csv_table, plain_values, write_files


def write_results(comparison: Comparison) -> list[Path]:
    """Write everything, over older files; each appears whole or not at all.

    Returns:
        The files, ``report.html`` last.

    Raises:
        DataError: a run folder of the comparison is damaged.
        StorageError: the folder cannot be written.
    """
    results, found = comparison.results, comparison.frontier
    contents = {
        "table.csv": as_csv(results),
        "table.md": as_markdown(comparison).encode("utf-8", "replace"),
        "pairs.csv": pairs_csv(results.pairs),
        "frontier.csv": _frontier_csv(found),
        "statistics.json": json.dumps(_statistics(comparison, found), indent=1, allow_nan=False).encode(),
    }
    return [*write_files(comparison.folder, contents), write_page_of(comparison)]


def _statistics(comparison: Comparison, found: Frontier) -> Any:
    """Every number, null where it is undefined."""
    results = comparison.results
    return _finite(
        {
            "name": comparison.name,
            "prompts": len(comparison.prompts),
            "against": results.against,
            "headlines": headlines(comparison),
            "cautions": cautions(comparison),
            "toxicity": results.toxicity_scorer or None,
            "methods": [plain_values(row) for row in results.rows],
            "pairs": [{**plain_values(one), "significant": one.significant} for one in results.pairs],
            "failed": [
                {"method": cell.method, "seed": cell.seed, "reason": cell.failure} for cell in comparison.failed
            ],
            "missing": list(comparison.missing),
            "frontier": plain_values(found),
        }
    )


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _frontier_csv(found: Frontier) -> bytes:
    """One row per point: what it belongs to, and where it lies."""
    rows: list[list[Any]] = [["end", name, "", kl.mean, reward.mean] for name, (kl, reward) in found.ends.items()]
    for kind, lines in (("training", found.over_training), ("setting", found.over_settings)):
        for line in lines:
            rows += [[kind, line.name, point.step, point.kl, point.reward] for point in line.points]
    if found.best_of is not None:
        rows += [["best of n", "base", "", point.kl, point.reward] for point in found.best_of.points]
    rows += [["exact", "", point.beta, point.kl, point.reward] for point in found.exact]
    return csv_table(("kind", "name", "step_or_beta", "kl", "reward"), rows)
