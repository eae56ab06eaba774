"""What a user sees when something is wrong: one message that names the thing and the mend, and no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from full_disk import file_size_limit
from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main

Captured = pytest.CaptureFixture[str]

UNREADABLE = "/proc/self/mem"
"""A file that is there and that even the superuser cannot read from its beginning."""

TRAIN = [
    "train",
    "--model",
    "model",
    "--algorithm.name",
    "grpo",
    "--algorithm.group_size",
    "2",
    "--reward.use",
    "length",
]
TRAIN += ["--reward.args.goal", "maximise"]
TRAIN += ["--prompts_per_step", "2", "--total_steps", "1", "--sampling.max_new_tokens", "3", "--data", "prompts.txt"]

RUNS = (
    "finished",
    "unfinished",
    "no-weights",
    "cut-weights",
    "no-checkpoint",
    "bad-recipe",
    "bad-metrics",
    "bad-columns",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything that can be named by mistake."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a cat sat\nthe big dog\noh no\n")
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("mine")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "malformed.yaml").write_text("model: demo\n  data: [\n")
    (folder / "tag.yaml").write_text("model: !!python/object/apply:os.system ['true']\n")
    (folder / "unknown.yaml").write_text("model: model\nalgorithm: grpo\ndata: prompts.txt\nlearning_rate: 1\n")
    (folder / "garbage.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    (folder / "malformed.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main([*TRAIN, "--eval_data", "prompts.txt", "--run", "finished"]) == 0
    finally:
        os.chdir(before)
    for name in RUNS[1:]:
        shutil.copytree(folder / "finished", folder / name)
        recipe = (folder / name / "recipe.yaml").read_text().replace("run: finished", f"run: {name}")
        (folder / name / "recipe.yaml").write_text(recipe)
    shutil.rmtree(folder / "unfinished" / "model")
    (folder / "no-weights" / "model" / "model.safetensors").unlink()
    weights = folder / "cut-weights" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for manifest in folder.glob("no-checkpoint/checkpoints/*/manifest.json"):
        manifest.unlink()
    (folder / "bad-recipe" / "recipe.yaml").write_text("model: [\n")
    metrics = folder / "bad-metrics" / "metrics.jsonl"
    metrics.write_text("not json\n" + metrics.read_text())
    for table in folder.glob("bad-columns/evaluations/*.parquet"):
        shutil.copy(next(folder.glob("finished/rollouts/*.parquet")), table)
    return folder


@pytest.fixture(autouse=True)
def _there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")


def command_id(value: object) -> str | None:
    return " ".join(value)[-60:].replace("/", "|") if isinstance(value, list) else None


WRONG: list[tuple[list[str], str]] = [
    # train
    (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["train", "model"], "model is a folder; give a recipe file"),
    (["train", "binary.yaml"], "binary.yaml: not UTF-8 text"),
    (["train", "list.yaml"], "list.yaml: expected a mapping"),
    (["train", "malformed.yaml"], "malformed.yaml:2"),
    (["train", "tag.yaml"], "tag.yaml:1"),
    (["train", "unknown.yaml"], "learning_rate: unknown key"),
    (["train", UNREADABLE], UNREADABLE),
    ([*TRAIN, "--data", "nowhere.txt"], "nowhere.txt"),
    ([*TRAIN, "--data", "empty"], "empty"),
    ([*TRAIN, "--data", "malformed.jsonl"], "malformed.jsonl:2"),
    ([*TRAIN, "--data", UNREADABLE], UNREADABLE),
    ([*TRAIN, "--eval_data", "nowhere.txt"], "nowhere.txt"),
    ([*TRAIN, "--run", "prompts.txt"], "prompts.txt is a file"),
    ([*TRAIN, "--run", "prompts.txt/run"], "prompts.txt"),
    ([*TRAIN, "--run", "notes"], "notes already holds a run"),
    ([*TRAIN, "--model", "empty"], "empty holds no config.json"),
    ([*TRAIN, "--model", "garbage.gguf"], "garbage.gguf"),
    ([*TRAIN, "--reward", "os:system"], "--allow-code"),
    ([*TRAIN, "--total_steps"], "--total_steps: needs a value"),
    ([*TRAIN, "-x"], "-x"),
    (["train", "--resume", "nowhere"], "nowhere"),
    (["train", "--resume", "notes"], "notes is no run folder"),
    (["train", "--resume", "empty"], "empty is no run folder"),
    (["train", "--resume", "bad-recipe"], "bad-recipe/recipe.yaml"),
    (["train", "--resume", "no-checkpoint"], "no-checkpoint"),
    # generate
    (["generate", "nowhere/at/all", "a"], "nowhere/at/all"),
    (["generate", "empty", "a"], "empty holds no config.json"),
    (["generate", "notes", "a"], "notes holds no config.json"),
    (["generate", "prompts.txt", "a"], "prompts.txt is a file"),
    (["generate", "garbage.gguf", "a"], "garbage.gguf"),
    (["generate", "missing.gguf", "a"], "missing.gguf"),
    (["generate", "unfinished", "a"], "the run unfinished has no model yet"),
    (["generate", "no-weights", "a"], "no-weights/model"),
    (["generate", "cut-weights", "a"], "cut-weights/model"),
    (["generate", "model", "a", "--device", "cuda:77"], "cuda:77"),
    (["generate", "model", "a", "--device", "toaster"], "toaster"),
    (["generate", "model", "a", "--temperature", "-1"], "temperature"),
    # evaluate
    (["evaluate", "nowhere"], "nowhere is not there"),
    (["evaluate", "notes", "--data", "prompts.txt", "--reward", "vader"], "notes holds no config.json"),
    (["evaluate", "unfinished"], "the run unfinished has no model yet"),
    (["evaluate", "cut-weights"], "cut-weights/model"),
    (["evaluate", "bad-recipe"], "bad-recipe/recipe.yaml"),
    (["evaluate", "finished", "--data", "nowhere.txt"], "nowhere.txt"),
    (["evaluate", "finished", "--totl_steps", "3"], "did you mean 'total_steps'"),
    (["evaluate", "finished", "--out", "nowhere/scores.json"], "nowhere/scores.json"),
    (["evaluate", "finished", "--out", "nowhere/scores.parquet"], "nowhere/scores.parquet"),
    # inspect
    (["inspect", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["inspect", "malformed.yaml"], "malformed.yaml:2"),
    (["inspect", "nowhere.jsonl", "--model", "model"], "nowhere.jsonl"),
    (["inspect", "malformed.jsonl", "--model", "model"], "malformed.jsonl:2"),
    (["inspect", "prompts.txt", "--model", "empty"], "empty holds no config.json"),
    (["inspect", "bad-recipe"], "bad-recipe/recipe.yaml"),
    (["inspect", "notes"], "notes is no recipe"),
    # methods, report
    (["methods", "gpro"], "did you mean 'grpo'"),
    (["report", "nowhere"], "nowhere"),
    (["report", "prompts.txt"], "'prompts.txt' is a file"),
    (["report", "empty"], "'empty' is no run folder"),
    (["report", "bad-metrics"], "bad-metrics/metrics.jsonl, line 1"),
    (["report", "bad-columns"], "bad-columns/evaluations/step-000000.parquet"),
    # demo
    (["demo", "--model", "empty", "--run", "d"], "empty holds no config.json"),
    (["demo", "--model", "model", "--run", "d", "--steps", "0"], "total_steps must be at least 1"),
    # none of them
    (["trian"], "did you mean 'train'"),
    ([""], "there is no command ''"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=command_id)
def test_one_message_names_what_is_wrong(arguments: list[str], named: str, world: Path, capsys: Captured) -> None:
    there = sorted(world.iterdir())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert "--debug" not in error, "an error that the user can mend is not an unexpected one"
    assert sorted(world.iterdir()) == there


TYPED_WRONG = [
    ["generate", "model", "a", "--n", "many"],
    ["generate"],
    ["evaluate"],
    ["inspect", "x.yaml", "--rows", "all"],
    ["report"],
    ["demo", "--steps", "some"],
    ["methods", "a", "b"],
]


@pytest.mark.parametrize("arguments", TYPED_WRONG, ids=command_id)
def test_the_parser_names_what_is_wrong(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert f"tropism {arguments[0]} --help" in captured.err + captured.out


# ---- disks, pipes and terminals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["report", "finished"], "finished/report.html"), ([*TRAIN, "--run", "full"], "full")],
    ids=command_id,
)
def test_a_full_disk_names_the_file(arguments: list[str], named: str, world: Path, capsys: Captured) -> None:
    report = (world / "finished" / "report.html").read_bytes()
    with file_size_limit(20_000):
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and named in error and "Traceback" not in error
    assert (world / "finished" / "report.html").read_bytes() == report
    shutil.rmtree(world / "full", ignore_errors=True)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_results_that_find_no_room_are_an_error(kind: str, world: Path, capsys: Captured) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    scores = world / f"scores.{kind}"
    scores.symlink_to("/dev/full")
    try:
        assert main(["evaluate", "finished", "--out", scores.name]) == 2
    finally:
        scores.unlink(missing_ok=True)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and f"scores.{kind}" in error and "No space left" in error


class BrokenPipe(io.TextIOWrapper):
    """Standard output whose reader has gone."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(writer, "wb", buffering=0), encoding="utf-8", write_through=True)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_does_not_end_a_run(
    stream: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with BrokenPipe() as gone:
        monkeypatch.setattr(sys, stream, gone)
        code = main([*TRAIN, "--run", "piped", "--trainer.progress", "true"])
        monkeypatch.undo()
    os.chdir(world)
    assert code == 0
    assert (world / "piped" / "model" / "config.json").is_file()
    shutil.rmtree(world / "piped")
    assert "Traceback" not in capsys.readouterr().err


