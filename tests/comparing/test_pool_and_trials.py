"""Pools that go on and are never cut anew, budgets of seconds, chats, the command, and the recipe of the stories."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_comparisons import Processes, cell, here, make_course, write_files
from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main
from tropism.comparing import pool, trials
from tropism.comparing.config import SECTION, compare_config
from tropism.comparing.plan import MethodPlan, method_plans, shared_recipe, spendings
from tropism.comparing.trials import Rates, budget_of
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.safe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT / "recipes" / "compare" / "stories.yaml"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return here(monkeypatch)


def sampled(recipe: dict[str, Any], path: Path, completions: int = 48) -> list[dict[str, Any]]:
    pool.sample_pool(shared_recipe(recipe), path, completions=completions, seed=0, allow_code=True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_pool_goes_on_to_the_same_end(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are the same, and the seconds of both parts add up, since each row holds its own."""
    recipe["sampling"]["batch_size"] = 4  # four groups of four in a call
    whole = sampled(recipe, tmp_path / "whole.jsonl")
    rows, calls = pool._rows, [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return rows(*arguments, **options)

    monkeypatch.setattr(pool, "_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampled(recipe, tmp_path / "cut.jsonl")
    partial = (tmp_path / "cut.jsonl.partial").read_bytes()
    kept = [json.loads(line)["columns"] for line in partial.splitlines()]
    assert len(kept) == 32 and pool.read_pool(tmp_path / "cut.jsonl") is None
    monkeypatch.setattr(pool, "_rows", rows)
    cut = sampled(recipe, tmp_path / "cut.jsonl")
    assert cut[:32] == kept
    assert [{**row, "seconds": 0} for row in cut] == [{**row, "seconds": 0} for row in whole]
    assert all(row["seconds"] > 0 for row in cut)
    counts = [sum(row["prompt_index"] == place for row in cut) for place in range(6)]
    assert counts == [8] * 6 and cut[0]["prompt_index"] == cut[3]["prompt_index"] != cut[4]["prompt_index"]


def test_a_pool_is_not_taken_for_another(recipe: dict[str, Any], tmp_path: Path) -> None:
    sampled(recipe, tmp_path / "pool.jsonl", 16)
    facts = pool.PoolFacts(**json.loads((tmp_path / "pool.facts.json").read_text()))
    assert facts.completions == 16 and facts.prompts == 4 and facts.per_prompt == 4
    assert len(pool.read_pool(tmp_path / "pool.jsonl", facts) or []) == 16
    for name, value in (("completions", 32), ("prompts", 8), ("training_prompts", "other")):
        with pytest.raises(ConfigError, match=f"other {name.replace('_', ' ')}"):
            pool.read_pool(tmp_path / "pool.jsonl", replace(facts, **{name: value}))
    (tmp_path / "pool.jsonl").unlink()
    (tmp_path / "pool.jsonl.partial").write_text("")
    (tmp_path / "pool.jsonl.state.json").write_text(json.dumps({"version": 1, "total": 99}))
    with pytest.raises(ConfigError, match="begun with another"):
        sampled(recipe, tmp_path / "pool.jsonl", 16)


def test_chats_count_their_tokens_and_are_learned(recipe: dict[str, Any], processes: Processes) -> None:
    tiny_tokenizer(chat=True).save_pretrained("model")
    recipe["data"] = {"path": "prompts.txt", "chat": True}
    recipe["eval_data"] = {"path": "held-out.txt", "chat": True}
    Path("rewards.py").write_text(
        "def early(completions):\n    return [len(set(chat[0]['content'])) / 9 for chat in completions]\n"
    )
    out = Path("out")
    assert make_course(recipe, "sft,dpo,ilql", out=out).run() == {}
    rows = [json.loads(line) for line in (out / "pools" / "seed0.jsonl").read_text().splitlines()]
    assert isinstance(rows[0]["prompt"], list) and rows[0]["completion"][0]["role"] == "assistant"
    assert 48 <= cell(out, "sft-seed0")["tokens"] == sum(row["tokens"] for row in rows) <= 48 * 5


def test_a_budget_of_seconds_is_what_fits_into_them() -> None:
    """Of 10 s at 0.1 s each: 100; where a fifth of them costs 0.6 s: 10 / (0.8 * 0.1 + 0.2 * 0.6)."""
    plain, choosing = MethodPlan(method="sft", recipe=None), MethodPlan(method="conditioned", recipe=None, choices=3)
    rates = Rates(completion=0.1, choice=0.6)
    assert budget_of(rates, plain, seconds=10, share=0.2) == 100
    assert budget_of(rates, choosing, seconds=10, share=0.2) == 50


def test_trials_are_taken_over_only_where_everything_is_equal(
    recipe: dict[str, Any], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each method has a pool of its own size, of which it is charged."""
    monkeypatch.setattr(trials, "POOLED", 48)
    measured: list[str] = []
    whole = trials._measured

    def noted(course: Any, plan: MethodPlan) -> Rates:
        measured.append(plan.method)
        assert whole(course, plan).completion > 0
        return Rates(completion=0.05 if plan.method == "sft" else 0.1, choice=0.1)

    monkeypatch.setattr(trials, "_measured", noted)
    out, methods = Path("out"), {"sft": {"epochs": 1}, "grpo": {"group_size": 2}}
    assert make_course(recipe, methods, out=out, seconds=2.0).run() == {}
    assert measured == ["sft", "grpo"]
    assert cell(out, "sft-seed0")["completions"] == 40 and cell(out, "grpo-seed0")["completions"] == 16
    pooled = [json.loads(line) for line in (out / "pools" / "sft-seed0.jsonl").read_text().splitlines()]
    assert cell(out, "sft-seed0")["tokens"] == sum(row["tokens"] for row in pooled)
    make_course(recipe, {**methods, "rloo": {"group_size": 2}}, out=out, seconds=2.0).run()
    assert measured == ["sft", "grpo", "rloo"]


def test_a_budget_of_seconds_stays_what_it_was_once_a_cell_is_begun(
    recipe: dict[str, Any], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More processes make each slower: a new trial would give the second seed another budget than the first."""
    rates = [0.05, 0.1]

    def measured(course: Any, plan: MethodPlan) -> Rates:
        (course.folder / "trials").mkdir(exist_ok=True)
        return Rates(completion=rates.pop(0), choice=0.1)

    monkeypatch.setattr(trials, "_measured", measured)
    out, methods = Path("out"), {"sft": {"epochs": 1}}
    make_course(recipe, methods, out=out, seconds=2.0).run()
    course = make_course(recipe, methods, out=out, seconds=2.0, seeds=2)
    course.processes = 2
    assert course.run() == {}
    assert [cell(out, f"sft-seed{seed}")["completions"] for seed in (0, 1)] == [40, 40] and rates == [0.1]
    for path in [*out.glob("cells/sft-*"), *out.glob("pools/sft-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    course = make_course(recipe, methods, out=out, seconds=2.0)
    course.processes = 2
    assert course.run() == {}
    assert cell(out, "sft-seed0")["completions"] == 20


def test_a_shared_beta_is_for_the_measurement_of_ilql_alone(recipe: dict[str, Any], processes: Processes) -> None:
    recipe["sampling"]["beta"] = 4.0
    out = Path("out")
    assert make_course(recipe, "ilql,sft", out=out).run() == {}
    assert cell(out, "ilql-seed0")["settings"] == {"beta": 4.0}


def test_the_command_says_what_it_would_do_and_refuses_at_once(
    recipe: dict[str, Any], processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(json.dumps(recipe))  # which is YAML, too
    words = ["compare", "recipe.yaml", "--allow-code", "--completions", "48", "--seeds", "1"]
    assert main([*words, "--methods", "sft,rloo,best-of-n", "--rloo", "1", "--dry-run"]) == 2
    assert main([*words, "--methods", "sft,best-of-n", "--sampling.top_k", "3", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "pool (demonstrations)" in shown.out and "filters included" in shown.out and not Path("runs").exists()
    assert main([*words, "--methods", "sft,grop"]) == 2
    assert "did you mean 'grpo'" in capsys.readouterr().err
    assert main([*words, "--methods", "sft", "--sampling.max_new_tokens", "60"]) == 2
    assert "tokens, but at most 4 fit beside the completion" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(["compare", "--show", "nowhere"]) == 2


def test_the_command_trains_and_shows_and_tells_of_failures(
    recipe: dict[str, Any], processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1 where a cell has failed, and the table is there all the same."""
    recipe[SECTION] = {"methods": {"sft": {"epochs": 1, "learning_rate": 1e30}, "best-of-n": {"n": 2}}, "seeds": 1}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    words = ["compare", "recipe.yaml", "--allow-code", "--completions", "48", "--out", "out"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "sft-seed0: failed" in shown.out and "best-of-n" in shown.out and "sft-seed0" in shown.err
    assert main(["compare", "--show", "out"]) == 0
    assert "best-of-n" in capsys.readouterr().out


def test_the_recipe_of_the_stories_can_be_compared() -> None:
    mapping = read_yaml(STORIES)
    config = compare_config(mapping.pop(SECTION))
    assert len(config.methods) == 6 and len(config.seeds) == 3
    mapping |= {name: str(ROOT / mapping[name]) for name in ("data", "eval_data")}
    assert isinstance(shared_recipe(mapping), Recipe) and config.completions is not None
    spend = spendings(method_plans(config, mapping), config, config.completions)
    left = [config.completions - one.completions for name, one in spend.items() if name != "best-of-n"]
    assert all(0 <= rest < 8 for rest in left)
    lists = [
        (ROOT / "recipes" / "compare" / f"stories-{name}.txt").read_text().splitlines()
        for name in ("train", "held-out")
    ]
    assert [len(set(lines)) for lines in lists] == [64, 48] and not set(lists[0]) & set(lists[1])


def test_the_stories_run_small(
    recipe: dict[str, Any], processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("vaderSentiment")
    monkeypatch.chdir(ROOT)
    tiny_model("llama", seed=3, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    small = ("--sampling.max_new_tokens", "4", "--prompts_per_step", "2", "--methods", "sft,grpo", "--seeds", "1")
    words = ["compare", str(STORIES), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *small]
    fewer = ("--compare.methods.grpo.minibatch_size", "8", "--samples-per-prompt", "1", "--completions", "64")
    assert main([*words, *fewer]) == 0
    assert cell(tmp_path / "out", "grpo-seed0")["completions"] == 64
