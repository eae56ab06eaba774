"""The example that makes the data of SFT, DPO and KTO from completions with rewards."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "from_scores.py"


def row(prompt: str, completion: str, reward: float | None, finish_reason: str = "stop") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "finish_reason": finish_reason, "reward": reward}


ROWS = [
    row("The film", " bored me", -0.6),
    row("The film", " is mine", 0.0),
    row("I", " left", -0.1),
    row("The film", " moved me", 0.7),
    row("The film", " moved me", 0.7),  # said twice: learned once
    row("The film", " was", 0.9, "length"),  # cut
    row("The film", " ran", None),  # no opinion
    row("The film", " ", -0.9),  # nothing said
    row("The film", " won", 0.5, "eos"),
    row("I", " left", -0.1),  # the prompt's only different completion
    row("We", " sat", 0.3),
    row("We", " ran", 0.3),  # no difference
]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    spec = importlib.util.spec_from_file_location("from_scores", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ROWS))
    module.write(tmp_path / "films.jsonl")
    return tmp_path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_quarter_is_imitated(written: Path) -> None:
    assert records(written / "films-best.jsonl") == [{"prompt": "The film", "completion": " moved me"}]


def test_the_best_is_paired_with_the_worst(written: Path) -> None:
    assert records(written / "films-pairs.jsonl") == [
        {"prompt": "The film", "chosen": " moved me", "rejected": " bored me"},
        {"prompt": "The film", "chosen": " won", "rejected": " is mine"},
    ]


def test_what_is_better_than_the_mean_is_liked(written: Path) -> None:
    """The mean of -0.6, 0, 0.5 and 0.7 is 0.15."""
    liked = {record["completion"]: record["label"] for record in records(written / "films-opinions.jsonl")}
    assert liked == {" bored me": False, " is mine": False, " won": True, " moved me": True}
