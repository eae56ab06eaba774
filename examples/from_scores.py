"""From completions with rewards to what SFT, DPO and KTO learn from: the best of each prompt, pairs, and opinions.

tropism score src/tropism/demo_data/train.txt --model demo --n 16 --stop . --reward vader --out runs/warm-films.jsonl
python examples/from_scores.py runs/warm-films.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tropism.data.readers import read_records
from tropism.errors import TropismError

Rows = list[dict[str, Any]]


def by_prompt(records: Rows) -> list[Rows]:
    """The different finished completions of each prompt, the best first; prompts without a difference are left out.

    What the length limit cut has no end to learn, and a completion without a reward no place among the others; an empty
    one says nothing.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        finished = record["finish_reason"] != "length" and record["completion"].strip()
        if finished and record["reward"] is not None:
            groups.setdefault(record["prompt"], {}).setdefault(record["completion"], record)
    ordered = [sorted(group.values(), key=lambda record: -record["reward"]) for group in groups.values()]
    return [rows for rows in ordered if rows[0]["reward"] > rows[-1]["reward"]]


def best(rows: Rows) -> Rows:
    """The best quarter, at least one, for SFT."""
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows[: max(1, len(rows) // 4)]]


def pairs(rows: Rows) -> Rows:
    """The best with the worst, the second best with the second worst, and so on, for DPO."""
    halves = zip(rows[: len(rows) // 2], reversed(rows), strict=False)
    return [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in halves
        if one["reward"] > other["reward"]
    ]


def opinions(rows: Rows) -> Rows:
    """Each of them as liked where it is better than the mean of its prompt, else as disliked, for KTO."""
    mean = sum(row["reward"] for row in rows) / len(rows)
    return [{"prompt": row["prompt"], "completion": row["completion"], "label": row["reward"] > mean} for row in rows]


def write(scored: Path) -> None:
    """The three files, beside the given one."""
    groups = by_prompt(read_records(scored))
    for make in (best, pairs, opinions):
        lines = [json.dumps(record) + "\n" for rows in groups for record in make(rows)]
        path = scored.with_name(f"{scored.stem}-{make.__name__}.jsonl")
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(lines)} records of {len(groups)} prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description="Data for SFT, DPO and KTO from completions with rewards")
    parser.add_argument("scored", type=Path, help="a .jsonl file of tropism score")
    try:
        write(parser.parse_args().scored)
    except TropismError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
