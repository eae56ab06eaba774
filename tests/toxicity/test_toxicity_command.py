"""``tropism toxicity``: one model, two models, going on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_classifiers import save_bert
from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main
from tropism.models.saving import save_plain
from tropism.toxicity.files import GrowingRows
from tropism.toxicity.result import ToxicityResult

Captured = pytest.CaptureFixture[str]

SCORER = """
def letter(completions, **kwargs):
    return [1.0 if "a" in text else 0.25 for text in completions]
"""
RECORDS = [
    {"prompt": {"text": text, "toxicity": number / 6}, "challenging": number == 5}
    for number, text in enumerate("abcdef")
]
COMMAND = ["toxicity", "tuned", "--prompts", "prompts.jsonl", "--scorer", "scorer.py:letter", "--allow-code"]
COMMAND += ["--max-new-tokens", "5", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two models, prompts and a scorer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate(("plain", "tuned")):
        save_plain(tiny_model("llama", seed=seed), tiny_tokenizer(chat=True), tmp_path / name)
    Path("prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    Path("scorer.py").write_text(SCORER)
    return tmp_path


def test_one_model(capsys: Captured) -> None:
    assert main([*COMMAND, "--samples-per-prompt", "2", "--out", "measured"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "expected maximum toxicity",
        "toxic (3)",
        "non-toxic (3)",
        "6 prompts, 2 completions each",
        "measured",
    ):
        assert text in shown
    result = ToxicityResult.load("measured")
    assert len(result.responses) == 12 and result.settings["model"] == "tuned"
    assert main([*COMMAND, "--samples-per-prompt", "2", "--out", "measured"]) == 0  # reads what is there


def test_base_and_tuned(capsys: Captured) -> None:
    assert main([*COMMAND, "--base", "plain", "--limit", "4", "--out", "both"]) == 0
    shown = capsys.readouterr().out
    assert "change, paired" in shown and "4 of 6 prompts in the data were measured" in shown
    assert {path.name for path in Path("both").iterdir()} == {
        "base",
        "tuned",
        "comparison.json",
        "report.html",
        "plots",
    }
    assert ToxicityResult.load("both/base").settings["model"] == "plain"
    assert main([*COMMAND, "--base", "plain", "--limit", "5", "--out", "both"]) == 2
    assert "holds the measurement of another prompts" in capsys.readouterr().err


def test_the_base_that_a_run_started_from(capsys: Captured) -> None:
    Path("run").mkdir()
    Path("tuned").rename("run/model")
    Path("run/recipe.yaml").write_text("model: {name: plain}\n")
    assert main(["toxicity", "run", "--base", "start", *COMMAND[2:]]) == 0
    assert ToxicityResult.load("run/toxicity-compared/base").settings["model"] == "plain"
    assert ToxicityResult.load("run/toxicity-compared/tuned").settings["model"] == "run"
    assert main(["toxicity", "run", *COMMAND[2:]]) == 0  # alone, in a folder of its own
    assert ToxicityResult.load("run/toxicity").settings["model"] == "run"


def test_two_kinds_of_measurements_share_no_folder(capsys: Captured) -> None:
    command = [*COMMAND, "--limit", "2"]
    assert main([*command, "--out", "one"]) == 0
    assert main([*command, "--base", "plain", "--out", "two"]) == 0
    pages = [Path(name, "report.html").read_bytes() for name in ("one", "two")]
    capsys.readouterr()
    assert main([*command, "--base", "plain", "--out", "one"]) == 2
    assert "one holds the measurement of one model" in capsys.readouterr().err
    assert main([*command, "--out", "two"]) == 2
    assert "two holds the comparison of two models" in capsys.readouterr().err
    assert [Path(name, "report.html").read_bytes() for name in ("one", "two")] == pages


def test_a_stopped_overwriting_comparison_keeps_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*COMMAND, "--base", "plain", "--out", "both"]
    assert main(command) == 0
    command += ["--seed", "1", "--overwrite"]
    finished = GrowingRows.finish

    def stopping(rows: GrowingRows, *arguments: Any) -> None:
        if rows.folder is not None and rows.folder.name == "tuned":
            raise KeyboardInterrupt
        finished(rows, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GrowingRows, "finish", stopping)
        assert main(command) == 130
    assert [ToxicityResult.load(f"both/{side}").settings["seed"] for side in ("base", "tuned")] == [1, 0]
    base = Path("both/base/responses.parquet")
    before = base.stat().st_mtime_ns
    assert main(command) == 0
    assert base.stat().st_mtime_ns == before and ToxicityResult.load("both/tuned").settings["seed"] == 1
    assert not Path("both/replaced.json").exists()
    assert main(command) == 0  # a new command measures both anew
    assert base.stat().st_mtime_ns != before


def test_beams_and_a_whole_configuration() -> None:
    assert main([*COMMAND, "--num-beams", "3", "--out", "beams"]) == 0
    assert ToxicityResult.load("beams").settings["sampling"]["num_beams"] == 3
    Path("generation.json").write_text(json.dumps({"max_new_tokens": 4, "do_sample": True, "top_k": 9}))
    assert main([*COMMAND[:7], "--generation-config", "generation.json", "--device", "cpu", "--out", "whole"]) == 0
    assert ToxicityResult.load("whole").settings["sampling"]["top_k"] == 9
    Path("generation.json").write_text(json.dumps({"max_new_tokens": 4, "temperature": 0.7}))  # names of Sampling, too
    assert main([*COMMAND[:7], "--generation-config", "generation.json", "--device", "cpu", "--out", "named"]) == 0
    assert ToxicityResult.load("named").settings["sampling"]["engine"] == "transformers"


def test_a_classifier_and_a_file_of_scorers() -> None:
    save_bert(Path("judge"), labels={0: "calm", 1: "rude"})
    arguments = [*COMMAND[:4], "--classifier", "judge", "--label", "rude", "--max-new-tokens", "5", "--device", "cpu"]
    assert main([*arguments, "--out", "one"]) == 0
    assert ToxicityResult.load("one").scorers == ("classifier",)
    assert main([*arguments, "--label", "1", "--out", "numbered"]) == 0  # 1 is rude
    numbered = ToxicityResult.load("numbered").scores["classifier"]
    assert numbered.tolist() == ToxicityResult.load("one").scores["classifier"].tolist()
    Path("scorers.yaml").write_text("rude: {use: classifier, args: {model: judge, label: rude}}\n")
    arguments = [*COMMAND[:4], "--scorer-file", "scorers.yaml", "--max-new-tokens", "5", "--device", "cpu"]
    assert main([*arguments, "--out", "two"]) == 0
    one, two = (ToxicityResult.load(name).scores for name in ("one", "two"))
    assert one["classifier"].tolist() == two["rude"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--custom-prompt", "User:"], "{prompt}"),
        (["--skip", "6"], "none of the 6 prompts is left"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--label", "rude"], "--classifier"),
        (["--scorer", "other.py:letter"], "two scorers are called 'letter'"),
        (["--scorer-file", "scorers.yaml"], "two scorers are called 'letter'"),
        (["--toxicity-column", "toxcity"], "no column 'toxcity'"),
        (["--num-beams", "2", "--temperature", "0.5"], "--temperature is not used with --num-beams"),
        (["--generation-config", "g.json", "--num-beams", "2"], "is not used with --generation-config"),
        (["--num-beams", "2", "--samples-per-prompt", "4"], "the same way every time"),
        (["--threshold", "other=0.5"], "threshold names 'other'"),
        (["--base", "start"], "no run folder"),
        (["--overlong", "cut"], "overlong"),
        (["--scorer", "profanty"], "profanity"),
        (["--prompts", "prompt.jsonl"], "prompts.jsonl"),
    ],
)
def test_what_is_refused(changes: list[str], message: str, capsys: Captured) -> None:
    Path("scorers.yaml").write_text("letter: {use: vader}\n")
    assert main([*COMMAND, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not Path("toxicity-tuned").exists()


def test_a_classifier_without_the_label(capsys: Captured) -> None:
    save_bert(Path("judge"), labels={0: "calm", 1: "rude"})
    arguments: list[str] = [*COMMAND[:4], "--classifier", "judge", "--out", "x"]
    for label, message in (([], "calm"), (["--label", "rudd"], "Did you mean 'rude'")):
        assert main([*arguments, *label]) == 2
        assert message in capsys.readouterr().err


def test_help(capsys: Captured) -> None:
    assert main(["toxicity", "--help"]) == 0
    shown: Any = capsys.readouterr().out
    for option in (
        "--base",
        "--scorer",
        "--custom-prompt",
        "--num-beams",
        "--generation-config",
        "--samples-per-prompt",
    ):
        assert option in shown
