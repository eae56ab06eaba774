"""Recipes of ILQL: what is trained on, what is held out and how it is measured, and what the commands show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import EPISODES, Setting, assemble, early_letters, execute, logged, make_recipe
from tropism.algorithms import ILQL
from tropism.build import run_recipe
from tropism.cli import main
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.errors import ConfigError, DataError, TropismError
from tropism.evaluation.method_loss import MethodLossEvaluation
from tropism.models.policy import Policy
from tropism.recipe_episodes import episodes_of
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import EvaluationConfig

SETTING = Setting("ilql", False, "llama")
TOKENIZER = tiny_tokenizer()
EARLY = RewardConfig.of({"terms": {"early": {"use": early_letters}}})


def written(folder: Path, records: list[dict[str, Any]] = EPISODES) -> str:
    path = folder / "episodes.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_held_out_episodes_have_the_scale_of_those_that_are_trained_on(tmp_path: Path) -> None:
    """Training returns 1 and 3: mean 2, deviation 1. A held-out return of 7 is then 5."""
    train = [{"turns": ["a", "b"], "reward": 1}, {"turns": ["c", "d"], "reward": [3]}]
    recipe = make_recipe(SETTING, tmp_path / "run", data=train, eval_data=[{"turns": ["e", "f"], "reward": 7}])
    texts = episodes_of(recipe, TOKENIZER, context_length=64)
    assert [episode.total for episode in texts.train] == [-1.0, 1.0]
    assert [episode.total for episode in texts.held_out] == [5.0]
    plain = make_recipe(SETTING, tmp_path / "run", algorithm=ILQL(normalise_returns=False), data=train)
    assert [episode.total for episode in episodes_of(plain, TOKENIZER, context_length=64).train] == [1.0, 3.0]


def test_pitfall_36_equal_rewards_are_refused_before_training(tmp_path: Path) -> None:
    same = [{**item, "reward": 1.0} for item in EPISODES]
    with pytest.raises(DataError, match="all 6 episodes have the return 1"):
        assemble(SETTING, tmp_path / "run", data=same)
    assert not (tmp_path / "run").exists()
    assemble(SETTING, tmp_path / "run", data=same, algorithm=ILQL(normalise_returns=False))


def test_the_split_parts_whole_prompts(tmp_path: Path) -> None:
    """Of each opening there are two episodes, which stay together, and the reward is evaluated on it once."""
    twice = [{**item, "turns": [*item["turns"][:1], "b"], "reward": r} for r in (0.0, 1.0) for item in EPISODES]
    data = DataConfig(path=written(tmp_path, twice), eval_fraction=0.3)
    assembly = assemble(SETTING, tmp_path / "run", data=data, reward=EARLY)
    source: Any = assembly.trainer.source
    loss, reward = (cast(Any, evaluation) for evaluation in assembly.run.evaluations)
    openings = [{episode.prompt_ids for episode in items} for items in (source.stream.items, loss.texts)]
    assert len(source.stream.items) == 2 * len(openings[0]) and len(openings[0]) + len(openings[1]) == 6
    assert not openings[0] & openings[1]
    prompts = reward.prompts
    assert len(prompts) == len(openings[1]) and {p.ids for p in prompts} == openings[1]
    assert "reward" in prompts[0].columns


def test_eval_data_may_be_prompts_or_episodes(tmp_path: Path) -> None:
    def kinds(**changes: Any) -> list[str]:
        assembly = assemble(SETTING, tmp_path / "run", **changes)
        return [type(evaluation).__name__ for evaluation in assembly.run.evaluations]

    loss, reward = "MethodLossEvaluation", "RewardEvaluation"
    assert kinds(eval_data=EPISODES[:2]) == [loss]
    assert kinds(eval_data=["a cat", "oh"], reward=EARLY) == [reward]
    assert kinds(eval_data=EPISODES[:2], reward=EARLY) == [loss, reward]
    assert kinds() == kinds(reward=EARLY) == []
    with pytest.raises(TropismError, match=r"(?s)reward.*record 0"):
        assemble(SETTING, tmp_path / "run", eval_data=["a cat", "oh"])


def test_held_out_loss_is_the_training_loss_of_the_same_texts(tmp_path: Path) -> None:
    """All texts in one batch, with a learning rate of next to nothing: the update's parts are the evaluation's."""
    algorithm = SETTING.with_algorithm(target_sync_every=1)
    changes: dict[str, Any] = {"eval_data": EPISODES, "prompts_per_step": 6, "total_steps": 3}
    assembly = execute(assemble(SETTING, tmp_path / "run", algorithm=algorithm, **changes))
    step, evaluation = logged(tmp_path / "run", "update")[0], logged(tmp_path / "run", "evaluation")[0]
    names = ("q", "v", "cql", "awac")
    for name in names:
        assert evaluation[f"eval/loss/{name}"] == pytest.approx(step[f"loss/{name}"], rel=1e-5)
    assert evaluation["eval/loss"] == pytest.approx(sum(step[f"loss/{name}"] for name in names), rel=1e-5)
    assert not any(parameter.grad is not None for parameter in assembly.policy.parameters())


def test_parts_of_a_held_out_loss_are_means_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three texts of 1, 2 and 3 tokens, two at once: the sums add up before they are divided."""
    sums = iter([{"one": 3.0, "other": 1.0}, {"one": 9.0}])
    weights = iter([{"one": 3.0, "other": 2.0}, {"one": 3.0, "other": 0.0}])
    monkeypatch.setattr("tropism.evaluation.method_loss.AT_ONCE", 2)
    collate: Any = tuple
    evaluation = MethodLossEvaluation(
        range(3), collate=collate, losses=lambda _: next(sums), weight=lambda _: next(weights)
    )
    metrics, table = evaluation(0)
    assert metrics == {"eval/loss": 2.5, "eval/loss/one": 2.0, "eval/loss/other": 0.5} and table is None


