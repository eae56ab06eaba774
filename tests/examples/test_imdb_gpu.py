"""The notebook for hosted GPUs: a file as nbformat 4 wants it, and every cell runs on stand-ins of the hub's models.

Models and reviews lie in the working directory under their hub names, where a relative path finds them; only the
numbers of the settings are made smaller. IPython, which every notebook has, is a module of two names here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
import tyro

from hub_stand_ins import save_classifiers
from tiny_models import tiny_model, tiny_tokenizer
from tropism import GRPO, LoRA
from tropism.config import Recipe
from tropism.models.saving import save_plain
from tropism.safe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "imdb_gpu.ipynb"
FILMS = ROOT / "src" / "tropism" / "demo_data" / "train.txt"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
SMALL = {"STEPS": 2, "PROMPTS": 2, "TOKENS": 8, "HELD_OUT": 0.2}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that the notebook takes from the hub, in small."""
    save_plain(tiny_model("gpt2", seed=3, n_positions=256), tiny_tokenizer(), tmp_path / "lvwerra" / "gpt2-imdb")
    save_classifiers(tmp_path)
    openings = FILMS.read_text(encoding="utf-8").split("\n")[:24]
    texts = [f"{opening} it was what it was, from its beginning to its end" for opening in openings]
    part = datasets.Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(len(texts))]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "stanfordnlp" / "imdb"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the notebook displays as HTML."""
    pages: list[str] = []
    package, display = ModuleType("IPython"), ModuleType("IPython.display")
    vars(package).update(version_info=(9, 0, 0))  # matplotlib asks for it
    vars(display).update(HTML=lambda page: page, display=pages.append)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pages


def test_every_cell_runs_from_install_to_report(
    workplace: Path, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    for name, source in CODE.items():
        exec(compile(source, f"code cell {name}", "exec", dont_inherit=True), scope)
        if name == "settings":
            assert set(SMALL) <= set(scope)
            scope.update(SMALL)
    assert len(scope["prompts"]) == 24 and {len(prompt.text.split()) for prompt in scope["prompts"]} == {4}
    assert [evaluation.step for evaluation in scope["evaluations"]] == [0, 2]
    folder = workplace / scope["result"].path
    assert (folder / "model" / "config.json").is_file()
    report = (folder / "report.html").read_text(encoding="utf-8")
    (page,) = shown
    assert page.startswith('<iframe srcdoc="') and page.count('"') == 8  # nothing of the report ends the attribute
    assert len(page) > len(report)
    told = capsys.readouterr().out
    assert "24 prompts" in told and "95 % interval" in told and "before: " in told and "report.html (" in told
    # The reward is the log-odds of what the metric gives as probability.
    for p, log_odds in zip(scope["last"].metrics["probability"], scope["last"].rewards, strict=True):
        assert 1 / (1 + 2.718281828459045**-log_odds) == pytest.approx(p, abs=1e-5)


def test_the_numbers_are_those_of_the_recipe() -> None:
    recipe = Recipe.from_mapping(read_yaml(ROOT / "recipes" / "grpo-imdb.yaml"))
    (numbers,) = re.findall(r"STEPS, PROMPTS, TOKENS, HELD_OUT = \((.+?)\) if", CODE["settings"])
    expected = (recipe.total_steps, recipe.prompts_per_step, recipe.sampling.max_new_tokens, recipe.data.eval_fraction)
    assert ast.literal_eval(f"({numbers})") == expected
    assert recipe.model in CODE["settings"] and recipe.data.path in CODE["settings"]
    assert recipe.algorithm == GRPO(group_size=8, kl_coef=0.05) and recipe.lora == LoRA(rank=16)
    assert "tropism.GRPO(group_size=8, kl_coef=0.05)" in CODE["train"] and "tropism.LoRA(rank=16)" in CODE["train"]


@pytest.mark.parametrize(
    ("source", "files", "asked"),
    [
        ("git+https://host.example/someone/tropism", [], "tropism[lexicon] @ git+https://host.example/someone/tropism"),
        ("", ["tropism-0.1.0-py3-none-any.whl", "tropism-main.zip"], "{here}/tropism-0.1.0-py3-none-any.whl[lexicon]"),
        ("", ["src/tropism/__init__.py"], "{here}[lexicon]"),
    ],
)
def test_what_is_installed(
    source: str, files: list[str], asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "check_call", calls.append)
    exec(CODE["install"].replace('SOURCE = ""', f"SOURCE = {source!r}"), {})
    assert calls == [[sys.executable, "-m", "pip", "install", "--quiet", asked.format(here=tmp_path)]]


def test_nothing_to_install_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Upload tropism as an archive or wheel"):
        exec(CODE["install"], {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    exec(CODE["install"], {})  # it is there already


def test_the_file_is_nbformat_4_without_outputs() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in CELLS]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", id_) for id_ in ids)
    for cell in CELLS:
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            expected |= {"outputs", "execution_count"}
        assert set(cell) == expected and cell["metadata"] == {}
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def test_every_code_cell_is_short_and_explained() -> None:
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds[0] == "markdown"
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")
    assert all(len(source.splitlines()) <= 30 for source in CODE.values())


def test_the_commands_that_it_names_are_understood() -> None:
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    lines = re.findall(r"`tropism (\w+) ([^`]+)`", text)
    assert {name for name, _ in lines} == {"compare", "export", "toxicity"}
    for name, words in lines:
        module = importlib.import_module(f"tropism.commands.{name}")
        if name == "compare":
            assert all(f"  {word} " in module.USAGE for word in words.split() if word.startswith("--"))
            continue
        cli: Any = tyro.cli
        cli(module.Options, args=words.split(), config=(tyro.conf.FlagCreatePairsOff,))


def test_the_links_lead_somewhere() -> None:
    for cell in CELLS:
        for target in re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / target).exists(), target
