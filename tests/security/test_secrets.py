"""Secrets of the environment, of command lines and of recipes appear in nothing that a run writes or prints."""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tropism import Recipe
from tropism.cli import main
from tropism.errors import ConfigError
from tropism.redaction import find_secret, redact, redact_values

TESTS = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "HF_TOKEN": "hf_CanaryOfTheHub0123456789abcdef",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryOfTheOldName0123456789abc",
    "WANDB_API_KEY": "c0ffee0123canary0123456789abcdef01234567",
    "OPENAI_API_KEY": "canary openai/key+of=no form",
    "MY_DATABASE_PASSWORD": "canary-correct-horse-battery",
}
"""Some have a form that can be recognised, some only their place in the environment."""

GIVEN = {
    "url": "canaryOfAnUrl77",
    "recipe": "hf_CanaryOfARecipe0123456789abcdef",
    "config": "hf_CanaryOfAConfiguration0123456789",
    "field": "canary-of-a-field",
}
"""Secrets that a user puts where they do not belong."""

CANARIES = {**ENVIRONMENT, **GIVEN}

REWARDS = """
import os, signal

def secrets():
    return [os.environ[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_DATABASE_PASSWORD")]

def tells(completions, log_extra, trainer_state, **kwargs):
    log_extra("note", ["; ".join(secrets()) for _ in completions])
    if trainer_state["step"] == 2:
        raise ConnectionError("401 for " + "; ".join(secrets()), *secrets())
    return [float(len(text)) for text in completions]

def fails(completions, trainer_state, **kwargs):
    if trainer_state["step"] == 1:
        raise PermissionError("https://me:" + os.environ["HF_TOKEN"] + "@host refused " + "; ".join(secrets()))
    return [float(len(text)) for text in completions]

def interrupts(completions, trainer_state, **kwargs):
    if trainer_state["step"] == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return [float(len(text)) for text in completions]
"""

DRIVER = """
import json, os, sys
from pathlib import Path
from accelerate.tracking import GeneralTracker
import tropism.build, tropism.recipe_processes
from tropism.cli import main

class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False
    tracker = None
    def __init__(self):
        super().__init__()
    def store_init_configuration(self, values):
        Path("tracker.txt").write_text(repr(values))
    def log(self, values, step=None, **kwargs):
        with open("tracker.txt", "a") as file:
            file.write(repr(values))

real = tropism.recipe_processes.Accelerator
def with_recorder(**options):
    if options.get("log_with"):
        options["log_with"] = [Recorder()]
    return real(**options)

def broken(*args, **kwargs):
    token = os.environ["HF_TOKEN"]
    raise RuntimeError("unexpected: " + token + " " + os.environ["OPENAI_API_KEY"], token)

codes = {}
for name, arguments in json.loads(sys.stdin.read()).items():
    before = tropism.build.policy_of
    tropism.recipe_processes.Accelerator = with_recorder if name == "sft" else real
    if name.startswith("internal"):
        tropism.build.policy_of = broken
    codes[name] = main(arguments)
    tropism.build.policy_of = before
Path("codes.json").write_text(json.dumps(codes))
"""