def test_output_that_cannot_be_written_is_an_error(world: Path) -> None:
    """``tropism ... > /dev/full``: silence would look like success."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        ended = start("--help", stdout=full)
    _, error = ended.communicate(timeout=60)
    assert ended.returncode == 2
    assert "No space left" in error and "Traceback" not in error and "Exception ignored" not in error


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tropism.cli", *arguments]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, **given)  # type: ignore[call-overload,no-any-return]


def test_a_pipe_is_closed_early() -> None:
    """``tropism --help | head -0`` says nothing about broken pipes, also not when Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--help", stdout=writer)
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


def test_closed_standard_streams(world: Path) -> None:
    command = f"{sys.executable} -m tropism.cli --help <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command], check=False, timeout=60).returncode == 0
    command = f"{sys.executable} -m tropism.cli generate model - <&-"
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2
    assert "there is no prompt" in ended.stderr and "Traceback" not in ended.stderr


ENCODINGS = ["ascii", "latin-1", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["generate", "model", "caf\u00e9 \u732b \U0001f600 \udcff", "--max-new-tokens", "2"], 0, "caf"),
        (["generate", "nowhere/\u732b", "a"], 2, "nowhere/"),
        (["generate", "model", "a", "--nn", "\u732b"], 2, "--nn"),
        (["methods"], 0, "grpo"),
        (["--help"], 0, "usage"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_terminals_of_other_encodings(
    arguments: list[str], code: int, named: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(arguments) == code
    monkeypatch.undo()
    text = shown.getvalue().decode(encoding)
    assert named in text and "Traceback" not in text


@pytest.mark.parametrize("columns", ["1", "7", "20"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["methods", "grpo"], 0),
        (["report", "nowhere"], 2),
        (["generate", "model", "a", "--nn", "1"], 2),
        (["generate", "model", "a cat", "--max-new-tokens", "2"], 0),
        (["inspect", "prompts.txt", "--model", "model"], 0),
        (["evaluate", "finished"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_narrow_terminals(
    arguments: list[str], code: int, columns: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if arguments[0] == "report":
        assert captured.err == (
            "error: there is no folder 'nowhere'; give the folder of a run, such as runs/<name>\n"
        )  # messages are not cut: who copies one gets a whole line


# ---- interruptions and the unexpected --------------------------------------------------------------------------------


def test_ctrl_c_while_the_libraries_load(world: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see what a process has loaded")
    (world / "recipe.json").write_text(json.dumps({"model": "model", "algorithm": "sft", "data": "prompts.txt"}))
    process = start("train", "recipe.json", cwd=world)
    begun = time.monotonic()
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < begun + 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error and "Traceback" not in error + out
    assert not list(world.glob("runs/*"))


@pytest.mark.parametrize("wrong", [RuntimeError("out of\norder"), MemoryError(), AssertionError(), KeyError("x")])
def test_the_unexpected_is_short_and_says_how_to_see_more(
    wrong: Exception, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise wrong

    monkeypatch.setattr("tropism.commands.methods.tyro.cli", broken)
    assert main(["methods"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {type(wrong).__name__}") and error.count("\n") == 1
    assert "--debug" in error and "Traceback" not in error
    assert main(["methods", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "in broken" in shown


def test_a_reward_that_fails_is_named_by_the_command_line(world: Path, capsys: Captured) -> None:
    (world / "failing.py").write_text("def bad(completions):\n    return [1.0 / 0 for _ in completions]\n")
    assert main([*TRAIN, "--reward", "failing.py:bad", "--allow-code", "--run", "f"]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "ZeroDivisionError" in error and "bad" in error
    assert not (world / "f").exists()


def test_debug_can_stand_anywhere(capsys: Captured) -> None:
    for arguments in (
        ["--debug", "report", "nowhere"],
        ["report", "--debug", "nowhere"],
        ["report", "nowhere", "--debug"],
    ):
        assert main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err
