"""tropism convert labels: what is written, what is told, and what is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny_models import tiny_config, tiny_tokenizer
from tropism.classifier_inputs import ClassifierInputs
from tropism.cli import main
from tropism.data.comparisons import read_comparisons

Captured = pytest.CaptureFixture[str]

PAD = 50259
A, B, C = 5, 6, 7
LABELS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"query": [PAD, A, B], "sample0": [C, PAD], "sample1": [A, C], "best": 1},
        {"query": [A, PAD, C], "sample0": [B, PAD], "sample1": [PAD, B, B], "best": 0},
    ],
    "rating": [{"query": [A], "sample": [B, PAD], "score": 1.5}, {"query": [A], "sample": [C, PAD], "score": -1}],
    "difference": [{"query": [A], "sample0": [B, PAD], "sample1": [C, C], "difference": -0.5}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the folder of a model and a label file of each kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    tiny_config("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for kind, labels in LABELS.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(labels))
    return tmp_path


def convert(*words: str) -> int:
    return main(["convert", "labels", *words, "--tokenizer", "model"])


def test_every_kind_is_converted(folder: Path, capsys: Captured) -> None:
    expected = {
        "choice": [
            {"prompt": "ab", "completions": ["c", "ac"], "choice": 1},
            {"prompt": "ac", "completions": ["b", "bb"], "choice": 0},
        ],
        "rating": [
            {"prompt": "a", "completion": "b", "rating": 1.5},
            {"prompt": "a", "completion": "c", "rating": -1.0},
        ],
        "difference": [{"prompt": "a", "completions": ["b", "cc"], "difference": -0.5}],
    }
    for kind, rows in expected.items():
        assert convert(f"{kind}.json", "--out", f"{kind}.jsonl") == 0
        written = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
        assert written == rows
        shown = capsys.readouterr().out
        assert f"written: {kind}.jsonl ({len(rows)} records: {', '.join(rows[0])})" in shown
        assert "other ids" not in shown


@pytest.mark.parametrize("kind", LABELS)
def test_what_is_written_is_read_as_the_labels_are(folder: Path, kind: str) -> None:
    assert convert(f"{kind}.json", "--out", "out.jsonl") == 0
    config = SimpleNamespace(max_position_embeddings=100, get_text_config=lambda: config)
    body = SimpleNamespace(config=config, named_modules=list)
    inputs = ClassifierInputs(body, tiny_tokenizer(), text="prompt+completion")
    assert read_comparisons("out.jsonl", inputs) == read_comparisons(f"{kind}.json", inputs)


def test_what_does_not_survive_is_told(folder: Path, capsys: Captured) -> None:
    """The text "<eos>" of five tokens is one token when it is encoded again."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["bb"])
    tokenizer.save_pretrained(folder / "model")
    labels = [{"query": [A], "sample": [B, B], "score": 1}, {"query": [A], "sample": [C], "score": 2}]
    (folder / "labels.json").write_text(json.dumps(labels))
    assert convert("labels.json", "--out", "out.jsonl") == 0
    assert "1 of 2 records are encoded to other ids than they were decoded from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("there.jsonl", "is there already"),
        ("out.json", "name a .jsonl file"),
        ("folder.jsonl", "is a folder"),
    ],
)
def test_where_nothing_can_be_written(folder: Path, capsys: Captured, out: str, reason: str) -> None:
    (folder / "there.jsonl").write_text("mine")
    (folder / "folder.jsonl").mkdir()
    assert convert("choice.json", "--out", out) == 2
    assert reason in capsys.readouterr().err
    assert (folder / "there.jsonl").read_text() == "mine"
    assert convert("rating.json", "--out", "there.jsonl", "--overwrite") == 0
    assert len((folder / "there.jsonl").read_text().splitlines()) == 2
    assert convert("rating.json", "--out", "new/folder/out.jsonl") == 0
    assert len((folder / "new/folder/out.jsonl").read_text().splitlines()) == 2


def test_wrong_labels_leave_no_file(folder: Path, capsys: Captured) -> None:
    wrong = [*LABELS["choice"], {"query": [A], "sample0": [B], "sample1": [50257], "best": 0}]
    (folder / "wrong.json").write_text(json.dumps(wrong, indent=None).replace("}, {", "},\n{"))
    assert convert("wrong.json", "--out", "out.jsonl") == 2
    assert "wrong.json:3: sample1 holds the id 50257, but those of the tokenizer are 0 to 36" in capsys.readouterr().err
    assert not (folder / "out.jsonl").exists()


def test_a_full_disk_leaves_the_older_file(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (folder / "out.jsonl").write_text("mine")
    monkeypatch.setattr("tropism.storage.os.fsync", full)
    assert convert("choice.json", "--out", "out.jsonl", "--overwrite") == 2
    assert "out.jsonl cannot be written: No space left" in capsys.readouterr().err
    assert (folder / "out.jsonl").read_text() == "mine" and len(list(folder.glob(".out*"))) == 0


def test_a_tokenizer_that_is_not_there(folder: Path, capsys: Captured) -> None:
    assert main(["convert", "labels", "choice.json", "--tokenizer", "./nowhere", "--out", "out.jsonl"]) == 2
    assert "nowhere" in capsys.readouterr().err