def commands() -> dict[str, list[str]]:
    """Name -> a command line; those that should train come first."""
    common = ["train", "--model", "model", "--total_steps", "2", "--prompts_per_step", "2"]
    common += ["--sampling.max_new_tokens", "4", "--trainer.learning_rate", "1e-3", "--trainer.checkpoints.every", "1"]
    grpo = [*common, "--algorithm.name", "grpo", "--algorithm.group_size", "2", "--data", "prompts.txt", "--allow-code"]
    tensorboard = ["--trainer.tracking", "[tensorboard]"]
    url = f"https://user:{GIVEN['url']}@host.example/data"
    tells = ["--reward.use", "rewards.py:tells", "--reward.on_error", "skip", "--eval_data", "prompts.txt"]
    fails = ["--reward.use", "rewards.py:fails"]
    sft = [*common, "--algorithm", "sft", "--data", "prompts.txt"]
    return {
        "sft": [*sft, "--run", "run-sft", *tensorboard, "--debug"],
        "grpo": [*grpo, "--run", "run-grpo", *tells, *(tensorboard if _installed("tensorboard") else []), "--debug"],
        "generate": ["generate", "run-grpo", "a cat", "--max-new-tokens", "3"],
        "reward fails": [*grpo, "--run", "run-fails", "--reward", "rewards.py:fails", "--debug"],
        "reward fails quietly": [*grpo, "--run", "run-fails-too", "--reward", "rewards.py:fails"],
        "worker fails": [*grpo, "--run", "run-worker", *fails, "--reward.timeout", "60", "--debug"],
        "interrupted": [*grpo, "--run", "run-interrupted", "--reward", "rewards.py:interrupts", "--debug"],
        "model cannot load": [*sft, "--model", "damaged", "--run", "run-a", "--debug"],
        "internal": [*sft, "--run", "run-b", "--debug"],
        "internal, short": [*sft, "--run", "run-b"],
        "model url": [*sft, "--model", url, "--run", "run-c", "--debug"],
        "data url": [*sft, "--data", url, "--run", "run-d", "--debug"],
        "reward url": [*grpo, "--reward", url, "--run", "run-e", "--debug"],
        "tracking": [*sft, "--trainer.tracking", f"[{GIVEN['recipe']}]", "--run", "run-f", "--debug"],
        "recipe": ["train", "recipe.yaml", "--debug"],
        "recipe of a wrong type": ["train", "wrong.yaml", "--debug"],
        "malformed recipe": ["train", "malformed.yaml", "--debug"],
        "option": ["generate", "model", "a cat", "--token", ENVIRONMENT["OPENAI_API_KEY"], "--debug"],
        "prompt": ["generate", "model", f"my key is {ENVIRONMENT['WANDB_API_KEY']}"],
        "command": [GIVEN["recipe"]],
    }


EXIT_CODES = {"sft": 0, "grpo": 0, "generate": 0, "interrupted": 130, "internal": 1, "internal, short": 1}
"""Every other command ends with 2."""


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, one whose configuration holds a token, data, rewards and recipes."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "damaged").mkdir()
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "damaged" / "config.json").write_text(json.dumps({**config, "model_type": GIVEN["config"]}))
    (folder / "prompts.txt").write_text("a cat sat\nthe big dog\noh no\n")
    (folder / "rewards.py").write_text(REWARDS)
    recipe = {"model": "model", "algorithm": "grpo", "data": "prompts.txt"}
    with_field = {**recipe, "reward": {"use": "length", "args": {"api_key": GIVEN["field"]}}}
    (folder / "recipe.yaml").write_text(json.dumps({**with_field, "run": "run-g"}))
    (folder / "wrong.yaml").write_text(json.dumps({**recipe, "total_steps": GIVEN["recipe"]}))
    (folder / "malformed.yaml").write_text(f"model: model\ndata: [a\ntoken: {GIVEN['recipe']}: b\n")
    return folder


@pytest.fixture(scope="module")
def outcome(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """The folder in which all commands ran, their exit codes and everything they printed."""
    folder = tmp_path_factory.mktemp("runs")
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(folder / "hub"), "COLUMNS": "40"}
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands()),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    printed = f"{ended.stdout}\n{ended.stderr}"
    assert (folder / "codes.json").is_file(), printed[-3000:]
    return folder, json.loads((folder / "codes.json").read_text()), printed


# ---- searching -------------------------------------------------------------------------------------------------------


