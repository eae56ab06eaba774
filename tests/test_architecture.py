"""The structure that docs/architecture.md promises, read from the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tropism
from tropism.algorithms import ALGORITHMS

ROOT = Path(tropism.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))

LEAVES = {"episodes", "errors", "judgements", "ops", "preferences", "redaction", "texts", "types"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "ops": set(),
    "redaction": set(),
    "out_of_memory": {"errors"},
    "export_hub": {"errors", "redaction"},
    "storage": {"errors"},
    "types": {"ops"},
    "texts": {"errors"},
    "judgements": {"types"},
    "episodes": {"types"},
    "preferences": {"types"},
    "classifier_inputs": {"errors", "foreign", "texts"},
    "safe_yaml": {"errors"},
    "scored_file": {"errors", "storage"},
    "schema": {"errors", "safe_yaml"},
    "targets": {"errors", "ops", "storage", "types"},
    "algorithms": LEAVES | {"targets"},
    "foreign": {"errors"},
    "rewards": LEAVES | {"classifier_inputs", "foreign", "out_of_memory"},
    "rollouts": LEAVES | {"out_of_memory"},
    "data": LEAVES | {"classifier_inputs", "foreign"},
    "models": LEAVES | {"foreign", "out_of_memory", "storage", "targets"},
    "training": LEAVES | {"out_of_memory", "storage"},
    "evaluation": LEAVES | {"storage"},
    "envs": LEAVES | {"best_of", "data", "generation", "models", "rewards", "rollouts"},
    "metric_functions": {"errors", "rewards", "types"},
    "gold_reward": {"errors", "metric_functions", "rewards", "types"},
    "best_of": LEAVES | {"rewards"},
    "generation": LEAVES | {"best_of", "data", "export_hub", "models", "rollouts", "targets"},
}
"""Part -> the other parts it may import. What is not listed here composes, and may import all."""

COMPOSERS = {
    "__init__",
    "api",
    "attribution",
    "build",
    "build_reward_model",
    "cli",
    "commands",
    "comparing",
    "config",
    "demo",
    "export",
    "export_card",
    "export_card_facts",
    "export_card_results",
    "export_checks",
    "export_checks_seq2seq",
    "export_gguf",
    "export_reward_model",
    "export_slots",
    "export_source",
    "recipe_changes",
    "recipe_comparisons",
    "recipe_data",
    "recipe_episodes",
    "recipe_evaluation",
    "recipe_identity",
    "recipe_model",
    "recipe_pairs",
    "recipe_processes",
    "recipe_resumption",
    "recipe_sources",
    "result",
    "reward_recipes",
    "scoring",
    "sweeps",
    "text_reward_model",
    "tokenizer_of",
    "toxicity",
}

EXCEPTIONS: dict[str, set[str]] = {
    # Sources know the protocols of what they call, never a concrete method, sampler or model.
    "training.sources": {"algorithms.base", "data.demonstrations", "data.order"},
    "training.pool": {"algorithms.base", "algorithms.pool", "data.order", "rollouts.randomness"},
    "training.pairs": {"algorithms.base"},
    "training.rollout_maker": {"rewards", "rollouts.config", "rollouts.protocol", "rollouts.randomness"},
    # A gold reward is set where the evaluation is, in any form that a reward has.
    "training.config": {"rewards.config"},
    # The checks before training look at the one policy there is, from inside.
    "training.preflight": {
        "models.policy",
        "models.reference",
        "rollouts.config",
        "rollouts.protocol",
        "rollouts.randomness",
    },
    # The TextRL facade is PPO and the trainer over the environment, and writes files that a run would write.
    "envs.textrl_learning": {
        "algorithms.base",
        "algorithms.ppo",
        "training.config",
        "training.correction",
        "training.finite",
        "training.optimizer",
        "training.processes",
        "training.scoring",
        "training.trainer",
    },
    "envs.textrl_files": {"foreign.json_files", "foreign.paths", "recipe_identity", "training.state", "tokenizer_of"},
    "envs.textrl_training": {"storage"},
    # The version goes into environment.json.
    "training.run_folder": {""},
    # Evaluation during training does what a collect does, on held-out prompts.
    "evaluation.preferences": {"algorithms.base"},
    "evaluation.sampling_settings": {"rollouts.config", "schema"},
    # How many evaluations a run plans is in the recipe of its folder.
    "evaluation.over_optimisation": {"safe_yaml"},
    "evaluation.heldout": {"algorithms.base", "training.rollout_maker", "training.run_folder"},
}
"""Module -> modules of other parts that it imports all the same."""

CONCRETE = {f"algorithms.{name}" for name in ("grpo", "kl_control", "ppo", "rloo", "sft")} | {"algorithms"}
KNOW_METHODS = {"__init__", "api", "build", "cli", "commands", "comparing", "config", "demo", "algorithms"}


def module_of(path: Path) -> str:
    """``training.sources``; a package's ``__init__`` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


