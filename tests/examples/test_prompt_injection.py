"""The example that writes contrary rewards into prompts, on a model of a few thousand weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, early_letters

EXAMPLE = Path(__file__).parents[2] / "examples" / "prompt_injection.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("prompt_injection", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mechanism_is_asked_both_ways(example: Any, tmp_path: Path) -> None:
    table = example.compare(
        (tiny_model("llama", seed=3, max_position_embeddings=256), tiny_tokenizer()),
        prompts=PROMPTS,
        held_out=PROMPTS[:3],
        samples_per_prompt=4,
        completions=2,
        score=early_letters,
        runs=tmp_path,
        sampling=tropism.Sampling(max_new_tokens=6),
        total_steps=2,
        prompts_per_step=8,
        trainer=tropism.TrainerConfig(learning_rate=1e-3, progress=False),
    )
    assert [row["mechanism"] for row in table] == ["text", "text", "token", "token", "linear", "linear"]
    for low, high in zip(table[::2], table[1::2], strict=True):
        assert low["asked"] == high["written"] < high["asked"] == low["written"]
        assert low["moved"].mean == pytest.approx(low["contrary"] - low["agreeing"])
    text = example.show(table)
    assert len(text.splitlines()) == 8 and text.count("|") == 8 * 7
