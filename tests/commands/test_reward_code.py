"""Code named by a recipe runs only when allowed on the command line, from the file that is shown with its hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main

Captured = pytest.CaptureFixture[str]
Train = Callable[..., int]

CODE = """
import json, os, sys
from pathlib import Path

Path("ran.json").write_text(json.dumps(sys.path))

def longer(completions, bonus=0.0, note=None):
    Path("given.json").write_text(json.dumps({"bonus": bonus, "note": note, "kind": type(note).__name__}))
    return [len(text) + bonus for text in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``tropism train`` on a recipe with the given reward, in a folder with ``mine.py``, checked but not run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")

    def call(reward: Any, *arguments: str, dry: bool = True, **changes: Any) -> int:
        recipe = {
            "model": str(model),
            "algorithm": {"name": "grpo", "group_size": 2},
            "data": "prompts.txt",
            "reward": reward,
            "run": "run",
            "total_steps": 1,
            "prompts_per_step": 2,
            "sampling": {"max_new_tokens": 3},
            **changes,
        }
        Path("recipe.yaml").write_text(json.dumps(recipe))
        return main(["train", "recipe.yaml", *(["--dry-run"] if dry else []), *arguments])

    return call


LENGTH = {"use": "length", "args": {"goal": "maximise"}}

REWARDS: list[Any] = [
    "os:system",
    {"use": "os:system"},
    {"terms": {"innocent": {"use": "os:system"}, "length": LENGTH}},
    {"terms": {"innocent": {"use": "mine.py:longer", "weight": 0}, "length": LENGTH}},
    "mine.py:longer",
    "./mine.py:longer",
    "mine:longer",
    "builtins:eval",
    "subprocess:check_output",
]


@pytest.mark.parametrize("reward", REWARDS, ids=str)
def test_a_recipe_alone_runs_no_code(reward: Any, train: Train, tmp_path: Path, capsys: Captured) -> None:
    for dry in (True, False):
        assert train(reward, dry=dry) == 2
        error = capsys.readouterr().err
        assert "runs code of your machine" in error and "--allow-code" in error
    assert not (tmp_path / "ran.json").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["allow_code", "trust_remote_code"])
def test_a_recipe_cannot_allow_it_to_itself(field: str, train: Train, tmp_path: Path, capsys: Captured) -> None:
    assert train("mine.py:longer", **{field: True}) == 2
    assert f"{field}: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "ran.json").exists()


def test_allowed_code_is_shown_with_its_hash(train: Train, tmp_path: Path, capsys: Captured) -> None:
    before = list(sys.path)
    assert train("mine.py:longer", "--allow-code", dry=False) == 0
    error = capsys.readouterr().err
    assert f"running reward code from {tmp_path / 'mine.py'}" in error
    assert hashlib.sha256(CODE.encode()).hexdigest() in error
    path = json.loads((tmp_path / "ran.json").read_text())
    assert path == before == sys.path
    assert not {"", ".", str(tmp_path)} & set(path)


def test_resuming_asks_for_the_permission_again(train: Train, tmp_path: Path, capsys: Captured) -> None:
    assert train("mine.py:longer", "--allow-code", dry=False) == 0
    (tmp_path / "ran.json").unlink()
    assert main(["train", "--resume", "run", "--total_steps", "2"]) == 2
    assert "--allow-code" in capsys.readouterr().err
    assert not (tmp_path / "ran.json").exists()


def test_a_file_of_the_working_directory_hides_no_module(train: Train, tmp_path: Path, capsys: Captured) -> None:
    """``statistics:mean`` is Python's, whatever lies in the folder; and a file is named as a file."""
    (tmp_path / "statistics.py").write_text("raise SystemExit('this must not run')")
    shutil.copy(tmp_path / "mine.py", tmp_path / "only_here.py")
    assert train("only_here:longer", "--allow-code") == 2
    assert "only_here.py:longer" in capsys.readouterr().err
    assert train("statistics:nothing", "--allow-code") == 2
    assert "statistics has no 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "ran.json").exists()


def test_a_reward_outside_of_the_project_is_shown_by_its_real_path(
    train: Train, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Captured
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "theirs.py"
    elsewhere.write_text(CODE)
    (tmp_path / "link.py").symlink_to(elsewhere)
    for reward in (f"{elsewhere}:longer", "link.py:longer", f"../{elsewhere.parent.name}/theirs.py:longer"):
        if reward.startswith("..") and elsewhere.parent.parent != tmp_path.parent:
            continue
        assert train(reward) == 2
        assert "--allow-code" in capsys.readouterr().err
        assert train(reward, "--allow-code") == 0
        assert f"running reward code from {elsewhere}" in capsys.readouterr().err


OBJECTS = {
    "tag": "{note: !!python/name:os.system }",
    "call": "{note: !!python/object/apply:os.getcwd [] }",
    "alias": "{note: &a [1], bonus: *a}",
    "timestamp as object": "{note: !!timestamp 2001-01-01}",
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_arguments_bring_no_objects(kind: str, train: Train, tmp_path: Path, capsys: Captured) -> None:
    text = json.dumps({"model": "model", "algorithm": "grpo", "data": "prompts.txt"})[:-1]
    recipe = f'{text}, "reward": {{"use": "mine.py:longer", "args": {OBJECTS[kind]}}}}}'
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["train", "recipe.yaml", "--allow-code"]) == 2
    assert "recipe.yaml:1" in capsys.readouterr().err
    assert not (tmp_path / "ran.json").exists()


@pytest.mark.parametrize(
    "value", ["os:system", "__import__('os').getcwd()", "{{ 7 * 7 }}", "${HOME}", "<function f given from Python>"]
)
def test_arguments_that_look_like_code_stay_text(value: str, train: Train, tmp_path: Path) -> None:
    assert train({"use": "mine.py:longer", "args": {"note": value, "bonus": 1.5}}, "--allow-code") == 0
    assert json.loads((tmp_path / "given.json").read_text()) == {"bonus": 1.5, "note": value, "kind": "str"}


def test_no_argument_makes_an_object_of_a_class(train: Train, tmp_path: Path, capsys: Captured) -> None:
    target = {"_target_": "os.system", "_args_": ["touch ran.json"]}
    assert train({"use": "length", "args": target}, "--allow-code") == 2
    assert "'length' takes no argument '_target_'" in capsys.readouterr().err
    assert train({"use": "mine.py:longer", "args": {"note": target}}, "--allow-code") == 0
    assert json.loads((tmp_path / "given.json").read_text())["note"] == target


# ---- names of runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", ""])
def test_names_of_runs_are_checked(name: str, train: Train, tmp_path: Path, capsys: Captured) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    assert train(LENGTH, run=name) == 2
    error = capsys.readouterr().err
    assert "run" in error and "\x1b" not in error
    assert sorted({path.name for path in tmp_path.iterdir()} - {"recipe.yaml"}) == before
