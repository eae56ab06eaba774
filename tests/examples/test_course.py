"""The notebooks of the course: files as nbformat 4 wants them, and every cell runs on models of a few thousand weights.

Cells are executed in order in one namespace, and the files are checked against the structure of nbformat 4.5 by hand,
so that neither needs a library.
"""

from __future__ import annotations

import ast
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest

from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tiny_reward_models import encoder_tokenizer, tiny_encoder
from tropism.evaluation.run_folder import RunData
from tropism.models.saving import save_plain

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "examples" / "course"
NOTEBOOKS = {path.stem: path for path in sorted(COURSE.glob("*.ipynb"))}
FILMS = ROOT / "src" / "tropism" / "demo_data"

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def cells_of(name: str, kind: str) -> list[str]:
    """The sources of a notebook's cells of one kind."""
    cells = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the notebooks take from the hub, in small: a policy, two classifiers and reviews."""
    folder = tmp_path_factory.mktemp("course")
    save_plain(tiny_model("llama", seed=3, max_position_embeddings=512), tiny_tokenizer(), folder / "policy")
    tokenizer = encoder_tokenizer()
    tokenizer.model_max_length = 128
    for name, labels in (("sentiment", ("NEGATIVE", "POSITIVE")), ("finance", ("positive", "negative", "neutral"))):
        model = tiny_encoder("bert", seed=5, labels=len(labels), max_position_embeddings=128)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    parts = {}
    for part, file in (("train", "train.txt"), ("test", "held_out.txt")):
        openings = (FILMS / file).read_text(encoding="utf-8").split("\n")[:16]
        texts = [f"{opening} it was what it was, from its beginning to its end" for opening in openings]
        parts[part] = datasets.Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(len(texts))]})
    datasets.DatasetDict(parts).save_to_disk(str(folder / "imdb"))
    return folder


@pytest.fixture
def workplace(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which a notebook finds the stand-ins, and no display."""
    monkeypatch.setenv("TROPISM_COURSE_TINY", str(stand_ins))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(name: str) -> dict[str, Any]:
    """Run all code cells of a notebook, in order; what they defined."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells_of(name, "code"), start=1):
        exec(compile(source, f"{name}, code cell {number}", "exec", dont_inherit=True), scope)
    return scope


# What runs -----------------------------------------------------------------------------------------------------------


def test_three_ways_to_the_same_sentiment(workplace: Path) -> None:
    scope = execute("1_reward")
    assert scope["labels"] == {0: 16, 1: 16}
    assert {len(prompt.split()) for prompt in scope["prompts"]} == {4}
    # An independent fourth way: the odds of two labels, from the logits of one text at a time.
    for text, by_hand in zip(scope["EXAMPLES"], scope["by_hand"].tolist(), strict=True):
        low, high = scope["model"](**scope["tokenizer"](text, return_tensors="pt")).logits[0].tolist()
        odds = 2.718281828459045 ** (high - low)
        assert by_hand == pytest.approx(odds / (1 + odds), abs=1e-5)


def test_ppo_follows_each_of_the_three_rewards(workplace: Path) -> None:
    scope = execute("2_ppo")
    for name in ("to_positive", "to_negative", "to_neutral"):
        result = scope[name]
        assert result.path.is_relative_to(workplace) or (workplace / result.path).is_dir()
        evaluations = RunData.read(result.path).evaluations
        assert [evaluation.step for evaluation in evaluations] == [0, 2]
        assert set(evaluations[0].prompts) == {"In my opinion"} and len(evaluations[0]) == 6
        assert len(set(evaluations[0].completions)) > 1
    first = {name: RunData.read(scope[name].path).evaluations[0].rewards for name in ("to_positive", "to_negative")}
    assert first["to_positive"] + first["to_negative"] == pytest.approx(1, abs=1e-5)
    assert len({str(scope[name].path) for name in ("to_positive", "to_negative", "to_neutral")}) == 3


def test_other_rewards(workplace: Path) -> None:
    scope = execute("3_other_rewards")
    assert scope["grpo"].group_size == 8 and scope["rft"].start_percentile == 0.9
    assert not set(scope["headlines"]) & set(scope["held_out"])
    rewards = RunData.read(scope["careful"].path).evaluations[-1].rewards
    assert max(rewards) <= scope["BAR"] + 1e-6


def test_the_neutral_reward_by_hand(workplace: Path) -> None:
    """1 where the classifier is undecided, 0 where it is sure, and the same for both labels."""
    source = next(source for source in cells_of("2_ppo", "code") if "def neutral" in source)
    scope: dict[str, Any] = {"positive": lambda prompts, completions: [0.5, 1.0, 0.0, 0.75, 0.25]}
    exec(source.split("\n\n\n")[0], scope)
    assert scope["neutral"]([""] * 5, [""] * 5) == [1.0, 0.0, 0.0, 0.5, 0.5]


# What would run with the hub -----------------------------------------------------------------------------------------


@every_notebook
def test_without_stand_ins_the_models_are_those_of_the_exercise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TROPISM_COURSE_TINY", raising=False)
    scope: dict[str, Any] = {}
    exec(cells_of(name, "code")[0], scope)
    assert scope["POLICY"] == "lvwerra/gpt2-imdb"
    assert scope["SENTIMENT"] == "lvwerra/distilbert-imdb"
    assert scope["REVIEWS"] == "stanfordnlp/imdb"
    assert scope.get("FINANCE", "ProsusAI/finbert") == "ProsusAI/finbert"


def test_the_values_of_the_exercise_are_asserted_with_its_classifier() -> None:
    """The check of the source fails for any other classifier, and for values that are off in the fourth decimal."""
    import torch

    source = next(source for source in cells_of("1_reward", "code") if "EXAMPLES =" in source)
    statements = [node for node in ast.parse(source).body if isinstance(node, ast.Assert)]
    check = compile(ast.Module(statements, type_ignores=[]), "check", "exec")
    exec(check, {"TINY": None, "torch": torch, "by_hand": torch.tensor([0.54295, 0.97080, 0.04643])})
    for wrong in ([0.54325, 0.97080, 0.04643], [0.04643, 0.97080, 0.54295]):
        with pytest.raises(AssertionError):
            exec(check, {"TINY": None, "torch": torch, "by_hand": torch.tensor(wrong)})


# What the files are --------------------------------------------------------------------------------------------------


@every_notebook
def test_a_file_is_nbformat_4_without_outputs(name: str) -> None:
    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", id_) for id_ in ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert isinstance(cell["source"], list) and all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            expected |= {"outputs", "execution_count"}
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == expected
    # As Jupyter writes it, so that saving it there changes only what was changed.
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@every_notebook
def test_every_code_cell_is_short_and_explained(name: str) -> None:
    kinds = [cell["cell_type"] for cell in json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]]
    assert kinds[0] == "markdown"
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")
    assert all(len(source.splitlines()) <= 30 for source in cells_of(name, "code"))
    assert all(source.rstrip().endswith((".", "?", ":", ")")) for source in cells_of(name, "markdown"))


@every_notebook
def test_the_method_is_always_said(name: str) -> None:
    """Every call of ``tropism.train`` names its method as the second argument."""
    calls = [
        node
        for source in cells_of(name, "code")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tropism.train"
    ]
    assert all(len(call.args) == 2 for call in calls)
    assert bool(calls) == (name != "1_reward")


def test_the_links_between_the_pages_lead_somewhere() -> None:
    for page in [*NOTEBOOKS.values(), COURSE / "README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (COURSE / target).exists(), f"{page.name}: {target}"
    readme = (COURSE / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in readme for path in NOTEBOOKS.values())


def test_the_stand_ins_are_those_of_the_readme(stand_ins: Path) -> None:
    readme = (COURSE / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in stand_ins.iterdir()} == set(re.findall(r"^\| `([\w/]+)` \|", readme, re.MULTILINE))
    assert VOCABULARY < 100  # small indeed