def forms_of(secret: str) -> list[bytes]:
    """The secret as it is, escaped for HTML and JSON, and in base64 at each of the three offsets."""
    raw = secret.encode()
    forms = [raw, html.escape(secret).encode(), json.dumps(secret)[1:-1].encode()]
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + raw + b"\0" * 3).decode()
        first, last = -(-8 * offset // 6), (8 * (offset + len(raw))) // 6
        inside = encoded[first:last]
        forms += [inside.encode(), inside.replace("+", "-").replace("/", "_").encode()]
    return forms


def contents_of(path: Path) -> bytes:
    """The bytes of a file, with what is compressed in it."""
    raw = path.read_bytes()
    if path.suffix == ".parquet":
        raw += repr(pq.read_table(path).to_pydict()).encode() + repr(pq.read_metadata(path).to_dict()).encode()
    if path.suffix == ".gz":
        raw += gzip.decompress(raw)
    return raw


def leaks(content: bytes) -> list[str]:
    return [name for name, secret in CANARIES.items() if any(form in content for form in forms_of(secret))]


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_the_search_finds_secrets_wherever_they_hide(tmp_path: Path) -> None:
    secret = ENVIRONMENT["OPENAI_API_KEY"]
    for offset in range(3):
        assert leaks(base64.b64encode(b"x" * offset + secret.encode() + b"more")) == ["OPENAI_API_KEY"]
    pq.write_table(pa.table({"text": [f"a {secret}"] * 3}), tmp_path / "a.parquet", compression="zstd")
    assert leaks(contents_of(tmp_path / "a.parquet")) == ["OPENAI_API_KEY"]
    (tmp_path / "a.gz").write_bytes(gzip.compress(secret.encode()))
    assert leaks(contents_of(tmp_path / "a.gz")) == ["OPENAI_API_KEY"]
    assert leaks(b"nothing here") == []


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_every_command_ends_as_it_should(outcome: tuple[Path, dict[str, int], str]) -> None:
    _, codes, printed = outcome
    assert codes == {name: EXIT_CODES.get(name, 2) for name in commands()}, printed[-3000:]


def test_nothing_that_was_written_holds_a_secret(outcome: tuple[Path, dict[str, int], str]) -> None:
    folder, _, _ = outcome
    found = files_below(folder)
    kinds = {path.name for path in found} | {path.suffix for path in found}
    assert kinds >= {"recipe.yaml", "environment.json", "metrics.jsonl", "warnings.jsonl", "report.html", "state.json"}
    assert kinds >= {".safetensors", ".parquet", "tracker.txt"}
    assert {str(path.relative_to(folder)): leaks(contents_of(path)) for path in found} == {
        str(path.relative_to(folder)): [] for path in found
    }


def test_nothing_that_was_printed_holds_a_secret(outcome: tuple[Path, dict[str, int], str]) -> None:
    _, _, printed = outcome
    assert leaks(printed.encode()) == []
    assert leaks("".join(printed.split()).encode()) == []  # nor broken over lines
    assert "Traceback" in printed and "PermissionError" in printed and "[redacted]" in printed


def test_what_was_redacted_is_still_reported(outcome: tuple[Path, dict[str, int], str]) -> None:
    folder, _, printed = outcome
    assert "401for[redacted];[redacted]" in "".join(printed.split())
    notes = [note for path in sorted(folder.glob("run-grpo/rollouts/*.parquet")) for note in _notes(path)]
    assert set(notes) - {None} == {"; ".join(["[redacted]"] * 4)}
    for hint in ("word 3 of the command line", "reward.terms.length.args.api_key looks like a secret", "HF_TOKEN"):
        assert "".join(hint.split()) in "".join(printed.split())


def _notes(path: Path) -> list[Any]:
    columns = pq.read_table(path).to_pydict()
    return [value for name, values in columns.items() if name.startswith("extra/") for value in values]


# ---- recipes from Python and files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"model": "https://user:pass1word@host.example/model"}, "model"),
        ({"model": {"name": "model", "revision": "hf_abcdefghijklmnopqrstuvwx"}}, "model.revision"),
        ({"data": {"path": "https://me:pass1word@host.example/a.jsonl"}}, "data.path"),
        ({"reward": {"use": "length", "args": {"password": "x"}}}, "reward.terms.length.args.password"),
        ({"reward": {"use": "length", "args": {"headers": ["Authorization: Bearer abc1234"]}}}, "args.headers[0]"),
        ({"run": "runs/sk-abcdefghijklmnop1234"}, "run"),
        ({"sampling": {"stop": ["hf_abcdefghijklmnopqrstuvwx"]}}, "sampling.stop[0]"),
    ],
)
def test_a_recipe_with_a_secret_is_refused(change: dict[str, Any], place: str) -> None:
    mapping = {"model": "model", "data": "prompts.txt", "algorithm": "grpo", "reward": "vader", **change}
    with pytest.raises(ConfigError) as caught:
        Recipe.from_mapping(mapping)
    message = str(caught.value)
    assert f"{place} looks like" in message and "set it in the environment" in message
    assert "pass1word" not in message and "abcdefghijkl" not in message