def test_evaluation_samples_with_the_recipes_beta(tmp_path: Path) -> None:
    """Before the first step values are 0, so that beta does nothing; after a few steps it does."""

    def rewards(beta: float) -> list[float]:
        recipe = make_recipe(
            SETTING,
            tmp_path / f"run-{beta}",
            algorithm=SETTING.with_algorithm(alpha=1.0, target_sync_every=1),
            eval_data=["a cat", "oh", "we ran", "no"] * 4,
            reward=EARLY,
            sampling=Sampling(max_new_tokens=6, beta=beta),
            total_steps=6,
            trainer={"learning_rate": 1e-2, "evaluation": EvaluationConfig(every=6)},
        )
        return [row["eval/reward"] for row in logged(run_recipe(recipe).path, "evaluation")]

    plain, guided = rewards(0.0), rewards(30.0)
    assert plain[0] == guided[0] and plain[1] != guided[1]


def test_settings_of_the_evaluation_may_list_betas(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(sampling=({"beta": 1.0}, {"beta": 100.0}))
    changes: dict[str, Any] = {"eval_data": ["a cat", "oh"], "reward": EARLY, "total_steps": 2}
    execute(assemble(SETTING, tmp_path / "run", trainer={"evaluation": evaluation}, **changes))
    last = logged(tmp_path / "run", "evaluation")[-1]
    assert {"eval/reward", "eval/reward@beta=1", "eval/reward@beta=100"} <= {name.replace(".0", "") for name in last}


def test_allowed_tokens_of_a_recipe_are_checked_first(tmp_path: Path) -> None:
    ways = tmp_path / "ways.json"
    ways.write_text(json.dumps({"a": ["no token"]}))
    sampling = Sampling(max_new_tokens=4, allowed_tokens=str(ways))
    with pytest.raises(ConfigError, match="'no token' is no token of the model's tokenizer"):
        assemble(SETTING, tmp_path / "run", eval_data=["a"], reward=EARLY, sampling=sampling)


def test_memory_counts_heads_and_their_targets(tmp_path: Path) -> None:
    assembly, bare = assemble(SETTING, tmp_path / "run"), Policy(tiny_model("llama", seed=3))
    head = 4 * (32 * 64 + 64 + 64 * 37 + 37)
    value = 4 * (32 * 64 + 64 + 64 + 1)
    plain = 4 * sum(p.numel() for p in bare.parameters())
    estimate = assembly.memory.estimate
    assert estimate.lasting["weights"] == pytest.approx(plain + 4 * head + value, abs=2000)  # buffers beside
    assert estimate.lasting["optimizer"] == 2 * (plain + 2 * head + value)


def test_heads_start_with_the_seed_and_no_other_randomness(tmp_path: Path) -> None:
    first, again = (assemble(SETTING, tmp_path / name).policy.q_heads for name in ("one", "two"))
    other = assemble(SETTING, tmp_path / "three", seed=8).policy.q_heads
    assert first is not None and again is not None and other is not None
    weights = [heads.q[0].inner.weight for heads in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that a command line can go by."""
    folder = tmp_path_factory.mktemp("ilql")
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer()
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    recipe = {
        "model": str(folder / "start"),
        "algorithm": {"name": "ilql", "alpha": 1.0, "target_sync_every": 1},
        "data": {"path": written(folder), "eval_fraction": 0.3},
        "run": str(folder / "run"),
        "total_steps": 6,
        "prompts_per_step": 4,
        "sampling": {"max_new_tokens": 6, "beta": 2.0},
        "reward": {"terms": {"length": {"use": "length", "args": {"goal": "maximise"}}}},
        "trainer": {"learning_rate": 0.02, "progress": False},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run_recipe(Recipe.from_file(folder / "recipe.yaml"))
    return folder / "run"


def output_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_generate_takes_beta_and_allowed_tokens(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(run_folder), "a cat", "--n", "3", "--max-new-tokens", "6", "--device", "cpu"]
    plain, guided = output_of(command, capsys), output_of([*command, "--beta", "50"], capsys)
    assert plain != guided
    (tmp_path / "ways.json").write_text(json.dumps({"t": ["o"], "o": ["t"]}))
    ruled = output_of([*command, "--beta", "50", "--allowed-tokens", str(tmp_path / "ways.json")], capsys)
    assert ruled.count("ototot") == 3


def test_generate_refuses_beta_of_a_plain_model(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(run_folder.parent / "start"), "a cat", "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*command, "--beta", "4"]) != 0
    assert "this model has none; train one with algorithm: ilql" in " ".join(capsys.readouterr().err.split())


def test_evaluate_guides_the_trained_model_alone(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(["evaluate", str(run_folder)], capsys)
    assert "base" in shown and "trained" in shown


def test_inspect_shows_rewards(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(["inspect", str(run_folder.parent / "recipe.yaml"), "--rows", "2"], capsys)
    assert "episodes to train on" in shown and "reward" in shown
    lines = [line.split() for line in shown.splitlines() if line.startswith("  ")]
    assert any(len(line) == 7 for line in lines)  # a token that is paid something


def test_dry_run_counts_episodes(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(run_folder.parent / "recipe.yaml"), "--run", str(tmp_path / "new"), "--dry-run"]
    shown = output_of(command, capsys)
    assert "episodes per step: 4" in shown and "Everything checked" in shown
    assert not (tmp_path / "new").exists()
