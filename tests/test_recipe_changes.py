"""Resuming with a changed recipe: field by field, as the table in docs/training.md says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tropism.algorithms import GRPO
from tropism.algorithms.base import Algorithm, AlgorithmConfig, RunFacts
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.recipe_changes import Change, Standing, changed_fields, fields_of, flat_settings, setting_text
from tropism.rewards import RewardConfig
from tropism.schema import apply_overrides

DOCS = Path(__file__).resolve().parents[1] / "docs" / "training.md"

RECIPE: dict[str, Any] = {
    "model": {"name": "demo", "device": "cpu"},
    "algorithm": {"name": "ppo", "kl": {"target": 6.0}},
    "data": {"path": "prompts.txt", "prompt_column": "text"},
    "eval_data": {"path": "held_out.txt"},
    "reward": {"terms": {"warm": {"use": "vader", "rows_per_call": 2}}},
    "metrics": {"short": {"use": "length", "args": {"goal": 5}}},
    "run": "runs/warm",
    "total_steps": 10,
    "sampling": {"truncation": {"token": ".", "after": 2}},
    "lora": {"rank": 4},
    "trainer": {"evaluation": {"every": 5}, "checkpoints": {"patience": 3}},
}
"""Every section is there."""

CHANGED: dict[str, Any] = {
    "model.name": "/models/other",
    "model.dtype": "bfloat16",
    "model.device": "auto",
    "model.revision": "main",
    "model.attention": "eager",
    "model.gradient_checkpointing": True,
    "model.quantization": "8bit",
    "algorithm.name": "grpo",
    "algorithm.group_size": 8,
    "algorithm.num_epochs": 2,
    "algorithm.minibatch_size": 4,
    "algorithm.kl_coef": 0.5,
    "algorithm.target_kl": 0.1,
    "algorithm.clip_low": 0.1,
    "algorithm.clip_high": 0.1,
    "algorithm.gamma": 0.5,
    "algorithm.lam": 0.5,
    "algorithm.kl.place": "loss",
    "algorithm.kl.target": 3.0,
    "algorithm.kl.horizon": 5,
    "algorithm.critic.coef": 0.5,
    "algorithm.critic.clip": 0.5,
    "algorithm.critic.rate": 5.0,
    "algorithm.critic.bootstrap_truncated": True,
    "algorithm.whiten_rewards": True,
    "algorithm.whiten_advantages": False,
    "algorithm.entropy_coef": 0.5,
    "algorithm.missing_eos.penalty": 0.5,
    "algorithm.missing_eos.score": -1.0,
    "data.path": "other.txt",
    "data.split": "test",
    "data.subset": "en",
    "data.revision": "main",
    "data.prompt_column": "prompt",
    "data.completion_column": "answer",
    "data.first_words": 3,
    "data.limit": 3,
    "data.system_prompt": "Hello",
    "data.chat": True,
    "data.eval_fraction": 0.5,
    "data.overlong": "truncate_left",
    "data.prepare": {"length": 3},
    "reward.terms.warm.use": "length",
    "reward.terms.warm.weight": 2.0,
    "reward.terms.warm.args": {"goal": "maximise"},
    "reward.terms.warm.timeout": 3.0,
    "reward.terms.warm.retries": 3,
    "reward.terms.warm.rows_per_call": 3,
    "reward.terms.warm.concurrency": 3,
    "reward.terms.warm.cache": "scores.sqlite",
    "reward.clip": 1.0,
    "reward.scale": "running",
    "reward.normalise": True,
    "reward.on_error": "skip",
    "reward.timeout": 3.0,
    "metrics.short.use": "vader",
    "metrics.short.args.goal": 6,
    "run": "runs/elsewhere",
    "total_steps": 20,
    "prompts_per_step": 4,
    "seed": 1,
    "sampling.max_new_tokens": 8,
    "sampling.min_new_tokens": 1,
    "sampling.temperature": 0.5,
    "sampling.top_k": 5,
    "sampling.top_p": 0.5,
    "sampling.min_p": 0.5,
    "sampling.repetition_penalty": 1.5,
    "sampling.beta": 2.0,
    "sampling.allowed_tokens": "ways.json",
    "sampling.policy_distribution": "filtered",
    "sampling.stop": ["."],
    "sampling.stop_token_ids": [3],
    "sampling.truncation.token": 14,
    "sampling.truncation.after": 3,
    "sampling.truncation.beyond": "train",
    "sampling.batch_size": 8,
    "sampling.compile": True,
    "lora.rank": 8,
    "lora.alpha": 3.0,
    "lora.targets": ["q_proj"],
    "trainer.learning_rate": 1e-3,
    "trainer.schedule": "linear",
    "trainer.warmup_steps": 3,
    "trainer.max_grad_norm": 0.5,
    "trainer.optimizer.betas": [0.5, 0.9],
    "trainer.optimizer.eps": 1e-6,
    "trainer.optimizer.weight_decay": 0.1,
    "trainer.precision": "fp32",
    "trainer.micro_batch_tokens": 64,
    "trainer.micro_batch_size": 4,
    "trainer.recompute_logprobs": True,
    "trainer.importance_cap": 3.0,
    "trainer.preflight": False,
    "trainer.evaluation.every": 2,
    "trainer.evaluation.sampling": [{"temperature": 0.5}],
    "trainer.evaluation.gold": "length",
    "trainer.checkpoints.every": 2,
    "trainer.checkpoints.keep": 3,
    "trainer.checkpoints.best_metric": "eval/loss",
    "trainer.checkpoints.best_mode": "min",
    "trainer.checkpoints.use_best": True,
    "trainer.checkpoints.patience": 4,
    "trainer.tracking": ["tensorboard"],
    "trainer.progress": True,
}
"""Another value for every field of ``RECIPE``."""

ALLOWED_NOW = {"total_steps", "trainer.checkpoints.patience", "reward.on_error"}
"""Fields with a condition, which ``CHANGED`` meets in the standing that the test puts the run in."""

STANDING = Standing(steps=5, begun=5, total_steps_read=False, held_out=True, same_device=True)


def leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, entry in value.items() for leaf in leaves(entry, f"{path}.{key}" if path else str(key))]
    return [path]


def documented() -> dict[str, str]:
    """Field or section -> what docs/training.md says of it on resume."""
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("| field | on resume |") :].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {name: verdict for names, verdict in rows for name in re.findall(r"`([^`]+)`", names)}


def verdict(path: str) -> str:
    """What the documentation says of a field, or of the nearest section around it."""
    said = documented()
    parts = path.replace("reward.terms.warm", "reward.terms.NAME").split(".")
    return next(said[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in said)


def written(folder: Path, recipe: Recipe) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return folder


def changed(path: str, value: Any, given: dict[str, Any] = RECIPE) -> Recipe:
    """``RECIPE`` with one other value."""
    mapping = apply_overrides(given, [])
    section = mapping
    *parents, last = path.split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    if path == "algorithm.name":
        mapping["algorithm"] = value
    return Recipe.from_mapping(mapping)


def test_every_field_is_tried() -> None:
    ours = {path for path in leaves(fields_of(Recipe.from_mapping(RECIPE))) if not path.startswith("eval_data.")}
    # Each pair excludes one another: no recipe has both. (A reward model takes no reward, and all else no scale.)
    assert ours - CHANGED.keys() == {"data.template", "train_layers", "model.trust_remote_code", "normalise"}
    assert CHANGED.keys() <= ours


@pytest.mark.parametrize("path", CHANGED)
def test_a_changed_field(path: str, tmp_path: Path) -> None:
    old = Recipe.from_mapping(RECIPE)
    new = changed(path, CHANGED[path])
    folder = written(tmp_path / "run", old)
    said = verdict(path)
    conditional = said.startswith("may change, if")
    if (said.startswith("may change") and not conditional) or path in ALLOWED_NOW:
        assert [change.path for change in changed_fields(folder, new, STANDING)] == ([] if path == "run" else [path])
        assert conditional == (path in ALLOWED_NOW)
        return
    with pytest.raises(ConfigError, match="cannot go on with another recipe") as caught:
        changed_fields(folder, new, replace(STANDING, same_device=False))
    name = "algorithm" if path == "algorithm.name" else path
    message = str(caught.value)
    assert f"\n  {name}" in message and " -> " in message and f"model: {folder / 'model'}" in message
    assert said.startswith("stays") or conditional


@pytest.mark.parametrize(("section", "value"), [("lora", None), ("eval_data", None), ("train_layers", 1)])
def test_a_section_that_comes_or_goes(section: str, value: Any, tmp_path: Path) -> None:
    given = {**RECIPE, "lora": None} if section == "train_layers" else RECIPE
    old, new = Recipe.from_mapping(given), Recipe.from_mapping({**given, section: value})
    assert verdict(section).startswith("stays")
    for before, after in ((old, new), (new, old)):
        with pytest.raises(ConfigError, match=rf"\n  {section}: "):
            changed_fields(written(tmp_path / "run", before), after, STANDING)


def test_all_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", Recipe.from_mapping(RECIPE))
    new = Recipe.from_mapping({**RECIPE, "seed": 9, "prompts_per_step": 3, "total_steps": 30})
    with pytest.raises(ConfigError) as caught:
        changed_fields(folder, new, STANDING)
    assert "seed: 0 -> 9" in str(caught.value) and "prompts_per_step: 16 -> 3" in str(caught.value)
    assert "total_steps" not in str(caught.value)
    again = Recipe.from_mapping({**RECIPE, "total_steps": 30})
    assert changed_fields(folder, again, STANDING) == [Change(path="total_steps", old=10, new=30)]
    assert str(Change(path="lora", old=None, new={"rank": 4})) == 'lora: null -> {"rank": 4}'


def test_the_same_recipe_in_other_words(tmp_path: Path) -> None:
    """One word for a section, numbers of another form, callables."""
    short = {**RECIPE, "model": "demo", "data": "prompts.txt", "eval_data": "held_out.txt"}
    spelled = {
        **short,
        "model": {"name": "demo", "dtype": "auto"},
        "data": {"path": "prompts.txt", "eval_fraction": 0},
        "reward": {"warm": {"use": "vader", "rows_per_call": 2}},
    }
    folder = written(tmp_path / "run", Recipe.from_mapping(short))
    assert changed_fields(folder, Recipe.from_mapping(spelled), STANDING) == []
    trusted = {**short, "model": {"name": "demo", "trust_remote_code": True}}
    assert changed_fields(folder, Recipe.from_mapping(trusted), STANDING) == []


# ---- total_steps, evaluation, patience, device -----------------------------------------------------------------------


def refusal(tmp_path: Path, path: str, value: Any, standing: Standing = STANDING, **sections: Any) -> str | None:
    """Why a change of ``RECIPE`` with other ``sections`` is refused; None where it is not."""
    given = {**RECIPE, **sections}
    folder = written(tmp_path / "run", Recipe.from_mapping(given))
    try:
        changed_fields(folder, changed(path, value, given), standing)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_depends_on_the_total(schedule: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "total_steps", 20, trainer={"schedule": schedule})
    assert message is not None and f"the {schedule} schedule of the learning rate depends on the total" in message
    assert refusal(tmp_path, "total_steps", 20, trainer={"warmup_steps": 3}) is None


def test_a_method_that_has_asked_for_the_total_depends_on_it(tmp_path: Path) -> None:
    message = refusal(tmp_path, "total_steps", 20, replace(STANDING, total_steps_read=True))
    assert message is not None and "the method depends on the total" in message


def test_fewer_steps(tmp_path: Path) -> None:
    assert refusal(tmp_path, "total_steps", 5) is None
    message = refusal(tmp_path, "total_steps", 5, replace(STANDING, begun=6))
    assert message is not None and "the run has done 5 steps and has begun another" in message
    message = refusal(tmp_path, "total_steps", 4)
    assert message is not None and "the run has done 5 steps" in message


def test_the_last_evaluation_of_a_shorter_run_would_count(tmp_path: Path) -> None:
    done = replace(STANDING, steps=10, begun=10)
    for checkpoints in ({"use_best": True}, {"patience": 2}):
        unplanned = {"evaluation": {"every": 4}, "checkpoints": checkpoints}
        message = refusal(tmp_path, "total_steps", 20, done, trainer=unplanned)
        assert message is not None and "the evaluation after step 10" in message
        assert refusal(tmp_path, "total_steps", 20, STANDING, trainer=unplanned) is None
        assert refusal(tmp_path, "total_steps", 20, replace(done, held_out=False), trainer=unplanned) is None
        planned = {"evaluation": {"every": 5}, "checkpoints": checkpoints}
        assert refusal(tmp_path, "total_steps", 20, done, trainer=planned) is None
    assert refusal(tmp_path, "total_steps", 20, done, trainer={}) is None


def test_evaluation_may_change_where_nothing_hangs_on_it(tmp_path: Path) -> None:
    path = "trainer.evaluation.every"
    assert refusal(tmp_path, path, 2, trainer={}) is None
    assert (
        refusal(tmp_path, path, 2, replace(STANDING, held_out=False), trainer={"checkpoints": {"patience": 2}}) is None
    )
    for checkpoints in ({"use_best": True}, {"patience": 2}):
        message = refusal(tmp_path, path, 2, trainer={"checkpoints": checkpoints})
        assert message is not None and "use_best and patience depend on when" in message


def test_patience_may_only_grow(tmp_path: Path) -> None:
    path = "trainer.checkpoints.patience"
    assert refusal(tmp_path, path, None) is None
    message = refusal(tmp_path, path, 2)
    assert message is not None and "might have ended already" in message
    message = refusal(tmp_path, path, 2, trainer={})
    assert message is not None and "might have ended already" in message


def test_errors_may_be_skipped_from_now_on_but_not_the_other_way(tmp_path: Path) -> None:
    message = refusal(tmp_path, "reward.on_error", "raise", reward={"use": "vader", "on_error": "skip"})
    assert message is not None and "may have been skipped already" in message


# ---- objects of Python, and files that are not what they were --------------------------------------------------------


def test_objects_from_python_are_left_to_the_fingerprints(tmp_path: Path) -> None:
    given = replace(Recipe.from_mapping(RECIPE), data=["a", "b"])
    folder = written(tmp_path / "run", given)
    for data in (["a", "b", "c"], ("a", "b"), "prompts.txt"):
        changes = changed_fields(folder, replace(given, data=data), STANDING)
        assert [change.path for change in changes] == ["data"]
    assert changed_fields(folder, replace(given, data=["c", "d"]), STANDING) == []
    folder = written(tmp_path / "run", replace(given, eval_data=["a"]))
    with pytest.raises(ConfigError, match="\n  eval_data: <list of 1 given from Python> -> null"):
        changed_fields(folder, replace(given, eval_data=None), STANDING)


def by_length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_a_reward_from_python_is_known_by_its_name(tmp_path: Path) -> None:
    given = replace(Recipe.from_mapping(RECIPE), reward=RewardConfig.of(by_length))
    folder = written(tmp_path / "run", given)
    assert changed_fields(folder, given, STANDING) == []
    other = replace(given, reward=RewardConfig.of({"by_length": lambda completions: [0.0 for _ in completions]}))
    with pytest.raises(ConfigError, match=r"reward\.terms\.by_length\.use: .*by_length -> .*test_recipe_changes"):
        changed_fields(folder, other, STANDING)


@dataclass(frozen=True, kw_only=True)
class Unregistered(AlgorithmConfig):
    """A method that no recipe can name."""

    name: ClassVar[str] = "unregistered"
    strength: float = 1.0
    """Some number."""

    def build(self, facts: RunFacts) -> Algorithm[Any]:
        raise AssertionError("never built here")


def test_a_method_without_a_registered_name(tmp_path: Path) -> None:
    given = replace(Recipe.from_mapping(RECIPE), algorithm=Unregistered())
    folder = written(tmp_path / "run", given)
    assert changed_fields(folder, given, STANDING) == []
    with pytest.raises(ConfigError, match=r"\n  algorithm\.strength: 1\.0 -> 2\.0"):
        changed_fields(folder, replace(given, algorithm=Unregistered(strength=2.0)), STANDING)
    with pytest.raises(ConfigError, match="\n  algorithm: unregistered -> grpo"):
        changed_fields(folder, replace(given, algorithm=GRPO()), STANDING)


DAMAGED = {
    "cut in the middle": b"model: demo\nalgorithm: {name: pp",
    "empty": b"",
    "binary": b"\x00\xff\xfe",
    "a list": b"[1, 2]\n",
    "without a section": b"model: demo\ndata: prompts.txt\n",
    "unknown key": b"model: demo\nalgorithm: sft\ndata: a.txt\nsede: 1\n",
}


@pytest.mark.parametrize("kind", [*DAMAGED, "cut between lines", "missing"])
def test_a_damaged_recipe_is_an_error(kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", Recipe.from_mapping(RECIPE))
    if kind == "missing":
        (folder / "recipe.yaml").unlink()
    else:
        whole = (folder / "recipe.yaml").read_bytes()
        content = whole[: whole.index(b"sampling:")] if kind == "cut between lines" else DAMAGED[kind]
        (folder / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be resumed, because its recipe cannot be read") as caught:
        changed_fields(folder, Recipe.from_mapping(RECIPE), STANDING)
    assert str(folder / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize("name", ["timeout", "cache", "retries", "concurrency"])
def test_an_argument_of_a_reward_that_is_named_as_a_field_stays(name: str, tmp_path: Path) -> None:
    """It is the reward's own, and may be what the reward depends on."""
    old, new = (changed("reward.terms.warm.args", {name: value}) for value in (1, 2))
    with pytest.raises(ConfigError, match=rf"\n  reward\.terms\.warm\.args\.{name}: 1 -> 2"):
        changed_fields(written(tmp_path / "run", old), new, STANDING)


