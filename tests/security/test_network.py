"""The library talks to nobody by itself: local models and data need no network, and nothing listens."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main

SOURCE = Path(tropism.__file__).parent

GUARD = """
import os, sys

FILE = os.environ["NETWORK_RECORD"]
LOCAL = ("127.", "::1", "localhost")

def note(event, what):
    with open(FILE, "a") as file:
        file.write(f"{event} {what!r}\\n")

def check(event, host, what):
    note(event, what)
    if host is not None and not str(host).startswith(LOCAL):
        raise PermissionError(f"{event} {what!r} leaves this machine")

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple):  # a text is the path of a local socket
            check(event, address[0], address)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        check(event, arguments[0], arguments)

sys.addaudithook(watch)

def listening():
    own = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            pass
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        if os.path.exists(table):
            for line in open(table).read().splitlines()[1:]:
                parts = line.split()
                if parts[3] == "0A" and f"socket:[{parts[9]}]" in own:
                    note("listening", parts[1])

if os.path.isdir("/proc/self/fd"):
    import atexit
    atexit.register(listening)
"""
"""Runs at the start of every Python process below the test, workers included."""

DRIVER = """
import json, sys
from tropism.cli import main
print(json.dumps([main(arguments) for arguments in json.loads(sys.stdin.read())]))
"""


def run_guarded(folder: Path, code: str, *, given: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run Python code where no connection can leave the machine; returns how it ended and what it tried."""
    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    (folder / "temporary").mkdir(exist_ok=True)
    record = folder / "record.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "PYTHONPATH": str(folder / "guard"),
        "NETWORK_RECORD": str(record),
        "TMPDIR": str(folder / "temporary"),
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-c", code],
        input=given,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    return ended, record.read_text().splitlines() if record.is_file() else []


@pytest.mark.parametrize(
    ("code", "noted"),
    [
        ("import socket; socket.create_connection(('192.0.2.1', 80))", "socket.getaddrinfo"),
        ("import socket; socket.socket().connect(('192.0.2.1', 80))", "socket.connect ('192.0.2.1', 80)"),
        ("import socket; socket.getaddrinfo('host.invalid', 80)", "socket.getaddrinfo"),
        ("import urllib.request; urllib.request.urlopen('http://host.invalid/')", "socket.getaddrinfo"),
    ],
)
def test_the_guard_stops_what_leaves_the_machine(code: str, noted: str, tmp_path: Path) -> None:
    ended, record = run_guarded(tmp_path, code)
    assert ended.returncode == 1 and "leaves this machine" in ended.stderr
    assert noted in record[0]


def test_the_guard_sees_what_listens(tmp_path: Path) -> None:
    code = "import socket, sys; sys.s = s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"
    ended, record = run_guarded(tmp_path, code)
    assert ended.returncode == 0, ended.stderr
    assert record[0].startswith("socket.bind") and record[-1].startswith("listening '0100007F:")


def test_training_generating_and_evaluating_need_no_network(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat sat\nthe big dog\noh no\n")
    common = ["train", "--model", "model", "--data", "prompts.txt", "--total_steps", "1", "--prompts_per_step", "2"]
    common += ["--sampling.max_new_tokens", "3", "--eval_data", "prompts.txt"]
    grpo = ["--algorithm.name", "grpo", "--algorithm.group_size", "2", "--lora.rank", "2"]
    grpo += ["--reward.use", "length", "--reward.args.goal", "maximise"]
    commands = [
        [*common, "--algorithm", "sft", "--run", "sft"],
        [*common, *grpo, "--run", "grpo"],
        ["generate", "grpo", "a cat", "--max-new-tokens", "3"],
        ["evaluate", "grpo"],
        ["inspect", "prompts.txt", "--model", "model"],
        ["report", "grpo"],
    ]
    ended, record = run_guarded(tmp_path, DRIVER, given=json.dumps(commands))
    assert ended.stdout.splitlines()[-1] == json.dumps([0] * len(commands)), ended.stderr
    assert record == []  # one process neither connects, nor asks for a name, nor listens
    assert list((tmp_path / "temporary").iterdir()) == []  # and leaves nothing where others write


def test_telemetry_is_off_unless_the_user_has_decided(tmp_path: Path) -> None:
    code = (
        "import tropism\nfrom huggingface_hub import constants\nfrom datasets import config\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, config.HF_UPDATE_DOWNLOAD_COUNTS)"
    )
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS", "HF_HUB_OFFLINE")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    chosen = {**plain, "HF_HUB_DISABLE_TELEMETRY": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "1"}
    for environment, shown in ((plain, "True False"), (chosen, "False True")):
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
        )
        assert ended.stdout.strip() == shown


def test_no_weights_of_hub_models_are_sent_to_be_converted() -> None:
    code = "import os, tropism; print(os.environ['DISABLE_SAFETENSORS_CONVERSION'])"
    plain = {name: value for name, value in os.environ.items() if name != "DISABLE_SAFETENSORS_CONVERSION"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=True)
    assert ended.stdout.strip() == "1"


def test_a_hub_id_without_network_is_one_quick_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tests run with HF_HUB_OFFLINE=1, as users do who want no network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    common = ["--algorithm", "sft", "--run", "run"]
    for arguments, name in (
        (["generate", "someone/some-model", "a cat"], "someone/some-model"),
        (["train", "--model", "someone/some-model", "--data", "prompts.txt", *common], "someone/some-model"),
    ):
        began = time.monotonic()
        assert main(arguments) == 2
        assert time.monotonic() - began < 10  # under a second on an idle machine; no waiting for a network
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and name in error and "HF_HUB_OFFLINE" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


CLIENTS = {"socketserver", "http", "urllib.request", "requests", "httpx", "httpx2", "aiohttp", "ftplib", "smtplib"}
OF_THIS_MACHINE = {"gethostname", "socketpair"}
"""What ``socket`` has that reaches nobody else."""


def reaches_others(node: ast.AST) -> bool:
    names: set[str] = set()
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.value.id == "socket" and node.func.attr not in OF_THIS_MACHINE
    clients = CLIENTS | ({"socket"} if isinstance(node, ast.ImportFrom) else set())
    return any(name == client or name.startswith(f"{client}.") for name in names for client in clients)


def test_only_rewards_meant_for_it_can_reach_a_network() -> None:
    """Scoring is local; what talks to another machine is in the modules named here, which say what they send."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    found = {str(path.relative_to(SOURCE)) for path, tree in trees.items() if any(map(reaches_others, ast.walk(tree)))}
    assert found == {"rewards/remote.py"}
