"""The examples of docs/rewards.md do what the page says."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny_classifiers import save_bert
from tiny_reward_models import FACTS, NORMAL, tiny_reward_model
from tropism.models.reward_files import save_reward_model
from tropism.rewards import RewardConfig, RewardHarness, RewardTerm, registry, reward_names
from tropism.types import RewardInputs

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()


@pytest.fixture
def own_names() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the reward model of the page in it."""
    model, tokenizer = tiny_reward_model("llama")
    save_reward_model(model, tokenizer, tmp_path / "runs" / "my-rm" / "model", replace(FACTS, normalised=NORMAL))
    (tmp_path / "runs" / "my-rm" / "recipe.yaml").write_text("algorithm: {name: reward-model}\n")
    monkeypatch.chdir(tmp_path)


def test_python_examples_run(own_names: None, trained: None) -> None:
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, scope)
    assert "starts-with" in reward_names()
    batch = scope["batch"]
    torch.testing.assert_close(batch.per_completion, torch.tensor([0.86, -0.06]))  # type: ignore[attr-defined]
    assert batch.terms["polite"].tolist() == [1.0, 0.0]  # type: ignore[attr-defined]


def test_recipe_examples_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: None) -> None:
    blocks = [yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("profanity_check")
    judge = save_bert(tmp_path / "hate", labels={0: "nothate", 1: "hate"})
    for block in blocks:
        if isinstance(block, dict) and "clean" in block.get("terms", {}):  # not downloaded
            block["terms"]["clean"]["args"] |= {"model": str(judge), "device": "cpu"}
    monkeypatch.setenv("JUDGE_TOKEN", "Bearer x")
    (tmp_path / "judge.py").write_text("def score(completions):\n    return [1.0] * len(completions)\n")
    terms = []
    for block in blocks:
        harness = RewardHarness(RewardConfig.of(block), allow_code=True)
        terms.append(list(harness.terms))
        harness.close()
    assert terms == [
        ["warmth", "brevity", "watched"],
        ["judge", "short"],
        ["remote"],
        ["clean"],
        ["decent"],
        ["my-rm"],
        ["liked", "short"],
    ]


def test_the_server_of_the_page_answers(own_names: None) -> None:
    scope: dict[str, Any] = {}
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Judge" in code)
    exec(block, scope)
    assert len(block.splitlines()) < 25
    scope["Judge"].log_message = lambda *_: None
    server = scope["serve"](0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/score"
    harness = RewardHarness(RewardConfig.of({"use": "remote", "args": {"url": url}}))
    inputs = RewardInputs(
        prompts=["p"] * 2, completions=["x", "x" * 99], completion_ids=[[1], [1]], finish_reasons=["eos"] * 2
    )
    assert harness.score(inputs).per_completion.tolist() == [1.0, 0.0]
    harness.close()
    server.shutdown()
    server.server_close()


def test_the_table_of_settings_holds_the_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE))
    defaults = {f.name: repr(f.default) for f in dataclasses.fields(RewardTerm)}
    assert rows == {name: defaults[name] for name in ("rows_per_call", "concurrency", "cache")}


def test_every_registered_reward_is_on_the_page() -> None:
    table = PAGE.partition("## Rewards that have a name")[2]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == set(registry.FACTORIES)