@pytest.mark.parametrize("best", ["eval/short", "eval/short@temperature=0.5"])
def test_what_the_best_is_judged_by_may_not_change(best: str, tmp_path: Path) -> None:
    given = apply_overrides(RECIPE, [f"--trainer.checkpoints.best_metric={best}"])
    folder = written(tmp_path / "run", Recipe.from_mapping(given))
    with pytest.raises(ConfigError, match=rf"metrics.short.use: length -> vader \(the best weights .* {best}"):
        changed_fields(folder, changed("metrics.short.use", "vader", given), STANDING)
    other = changed("trainer.evaluation.sampling", [{"temperature": 0.5}], given)
    if "@" in best:
        with pytest.raises(ConfigError, match=r"trainer\.evaluation\.sampling"):
            changed_fields(folder, other, STANDING)
    else:
        assert len(changed_fields(folder, other, STANDING)) == 1


# As sweeps and comparisons tell of it ---------------------------------------------------------------------------------


def test_settings_by_dotted_keys() -> None:
    nested = {"lora": {"rank": 4}, "metrics": {}, "eval_data": None, "seeds": [0, {"a": 1}], 7: {"b": False}}
    flat = {"lora.rank": 4, "metrics": {}, "eval_data": None, "seeds": [0, {"a": 1}], "7.b": False}
    assert flat_settings(nested) == flat
    assert flat_settings({"rank": 4}, "lora") == {"lora.rank": 4}
    assert flat_settings("demo", "model") == {"model": "demo"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not given"),
        ("Größe", '"Größe"'),
        ([1, 2.5, False], "[1, 2.5, false]"),
        (Path("runs/a"), '"runs/a"'),
        ("a" * 118, '"' + "a" * 118 + '"'),
        ("a" * 119, '"' + "a" * 116 + "..."),
    ],
    ids=["none", "letters", "list", "path", "120", "121"],
)
def test_a_setting_in_a_message(value: Any, text: str) -> None:
    assert setting_text(value) == text
