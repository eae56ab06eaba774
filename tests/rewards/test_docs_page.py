"""The examples of docs/rewards.md do what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tropism.rewards import RewardConfig, RewardHarness, registry, reward_names

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()


@pytest.fixture
def own_names() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def test_python_examples_run(own_names: None) -> None:
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, scope)
    assert "starts-with" in reward_names()
    batch = scope["batch"]
    torch.testing.assert_close(batch.per_completion, torch.tensor([0.86, -0.06]))  # type: ignore[attr-defined]
    assert batch.terms["polite"].tolist() == [1.0, 0.0]  # type: ignore[attr-defined]


def test_recipe_examples_build() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    pytest.importorskip("vaderSentiment")
    harness = RewardHarness(RewardConfig.of(yaml.safe_load(block)["reward"]))
    assert list(harness.functions) == ["warmth", "brevity", "watched"]


def test_every_registered_reward_is_on_the_page() -> None:
    table = PAGE.partition("## Rewards that have a name")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(registry.FACTORIES)
