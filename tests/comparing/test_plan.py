"""What a comparison's settings come to: each method's recipe, and what it may spend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropism.comparing.config import compare_config
from tropism.comparing.plan import method_plans, notes_of, shared_recipe, spendings
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.models.kernels import decode_kernels

RECIPE: dict[str, Any] = {
    "model": "demo",
    "algorithm": {"name": "ppo", "kl_coef": 0.3},
    "data": "prompts.txt",
    "eval_data": "held.txt",
    "reward": "vader",
    "prompts_per_step": 8,
    "total_steps": 77,
    "trainer": {"learning_rate": 1e-4, "evaluation": {"sampling": [{"temperature": 0.5}]}},
}


def recipe_of(methods: Any, name: str, **changes: Any) -> Recipe:
    config = compare_config(None, methods=methods, completions=800)
    recipe = next(plan.recipe for plan in method_plans(config, {**RECIPE, **changes}) if plan.method == name)
    assert recipe is not None
    return recipe


def test_a_method_has_what_is_shared_and_its_own_settings() -> None:
    own = {"sft": {"learning_rate": 1e-3}, "ppo": {"trainer": {"schedule": "cosine"}}, "grpo": {"group_size": 4}}
    ppo, grpo, sft = (recipe_of(own, name) for name in ("ppo", "grpo", "sft"))
    assert (ppo.algorithm.kl_coef, ppo.trainer.learning_rate, ppo.trainer.schedule) == (0.3, 1e-4, "cosine")  # type: ignore[attr-defined]
    assert (grpo.algorithm.group_size, grpo.algorithm.kl_coef) == (4, 0.05)  # type: ignore[attr-defined]
    assert sft.trainer.learning_rate == 1e-3 and sft.reward is None and sft.eval_data is None
    assert grpo.eval_data is None  # it is measured when it is through
    evaluated = {**RECIPE["trainer"], "evaluation": {"every": 5}}
    assert recipe_of(own, "grpo", trainer=evaluated).eval_data == "held.txt"


def test_a_variant_is_a_method_with_a_field_and_a_line_of_its_own() -> None:
    config = compare_config(None, methods="ppo@kl_coef=0.1,ppo@trainer.learning_rate=0.01,best-of-n@n=4", completions=8)
    one, other, best = method_plans(config, RECIPE)
    assert one.recipe is not None and other.recipe is not None
    assert (one.method, one.recipe.algorithm.kl_coef) == ("ppo@kl_coef=0.1", 0.1)  # type: ignore[attr-defined]
    assert (other.recipe.algorithm.kl_coef, other.recipe.trainer.learning_rate) == (0.3, 0.01)  # type: ignore[attr-defined]
    assert best.best_of == 4


def test_a_variant_is_its_method_as_the_recipe_has_it() -> None:
    section = {
        "completions": 8,
        "methods": {"ppo": {"num_epochs": 1, "trainer": {"seed": 3}}, "ppo@slow": {"trainer": {"max_grad_norm": 0.5}}},
    }
    slow = {"algorithm": {"num_epochs": 1}, "trainer": {"seed": 3, "max_grad_norm": 0.5}}
    assert compare_config(section).methods["ppo@slow"] == slow
    chosen = compare_config(section, methods="ppo@slow,ppo@kl_coef=0.1,grpo@kl_coef=0.1").methods
    assert chosen["ppo@slow"] == slow
    assert chosen["ppo@kl_coef=0.1"] == {"algorithm": {"num_epochs": 1, "kl_coef": 0.1}, "trainer": {"seed": 3}}
    assert chosen["grpo@kl_coef=0.1"] == {"algorithm": {"kl_coef": 0.1}}
    called = compare_config(section, methods={"ppo": {"num_epochs": 2}, "ppo@slow": {}}).methods
    assert called["ppo@slow"]["algorithm"] == called["ppo"]["algorithm"] == {"num_epochs": 2}
    alone = compare_config(None, methods={"ppo": {"num_epochs": 2}, "ppo@b": {"kl_coef": 0.1}}, completions=8).methods
    assert alone["ppo@b"]["algorithm"] == {"num_epochs": 2, "kl_coef": 0.1}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("sft,grop", "no method 'grop'; did you mean 'grpo'"),
        ("best_of-m", "did you mean 'best-of-n'"),
        ("reward-model", "trains no policy"),
        ("base", "measured always"),
        ("", "name the methods"),
        ("sft,sft", "twice"),
        ("ppo@a/b", "behind the @"),
        ({"ppo": {"reward": "vader"}}, "methods.ppo.reward: .*all methods get the same reward"),
        ({"ppo": {"sampling": {"temperature": 2}}}, "all methods sample alike"),
        ({"ilql": {"sampling": {"beta": 2, "top_k": 3}}}, "all methods sample alike"),
        ({"sft": {"total_steps": 3}}, "follows from the budget"),
        ({"sft": {"trainer": {"evaluation": {"every": 2}}}}, "all methods are measured alike"),
        ({"best-of-n": {"epochs": 3}}, "its only setting is n"),
        ({"grpo": {"grup_size": 4}}, "grpo.grup_size: grpo has no such setting; did you mean 'group_size'"),
    ],
)
def test_unknown_methods_and_settings_that_are_shared_are_refused(methods: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_config(None, methods=methods, completions=800)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "needs a reward"),
        ({"eval_data": None}, "made on held-out prompts"),
        ({"trainer": {"checkpoints": {"use_best": True}}}, "chooses weights by the prompts"),
        ({"data": ["a", "b"]}, "cannot reach; give the name of a file"),
        ({"reward": len}, "is a function of this program"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shared_recipe({**RECIPE, **changes})


def test_what_is_wrong_with_methods_is_told_of_all_at_once() -> None:
    methods: dict[str, Any] = {
        "sft": {"keep": 2},
        "grpo": {"group_size": 0},
        "conditioned": {"target_dropout": 0.0},
        "kto": {"epochs": 0},
        "ppo": {"keep": 0.5},
    }
    config = compare_config(None, methods=methods, completions=800)
    with pytest.raises(ConfigError) as error:
        method_plans(config, RECIPE)
    said = str(error.value)
    assert all(f"{name}: " in said for name in methods) and "group_size" in said and "target_dropout" in said


def test_a_budget_is_spent_in_whole_steps() -> None:
    """130 completions: 8 prompts x 4 of ppo are 4 steps and 2 left; rft samples 64 in every fourth step."""
    choice = {"share": 0.2, "targets": [0.5, 0.9], "guidance": [0]}
    config = compare_config({"choice": choice}, methods="ppo,sft,conditioned,best-of-n,rft", completions=130)
    spend = spendings(method_plans(config, RECIPE), config, 130)
    assert (spend["ppo"].steps, spend["ppo"].completions) == (4, 128)
    assert (spend["rft"].steps, spend["rft"].completions) == (8, 128)
    assert spend["sft"].pool == 128 and spend["sft"].steps is None
    assert (spend["conditioned"].per_choice, spend["conditioned"].pool) == (13, 104)
    assert spend["best-of-n"].completions == 0


@pytest.mark.parametrize(
    ("methods", "completions", "message"),
    [
        ("ppo", 31, "ppo: one step samples 32 and 31 are left"),
        ("rft", 100, "rft: 1 steps of 64 leave 36 .* give a budget such as 64 or 128"),
        ("conditioned", 100, "conditioned: 10% of it are kept to choose among 9 pairs"),
        ("sft", 5, "sft: it leaves 4 for the pool"),
        ("ppo,sft", 5, "ppo: .*; sft: "),
    ],
)
def test_a_budget_that_cannot_be_spent_is_refused_with_what_would_do(
    methods: str, completions: int, message: str
) -> None:
    config = compare_config(None, methods=methods, completions=completions)
    with pytest.raises(ConfigError, match=message):
        spendings(method_plans(config, RECIPE), config, completions)


def test_a_budget_is_needed_and_the_command_line_takes_the_place_of_the_file() -> None:
    with pytest.raises(ConfigError, match="--completions N or --seconds S"):
        compare_config(None, methods="sft")
    config = compare_config({"completions": 100, "methods": ["sft"]}, seconds=5.0, seeds="2")
    assert (config.completions, config.seconds, config.seeds) == (None, 5.0, (0, 1))
    assert compare_config({"completions": 1, "methods": ["sft"]}, seeds="4,7").seeds == (4, 7)
    kept = compare_config({"completions": 1, "methods": {"sft": {"epochs": 3}, "ppo": {}}}, methods="sft,rloo")
    assert kept.methods == {"sft": {"epochs": 3}, "rloo": {}}


def test_what_has_to_be_known_of_the_results_is_said() -> None:
    """Filters are part of what is sampled from, and methods of the pool have no line over training."""
    plans = method_plans(compare_config(None, methods="sft,dpo,grpo", completions=800), RECIPE)
    assert notes_of(Recipe.from_mapping({**RECIPE}), plans) == []
    filtered = {"sampling": {"top_k": 5, "top_p": 0.9}, "trainer": {"evaluation": {"every": 2}}}
    one, other = notes_of(Recipe.from_mapping({**RECIPE, **filtered}), plans)
    assert "top_k, top_p" in one and "filters included" in one
    assert "sft, dpo learn from the pool" in other and "grpo" not in other


@pytest.mark.parametrize("choice", [{"targets": [0.5, 0.5]}, {"guidance": [0, 1, 1]}])
def test_what_is_tried_twice_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(choice))} must list each number once"):
        compare_config({"choice": choice}, methods="conditioned", completions=800)


def test_kernels_that_cannot_be_compiled_are_told_of_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    decode_kernels.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"sampling\.compile needs a C compiler"):
            shared_recipe({**RECIPE, "sampling": {"compile": True}})
    finally:
        decode_kernels.cache_clear()
