"""The example that pushes what a model says of a named thing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("vaderSentiment")

EXAMPLE = Path(__file__).parents[2] / "examples" / "controllable_sentiment.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("controllable_sentiment", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TOKENS = 4
    module.OPENINGS, module.HELD_OUT = ["the {} is", "a {} was"], ["so, the {} is"]
    module.THING, module.OTHER = "velmora", "tandrik"
    return module


def test_only_sentences_that_mention_the_thing_count(example: ModuleType) -> None:
    text = "The Velmora lamp is good. I hate rain! My Velmora\nis a disaster"
    assert example.sentences_about(text, "Velmora") == "The Velmora lamp is good. My Velmora"
    good, none, bad = example.opinions(["Velmora is great.", "All is great.", "Velmora is awful."], "Velmora")
    assert good > 0.5 and none == 0 and bad < -0.4


@pytest.mark.parametrize("way", ["tropism", "textrl"])
def test_both_ways_train(example: ModuleType, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = (tiny_model("llama", max_position_embeddings=96), tiny_tokenizer())
    settings: dict[str, Any] = {"run": str(tmp_path / "run"), "lora": tropism.LoRA(rank=2)}
    settings |= {"trainer": tropism.TrainerConfig(progress=False)}
    if way == "textrl":
        settings = {"outdir": tmp_path / "run", "epochs": 1}
    policy = example.WAYS[way](model, -1.0, steps=1, **settings)
    means = example.show("after", policy)
    assert set(means) == {"velmora", "tandrik"} and all(-1 <= mean <= 1 for mean in means.values())
    assert capsys.readouterr().out.startswith("after: velmora")
    assert (tmp_path / "run").is_dir()