def imports_of(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if (ROOT.parent / node.module.replace(".", "/")).is_dir():  # from package import module
                found |= {f"{node.module}.{a.name}" for a in node.names if module_file(f"{node.module}.{a.name}")}
    return found


def module_file(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def own_imports(path: Path) -> set[str]:
    """Modules of this library that a file imports, without the library's name."""
    return {name.removeprefix("tropism").lstrip(".") for name in imports_of(path) if name.split(".")[0] == "tropism"}


def test_every_part_is_either_ruled_or_composes() -> None:
    parts = {module_of(path).split(".")[0] for path in FILES}
    assert parts == MAY_IMPORT.keys() | COMPOSERS


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    part = module.split(".")[0]
    if part in COMPOSERS:
        return
    allowed = MAY_IMPORT[part] | {part}
    beyond = {name for name in own_imports(path) if name.split(".")[0] not in allowed}
    assert beyond <= EXCEPTIONS.get(module, set())


def test_exceptions_are_still_needed() -> None:
    by_module = {module_of(path): own_imports(path) for path in FILES}
    for module, names in EXCEPTIONS.items():
        assert names <= by_module[module], f"{module} no longer imports {names - by_module[module]}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_concrete_methods_are_known_to_the_composition_alone(path: Path) -> None:
    if module_of(path).split(".")[0] not in KNOW_METHODS:
        assert not own_imports(path) & (CONCRETE - EXCEPTIONS.get(module_of(path), set()))


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p).split(".")[0] == "ops"], ids=module_of)
def test_ops_need_torch_alone(path: Path) -> None:
    others = {name.split(".")[0] for name in imports_of(path)} - {"tropism"}
    assert others <= {"torch"} | set(sys.stdlib_module_names)


def test_the_trainer_is_small_and_names_no_method() -> None:
    text = (ROOT / "training" / "trainer.py").read_text()
    assert len(text.splitlines()) < 300
    words = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
    others = {"dpo", "kto", "ilql", "quark", "rft", "conditioned"}
    assert not words & ({name.lower() for name in ALGORITHMS} | others)
    tree = ast.parse(text)
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    public = {n.name for n in trainer.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    assert public == {"fit", "update", "state_dict", "load_state_dict"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 < 60, f"{node.name} is too long"


def test_no_module_is_a_drawer() -> None:
    for path in FILES:
        assert not set(path.stem.split("_")) & {"utils", "util", "common", "helpers", "helper", "misc"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_unfinished_business(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert "NotImplementedError" not in text


def test_importing_the_library_is_quick() -> None:
    """Heavy libraries come with the first name that needs them."""
    heavy = "{'torch', 'transformers', 'accelerate', 'peft', 'datasets', 'matplotlib', 'pyarrow', 'numpy'}"
    code = f"import sys, tropism; print(sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    assert len(set(tropism.__all__)) == len(tropism.__all__)
    for name in tropism.__all__:
        assert getattr(tropism, name) is not None
    assert set(dir(tropism)) >= set(tropism.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tropism.no_such_name
