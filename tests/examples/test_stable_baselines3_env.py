"""The example in which a learner from elsewhere trains on the token-level environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "stable_baselines3_env.py"


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("stable_baselines3")
    spec = importlib.util.spec_from_file_location("stable_baselines3_env", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_checker_accepts_the_environment_and_its_ppo_trains(example: ModuleType, tmp_path: Path) -> None:
    from stable_baselines3.common.env_checker import check_env

    before, after = example.train(tmp_path / "walks", steps=256, places=2, episodes=5)
    assert -0.5 * (example.TASK.max_length - 1) <= min(before, after)
    assert max(before, after) <= 0.9
    check_env(example.Walks(tmp_path / "walks"), warn=False)


def test_each_step_of_a_walk_is_rewarded_as_it_is_taken(example: ModuleType, tmp_path: Path) -> None:
    graph, _ = example.write_randomwalks(tmp_path / "walks", example.TASK, n_layer=1, n_embd=8, n_head=1)
    env = example.Walks(tmp_path / "walks")
    path = next(path for path in graph.paths(3) if len(path) > 2)
    beside = next(node for node in graph.starts if node not in graph.successors[path[0]] and node != path[0])
    env.reset(options={"item": {"prompt": "d"}})
    rewards = [float(env.step(node)[1]) for node in path[1:]]
    assert rewards == pytest.approx([-0.1] * (len(path) - 2) + [0.9])
    assert env.finish_reasons == ["stop"]
    env.reset(options={"item": {"prompt": "d"}})
    assert env.step(beside)[1] == -0.5


@pytest.mark.slow
def test_it_learns(example: ModuleType, tmp_path: Path) -> None:
    before, after = example.train(tmp_path / "walks", steps=12_000)
    assert before < -1.0
    assert after > 0.5
