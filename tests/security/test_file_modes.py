"""Who may read what a run writes, and where it writes."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import tropism
from tiny_runs import Setting, assemble, execute
from tropism.training.run_folder import RunFolder

SOURCE = Path(tropism.__file__).parent


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def usual_mask() -> Iterator[None]:
    """The mask of most machines, under which new files can be read by everyone."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_run_folder_is_for_its_owner_alone(tmp_path: Path, usual_mask: None) -> None:
    run = tmp_path / "runs" / "mine"
    assembly = assemble(Setting("grpo", False, "gpt2"), run, total_steps=1)
    execute(assembly)
    assembly.folder.append("warnings.jsonl", {"step": 1, "message": "401 for a scorer"})
    assert mode(run) == 0o700
    assert mode(run.parent) == 0o755  # the folder of all runs holds nothing but their names
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "warnings.jsonl"):
        assert mode(run / name) == 0o600, name


def test_a_folder_that_the_user_has_made_keeps_its_mode(tmp_path: Path, usual_mask: None) -> None:
    run = tmp_path / "shared"
    run.mkdir(mode=0o755)
    folder = RunFolder(run, resume=False)
    folder.create()
    folder.write_recipe("model: demo\n")
    assert mode(run) == 0o755 and mode(run / "recipe.yaml") == 0o600


def test_temporary_files_have_no_name_that_others_can_guess() -> None:
    """Temporary files are siblings inside the user's folders; the shared one is reached through ``tempfile`` only."""
    predictable = {"mktemp", "tempnam", "tmpnam", "gettempdir", "gettempdirb"}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                assert not node.value.startswith(("/tmp", "/var/tmp", "/dev/shm")), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in predictable, path
            if isinstance(node, ast.ImportFrom) and node.module == "tempfile":
                assert not {alias.name for alias in node.names} & predictable, path
