"""The forms of one pool: what each method that learns from given data makes of the same scored completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tropism.comparing.plan import Form
from tropism.comparing.prompts import PROMPT
from tropism.data.config import DataConfig
from tropism.data.demonstrations import FINISH_REASON
from tropism.errors import DataError
from tropism.storage import write_whole

Row = Mapping[str, Any]
"""A completion of the pool: prompt_index, prompt, completion, finish_reason, reward, terms, tokens, seconds."""
PAIRED = 8
"""Completions of a prompt of which the best and the worst make a pair."""
COMPLETION = "completion"


def form_of(rows: Sequence[Row], form: Form, *, keep: float, where: str) -> list[dict[str, Any]]:
    """The records that a method reads.

    Args:
        rows: of the pool, those that the method learns from; completions without a reward are left out.
        keep: of demonstrations: the share of each prompt's completions.
        where: names the pool in messages.

    Raises:
        DataError: nothing is left, because all completions of every prompt have the same reward, or none has one.
    """
    scored = [row for row in rows if row["reward"] is not None]
    make: dict[str, Callable[[list[Row]], list[dict[str, Any]]]] = {
        "demonstrations": lambda group: _best(group, keep),
        "pairs": _pairs,
        "opinions": _opinions,
        "episodes": _rewarded,
        "scored": _rewarded,
    }
    records = [record for group in _by_prompt(scored) for record in make[form](group)]
    if not records:
        raise DataError(
            f"{where}: of {len(rows)} completions nothing is left to learn as {form}: "
            + ("none of them has a reward" if not scored else "those of each prompt all have the same reward")
        )
    return records


def write_form(records: Sequence[Row], path: Path) -> DataConfig:
    """The records as a file, and how it is read.

    Raises:
        StorageError: it cannot be written.
    """
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    completes = COMPLETION in records[0]
    return DataConfig(path=str(path), prompt_column=PROMPT, completion_column=COMPLETION if completes else None)


def _by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    """The completions of each prompt, in the order of the pool."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    return list(groups.values())


def _record(row: Row) -> dict[str, Any]:
    return {PROMPT: row["prompt"], COMPLETION: row["completion"], FINISH_REASON: row["finish_reason"]}


def _best(group: list[Row], keep: float) -> list[dict[str, Any]]:
    """The better part, at least one; of equals those that were sampled first."""
    ranked = sorted(group, key=lambda row: -row["reward"])
    return [_record(row) for row in ranked[: max(1, round(keep * len(group)))]]


def _pairs(group: list[Row]) -> list[dict[str, Any]]:
    """The best against the worst of every few completions, as they were sampled."""
    pairs = []
    for begin in range(0, len(group), PAIRED):
        few = [row for row in group[begin : begin + PAIRED] if _has_text(row["completion"])]
        if len(few) < 2:
            continue
        best, worst = max(few, key=lambda row: row["reward"]), min(few, key=lambda row: row["reward"])
        if best["reward"] > worst["reward"]:
            pair = {PROMPT: best["prompt"], "chosen": best["completion"], "rejected": worst["completion"]}
            ends = {"chosen_finish_reason": best["finish_reason"], "rejected_finish_reason": worst["finish_reason"]}
            pairs.append(pair | ends)
    return pairs


def _has_text(completion: Any) -> bool:
    """Pairs of which one side is empty are refused by their reader."""
    text = completion if isinstance(completion, str) else "".join(str(one.get("content") or "") for one in completion)
    return bool(text.strip())


def _opinions(group: list[Row]) -> list[dict[str, Any]]:
    """Liked above the mean of the prompt, not liked below; what is the mean itself says nothing."""
    mean = sum(row["reward"] for row in group) / len(group)
    return [{**_record(row), "label": row["reward"] > mean} for row in group if row["reward"] != mean]


def _rewarded(group: list[Row]) -> list[dict[str, Any]]:
    """All, each with its reward and every term of it; the total is ``reward``, whatever terms are called."""
    return [{**_record(row), **row["terms"], "reward": row["reward"]} for row in group]
