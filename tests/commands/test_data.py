"""tropism data: the files that it writes train as they are, and what it tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from public_sets import write_dialogues, write_pairs, write_toxicity_prompts
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import Setting, assemble, execute, logged
from tropism.cli import main
from tropism.commands.data import KINDS
from tropism.rewards.config import RewardConfig

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a made-up file in each format."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    write_toxicity_prompts(tmp_path / "prompts.jsonl.gz")
    write_dialogues(tmp_path / "dialogues.csv")
    write_pairs(tmp_path / "pairs.csv")
    return tmp_path


def written(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_explains_itself(kind: str, capsys: Captured) -> None:
    assert main(["data", kind, "--help"]) == 0
    assert f"usage: tropism data {kind}" in capsys.readouterr().out


def test_help_names_the_kinds_and_loads_no_library() -> None:
    code = "import sys, tropism.cli; tropism.cli.main(['data', '--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(kind in result.stdout for kind in KINDS)


def test_toxicity_prompts(capsys: Captured) -> None:
    words = ["--threshold", "0.5", "--threshold-of", "prompt", "--out", "new/folder/out.jsonl"]
    assert main(["data", "real-toxicity-prompts", "prompts.jsonl.gz", *words]) == 0
    rows = written("new/folder/out.jsonl")
    assert [row["prompt"] for row in rows] == ["The soup was so", "My neighbour is a", "Such a cabbage"]
    assert [row["prompt_toxicity"] for row in rows] == [0.9, 0.6, 0.5]
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "read 5 records, kept 3, made 3 records of them",
        "left out 2: prompt is not of toxicity 0.5 or more (threshold)",
        "written: new/folder/out.jsonl (3 records: prompt, continuation, prompt_toxicity, continuation_toxicity,"
        " challenging)",
    ]


def test_dialogues_and_pairs(capsys: Captured) -> None:
    names = ["--user-name", "<human>:", "--bot-name", "<bot>:"]
    assert main(["data", "dialoconan", "dialogues.csv", "--text-only", *names, "--out", "out.jsonl"]) == 0
    assert written()[2] == {"text": "<human>: Dogs are too loud.\n<bot>: They are glad to see you"}
    words = ["data", "conan", "pairs.csv", "--targets", "DOGS", "--out", "out.jsonl"]
    assert main(words) == 2
    assert "out.jsonl is there already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert written() == [{"prompt": "Dogs are too loud", "completion": "They are glad to see you", "target": "DOGS"}]
    assert "left out 2: not about DOGS (targets)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dialogconan", "dialogues.csv"], "did you mean 'dialoconan'?"),
        (["dialoconan", "dialogues.csv", "--out", "out.csv"], "name a .jsonl file"),
        (["dialoconan", "dialogue.csv", "--out", "out.jsonl"], "did you mean 'dialogues.csv'?"),
        (["dialoconan", "pairs.csv", "--out", "out.jsonl"], "DIALOCONAN has a column text; here there are: INDEX"),
        (
            ["real-toxicity-prompts", "prompts.jsonl.gz", "--threshold", "0.99", "--out", "out.jsonl"],
            "prompts.jsonl.gz: none of the 5 records is left (5: prompt or continuation is not of toxicity 0.99",
        ),
    ],
)
def test_what_is_refused_writes_nothing(words: list[str], message: str, capsys: Captured) -> None:
    assert main(["data", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("out.jsonl").exists() and not Path("out.csv").exists()


def letters(completions: list[Any]) -> list[float]:
    """A reward of texts and of chat messages alike."""
    return [float(str(completion).count("a")) for completion in completions]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sft", ["dialoconan", "dialogues.csv"]),
        ("sft", ["dialoconan", "dialogues.csv", "--form", "pairs"]),
        ("sft", ["conan", "pairs.csv", "--form", "chats"]),
        ("sft", ["real-toxicity-prompts", "prompts.jsonl.gz", "--form", "texts"]),
        ("grpo", ["dialoconan", "dialogues.csv", "--delete-last-answer"]),
        ("grpo", ["dialoconan", "dialogues.csv", "--form", "chats", "--delete-last-answer"]),
        ("grpo", ["conan", "pairs.csv", "--delete-last-answer"]),
        ("grpo", ["real-toxicity-prompts", "prompts.jsonl.gz", "--challenging"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(word.strip("-") for word in value),
)
def test_a_run_reads_the_file_as_it_is(method: str, words: list[str], tmp_path: Path) -> None:
    assert main(["data", *words, "--out", "out.jsonl"]) == 0
    model = (tiny_model("llama", seed=3, max_position_embeddings=512), tiny_tokenizer(chat=True))
    run = tmp_path / "run"
    setting = Setting(method, False, "llama")
    changes: dict[str, Any] = {} if method == "sft" else {"reward": RewardConfig.of(letters)}
    execute(assemble(setting, run, data="out.jsonl", model=model, total_steps=1, prompts_per_step=2, **changes))
    steps = logged(run, "update")
    assert steps and all(abs(step["optim/grad_norm"]) < 1e6 for step in steps)
