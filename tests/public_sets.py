"""Small made-up files in the formats of public data sets about toxic text. Nothing in them is from those sets."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

SCORED: list[tuple[str, float | None, str, float | None, bool]] = [
    ("The soup was so", 0.9, " cold, you turnip", 0.7, True),
    ("My neighbour is a", 0.6, " gardener", 0.1, False),
    ("It rained on", 0.1, " Tuesday", 0.5, False),
    ("Nobody asked the", None, " turnip for advice", 0.8, False),
    ("Such a cabbage", 0.5, ", said the cook", 0.5, True),
]
"""Prompt, its toxicity, continuation, its toxicity, whether it is challenging."""

TURNS: list[tuple[str, str, int, int, str, str]] = [
    ("Cats are no good", "CATS", 7, 0, "made_up", "HS"),
    ("Mine keeps me warm", "CATS", 7, 1, "made_up", "CN"),
    ("They scratch\nthe chairs", "CATS", 7, 2, "made_up", "HS"),
    ("A post helps", "CATS", 7, 3, "made_up", "CN"),
    ("Dogs are too loud", "DOGS", 3, 0, "made_up", "HS"),
    ("They are glad to see you", "DOGS", 3, 1, "made_up", "CN"),
]
"""The columns of ``DIALOGUE_COLUMNS``."""
DIALOGUE_COLUMNS = ("text", "TARGET", "dialogue_id", "turn_id", "source", "type")

PAIRS: list[tuple[int, str, str, str, str]] = [
    (0, "Cats are no good", "Mine keeps me warm", "CATS", "V1"),
    (1, "Cats are no good", "They only seem aloof", "CATS", "V1"),
    (2, "Dogs are too loud", "They are glad to see you", "DOGS", "V2"),
]
"""The columns of ``PAIR_COLUMNS``."""
PAIR_COLUMNS = ("INDEX", "HATE_SPEECH", "COUNTER_NARRATIVE", "TARGET", "VERSION")


def toxicity_records() -> list[dict[str, Any]]:
    """``SCORED`` as RealToxicityPrompts has it."""
    return [
        {
            "filename": f"made-up-{index}.txt",
            "challenging": challenging,
            "prompt": {"text": prompt, "toxicity": toxicity, "insult": toxicity},
            "continuation": {"text": continuation, "toxicity": after, "insult": after},
        }
        for index, (prompt, toxicity, continuation, after, challenging) in enumerate(SCORED)
    ]


def write_toxicity_prompts(path: Path) -> Path:
    """A file of ``toxicity_records``: .jsonl, .jsonl.gz or .parquet."""
    records = toxicity_records()
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_table(path: Path, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Path:
    """A CSV file as pandas writes it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return path


def write_dialogues(path: Path) -> Path:
    """``TURNS`` as DIALOCONAN has it."""
    return write_table(path, DIALOGUE_COLUMNS, list(TURNS))


def write_pairs(path: Path) -> Path:
    """``PAIRS`` as multi-target CONAN has it."""
    return write_table(path, PAIR_COLUMNS, list(PAIRS))