def test_a_value_of_the_environment_is_refused_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_SECRET", "plain words 1")
    mapping = {"model": "plain words 1", "data": "prompts.txt", "algorithm": "sft"}
    with pytest.raises(ConfigError, match=r"model looks like the value of the environment variable TRACKER_SECRET"):
        Recipe.from_mapping(mapping)


def test_a_recipe_may_name_the_variable_that_holds_a_secret() -> None:
    reward = {"use": "length", "args": {"goal": "maximise", "headers": {"X-Api-Key": "JUDGE_API_KEY"}, "password": ""}}
    mapping = {"model": "model", "data": "prompts.txt", "algorithm": "grpo", "reward": reward}
    assert "JUDGE_API_KEY" in Recipe.from_mapping(mapping).to_yaml()


def test_records_given_from_python_may_hold_anything() -> None:
    records = ["what is hf_abcdefghijklmnopqrstuvwx?"]
    recipe = Recipe.from_mapping({"model": "model", "data": records, "algorithm": "sft"})
    assert "hf_" not in recipe.to_yaml()


def test_every_recipe_that_is_shipped_is_free_of_secrets() -> None:
    recipes = sorted((TESTS.parent / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert find_secret(path.read_text()) is None


def test_the_command_line_refuses_secrets_without_repeating_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "https://me:pass1word@host.example/x", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "word 3 of the command line holds credentials in a URL" in shown and "pass1word" not in shown


# ---- the redaction itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_abcdefghijklmnopqrstuvwx.", "token [redacted]."),
        ("https://user:pass@host/x?a=1", "https://[redacted]@host/x?a=1"),
        ("GET /x?token=abc123def&b=2", "GET /x?token=[redacted]&b=2"),
        ("{'Authorization': 'Bearer abc.def.1'}", "{'Authorization': 'Bearer [redacted]'}"),
        ("X-Api-Key: JUDGE_TOKENabc1", "X-Api-Key: [redacted]"),
        ("sk-proj-Abc123Def456Ghi789", "[redacted]"),
        ("ghp_abcdefghijklmnopqrst0123", "[redacted]"),
        ("WANDB_API_KEY=0123456789abcdef", "WANDB_API_KEY=[redacted]"),
        ('"api_key": "abc-1234"', '"api_key": "[redacted]"'),
    ],
)
def test_forms_of_secrets(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert find_secret(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "eos_token: <eos>",
        "max_new_tokens: 12345678",
        "hf_transfer and hf_hub_download",
        "revision: 0123456789abcdef0123456789abcdef01234567",
        "git@github.com:someone/something",
        "https://host.example/someone/model",
        "http://127.0.0.1:8000/score",
        "task-list-of-2024-and-more-words",
        "password = read_password()",
        "step-000012-update-000048",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text
    assert find_secret(text) is None


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_TOKEN", "wordless/secret+value")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    assert redact("a wordless/secret+value, abc") == "a [redacted], abc"
    assert redact("cut: wordless/secr...") == "cut: [redacted]..."
    assert redact("wordless%2Fsecret%2Bvalue") == "[redacted]"
    assert redact(f"in {tmp_path}") == f"in {tmp_path}"
    row = {"a": ["wordless/secret+value"], "n": 3, "b": None}
    assert redact_values(row) == {"a": ["[redacted]"], "n": 3, "b": None}


def test_the_name_of_an_environment_variable_is_no_secret() -> None:
    """Headers of the remote reward name one, in recipes that a resumed run reads again."""
    for text in ("Authorization: JUDGE_TOKEN", "X-Api-Key: 'JUDGE_TOKEN'", '{"Authorization": "JUDGE_TOKEN"}'):
        assert redact(text) == text and find_secret(text) is None
