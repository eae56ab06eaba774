"""Random walks: what each method reaches, against the known optimum of 1; exactly where the model is a plain one.

The quick tests take a small graph and a small model; the slow ones run the recipes on the graph of the source.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import tropism
from tiny_runs import logged
from tropism.cli import main
from tropism.envs.randomwalks import RandomWalksConfig, read_graph
from tropism.envs.randomwalks_model import expected_optimality, greedy, guided, sampled, write_randomwalks

pytestmark = pytest.mark.learning

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "randomwalks"
SMALL = RandomWalksConfig(n_nodes=10, max_length=8, n_walks=300, p_edge=0.2, seed=3)


def exact(folder: Path, run: Path, walker: Any = sampled) -> float:
    """Mean over all starts of the expected optimality of a run's model."""
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    found = expected_optimality(read_graph(folder), walker(model))
    return sum(found.values()) / len(found)


def exact_guided(folder: Path, run: Path, beta: float) -> float:
    """The same of the walks that a run's Q heads guide."""
    policy = tropism.TextPolicy.load(run).policy
    found = expected_optimality(read_graph(folder), guided(policy, beta))
    return sum(found.values()) / len(found)


def mean_of_data(folder: Path) -> float:
    rewards = [json.loads(line)["reward"] for line in (folder / "walks.jsonl").read_text().splitlines()]
    return sum(rewards) / len(rewards)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "walks"
    write_randomwalks(folder, SMALL, n_layer=2, n_embd=32, n_head=2)
    return folder


@pytest.fixture(scope="module")
def imitator(small: Path) -> Path:
    """The run of a model that walks as the data does."""
    result = tropism.train(
        str(small / "model"),
        tropism.SFT(),
        data=str(small / "walks.jsonl"),
        run=small.parent / "sft",
        total_steps=80,
        prompts_per_step=50,
        trainer=tropism.TrainerConfig(learning_rate=1e-2, schedule="linear", progress=False),
    )
    return result.path


def test_imitation_is_as_good_as_the_data(small: Path, imitator: Path) -> None:
    assert exact(small, imitator) == pytest.approx(mean_of_data(small), abs=0.1)
    assert mean_of_data(small) < 0.75


@pytest.mark.parametrize(
    "algorithm",
    [
        tropism.PPO(group_size=5, kl_coef=0.0, critic=tropism.Critic(coef=1.2, rate=1.0)),
        tropism.GRPO(group_size=6, kl_coef=0.0),
    ],
    ids=lambda algorithm: algorithm.name,
)
def test_rewarded_walks_become_short_ones(
    algorithm: tropism.algorithms.AlgorithmConfig, small: Path, imitator: Path, tmp_path: Path
) -> None:
    tropism.train(
        str(imitator / "model"),
        algorithm,
        data=str(small / "prompts.jsonl"),
        reward={"use": "randomwalks", "args": {"graph": str(small)}},
        run=tmp_path / "run",
        total_steps=20,
        prompts_per_step=9,
        sampling=tropism.Sampling(max_new_tokens=8),
        trainer=tropism.TrainerConfig(learning_rate=3e-3, progress=False),
    )
    assert exact(small, tmp_path / "run") > 0.9


def test_the_values_of_offline_walks_lead_to_short_ones(small: Path, tmp_path: Path) -> None:
    """Nothing is sampled in training. Beta 0 walks as the data does."""
    result = tropism.train(
        str(small / "model"),
        tropism.ILQL.preset("trlx/randomwalks"),
        data=str(small / "walks.jsonl"),
        run=tmp_path / "run",
        total_steps=100,
        prompts_per_step=50,
        trainer=tropism.TrainerConfig(learning_rate=1e-2, schedule="linear", progress=False),
    )
    own, much = (exact_guided(small, result.path, beta) for beta in (0.0, 100.0))
    assert own == pytest.approx(exact(small, result.path), abs=1e-4)
    assert much > 0.9
    assert much > max(own, mean_of_data(small)) + 0.15


# The recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the command and the first recipe have been run."""
    folder = tmp_path_factory.mktemp("task")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["randomwalks", "runs/randomwalks"]) == 0
        assert main(["train", str(RECIPES / "sft.yaml"), "--trainer.progress", "false"]) == 0
    finally:
        os.chdir(before)
    return folder


def run_recipe(name: str, seed: int, task: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(task)
    run = Path("runs") / f"{name}-{seed}"
    words = ["--seed", str(seed), "--run", str(run), "--trainer.progress", "false"]
    assert main(["train", str(RECIPES / f"{name}.yaml"), *words]) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_recipe_comes_close_to_the_optimum(
    name: str, seed: int, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_recipe(name, seed, task, monkeypatch)
    folder = Path("runs/randomwalks")
    assert exact(folder, Path("runs/randomwalks-sft")) < 0.82
    assert exact(folder, run) >= 0.9
    assert exact(folder, run, greedy) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ilql_goes_beyond_its_data(seed: int, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_recipe("ilql", seed, task, monkeypatch)
    last = logged(run, "evaluation")[-1]
    folder = Path("runs/randomwalks")
    data, own, much = mean_of_data(folder), exact_guided(folder, run, 0.0), exact_guided(folder, run, 100.0)
    assert data == pytest.approx(0.790, abs=1e-3)
    assert much >= 0.9
    assert much > max(data, own) + 0.1
    assert last["eval/reward@beta=100"] > last["eval/reward@beta=1"] > 0.5
