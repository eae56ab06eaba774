"""Text that terminals, files and parsers stumble over goes through a whole run, and every file of it is whole."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fuzz_budget import within
from tiny_runs import Setting, assemble, execute
from tropism.cli import main
from tropism.commands.comparison import show_pairs, show_summary
from tropism.commands.console import console, printable, tell
from tropism.evaluation.run_folder import RunData
from tropism.evaluation.summary import sample_pairs, summarise
from tropism.rewards import RewardConfig
from tropism.rollouts.stops import decode
from tropism.rollouts.transcribe import Transcriber
from tropism.training.config import EvaluationConfig, TrainerConfig
from tropism.training.run_folder import as_text
from tropism.types import Prompt

HOSTILE = {
    "lone surrogate": "a\ud800b\udfff",
    "nul": "a\0b",
    "escapes": "\x1b[2J\x1b]0;title\x07\x1b[31m\x9b5A",
    "direction": "\u202egpj.exe\u2066\u200f\u061c",
    "separators": "a\u2028b\u2029c\x85d\x0be\rf",
    "markup": "[red]</script><script>alert(1)</script>&amp;'\"`{{ 7 * 7 }}",
    "table": '=1+1,"a";\t\'b\n--',
    "long": "x" * 10**6,
    "long words": "no " * 300_000,
    "not in any plane": "\U0010ffff\ufffe\ufdd0",
    "combining": "e" + "\u0301" * 5000,
    "empty": "",
}
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Nothing of this may reach a terminal."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every completion is one of the texts, which the reward logs as well."""
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    numbers = count()

    def reward(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("seen", completions)
        log_extra("odd", [[10**5000, b"\xff", {"\ud800": 1}][i % 3] for i in range(len(completions))])
        log_extra("large", [10**400] * len(completions))
        return [float(next(numbers) % 7) for _ in completions]

    assembly = assemble(
        Setting("grpo", False, "llama"),
        folder,
        reward=RewardConfig.of(reward),
        data=["a cat", "oh", "we ran", "no"],
        eval_data=[f"{text[:3]}{i}" for i, text in enumerate(HOSTILE.values())],
        prompts_per_step=4,
        total_steps=1,
        trainer={"evaluation": EvaluationConfig(every=1)},
    )
    assert isinstance(assembly.recipe.trainer, TrainerConfig)
    texts = list(HOSTILE.values())
    turn = count()
    assembly.transcriber.completion = lambda prompt, ids: texts[next(turn) % len(texts)]  # type: ignore[method-assign]
    with within(60):
        execute(assembly, export=True)
    return folder


def test_every_file_of_the_run_is_whole_utf_8(run: Path) -> None:
    for name in ("metrics.jsonl", "timings.jsonl", "warnings.jsonl"):
        if (run / name).exists():
            for line in (run / name).read_bytes().decode("utf-8").splitlines():
                json.loads(line)
    for name in ("recipe.yaml", "environment.json"):
        (run / name).read_bytes().decode("utf-8")
    expected = {text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd") for text in HOSTILE.values()}
    for path in [*(run / "rollouts").iterdir(), *(run / "evaluations").iterdir()]:
        table = pq.read_table(path).to_pydict()
        assert table["completion"] and set(table["completion"]) <= expected
        assert len(table["completion"]) == len(table["reward"])


def test_what_rewards_log_is_kept_as_text_or_named(run: Path) -> None:
    table = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pydict()
    assert table["extra/seen"] == table["completion"]
    assert table["extra/odd"][:3] == ["(int without text: ValueError)", "b'\\xff'", "{'\\ud800': 1}"]
    assert table["extra/large"][0] == "1" + "0" * 400


def test_the_report_is_utf_8_without_markup_of_the_texts(run: Path) -> None:
    page = (run / "report.html").read_bytes().decode("utf-8")
    assert "<script>alert(1)" not in page
    assert len(page) < 2_000_000  # long texts are cut


def test_the_report_is_written_again_by_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert not STEERING.search(capsys.readouterr().out)


def test_pairs_and_summary_on_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = RunData.read(run)
    with within(60):
        show_summary(console(), summarise(data))
        show_pairs(console(), sample_pairs(data, count=len(HOSTILE)))
    shown = capsys.readouterr().out
    assert len(shown) < 200_000 and "cut here" in shown
    assert not STEERING.search(shown)


@pytest.mark.parametrize("name", HOSTILE)
def test_errors_with_such_text_are_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with within(20):
        tell(f"begin {HOSTILE[name]} end", label="error: ", style="bold red")
    shown = capsys.readouterr().err
    assert shown.startswith("error: begin ") and shown.endswith(" end\n") and len(shown) < 12_000
    assert not STEERING.search(shown)


@pytest.mark.parametrize("name", HOSTILE)
def test_text_for_files_and_terminals(name: str) -> None:
    as_text(HOSTILE[name]).encode("utf-8")
    as_text([{"role": "assistant", "content": HOSTILE[name], "when": object()}]).encode("utf-8")
    printable(HOSTILE[name]).encode("utf-8")
    assert not STEERING.search(printable(HOSTILE[name]))
    assert as_text("a\ud800") == printable("a\ud800") == "a\ufffd"


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.startswith("long")])
def test_inspect_shows_such_rows(name: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = HOSTILE[name]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": f"Once {text[:40]}", text[:40] or "x": [text[:40]]}) + "\n")
    assert main(["inspect", str(tmp_path / "d.jsonl"), "--model", str(stories)]) == 0
    shown = capsys.readouterr().out
    for word in ("index", "id", "token", "attention", "position", "loss", "Once"):
        assert word in shown
    assert not STEERING.search(shown)


def test_inspect_refuses_a_line_beyond_the_context(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.txt").write_text("Once\n" + "a b " * 25_000 + "\n")
    assert main(["inspect", str(tmp_path / "d.txt"), "--model", str(stories)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "d.txt:2: the prompt has " in shown and "data.overlong: truncate_left" in shown


def test_halves_of_surrogate_pairs_from_a_tokenizer_become_u_fffd() -> None:
    class Odd:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join("ab\ud83d\ude00"[i] for i in ids)

    assert decode(Odd(), [0, 2]) == "a\ufffd"
    prompt = Prompt(text="a", ids=(0,))
    assert Transcriber(Odd()).completion(prompt, [1, 2, 3]) == "b\ufffd\ufffd"
