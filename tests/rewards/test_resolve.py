"""Registered names and code references."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tropism.errors import ConfigError
from tropism.rewards import RewardTerm, register, registry, reward_names
from tropism.rewards.resolve import resolve_reward

CODE = """
from dataclasses import dataclass

CALLS = []
VALUE = 3

@dataclass
class Judge:
    bonus: float = 0.0
    def __call__(self, completions):
        return [self.bonus for _ in completions]

def warm(completions, bonus=1.0):
    CALLS.append(len(completions))
    return [bonus for _ in completions]
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def own_names() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


def resolve(use: Any, *, allow_code: bool = True, **args: Any) -> Any:
    return resolve_reward(RewardTerm(use=use, args=args), allow_code=allow_code)


def test_code_runs_only_when_allowed(code: Path) -> None:
    code.write_text("raise SystemExit('this must not run')")
    for reference in (f"{code}:warm", "antigravity:fly"):
        with pytest.raises(ConfigError, match=r"--allow-code"):
            resolve(reference, allow_code=False)
    assert "antigravity" not in sys.modules


def test_a_file_is_imported_with_its_hash_logged(code: Path, caplog: pytest.LogCaptureFixture) -> None:
    path_before = list(sys.path)
    reward = resolve(f"{code}:warm", bonus=2.0)
    assert reward(["a", "b"]) == [2.0, 2.0]
    assert sys.path == path_before
    (record,) = [record for record in caplog.records if record.name == "tropism"]
    assert record.levelno == logging.WARNING
    assert str(code) in record.message and hashlib.sha256(CODE.encode()).hexdigest() in record.message


def test_terms_of_one_file_share_its_state_until_it_changes(code: Path) -> None:
    first, second = resolve(f"{code}:warm"), resolve(f"{code}:warm")
    assert first is second
    code.write_text(CODE.replace("bonus=1.0", "bonus=5.0"))
    assert resolve(f"{code}:warm")(["a"]) == [5.0]


def test_a_relative_file_is_found_from_the_working_directory(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(code.parent)
    assert resolve("mine.py:warm")(["a"]) == [1.0]
    with pytest.raises(ConfigError, match=r"no installed module 'mine'.*mine.py:warm"):
        resolve("mine:warm")


def test_a_class_in_code_is_made_with_the_arguments(code: Path) -> None:
    assert resolve(f"{code}:Judge", bonus=4.0)(["a"]) == [4.0]


def test_an_installed_module_is_imported(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("statistics:mean") is __import__("statistics").mean
    assert any("statistics.py (sha256" in record.message for record in caplog.records)
    assert resolve("os.path:join") is __import__("os").path.join


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{file}:wram", "has no 'wram'. Did you mean 'warm'"),
        ("{file}:VALUE", "is int, not a function"),
        ("{file}:", "expected module:function"),
        ("{file}:a b", "expected module:function"),
        ("{file}:warm()", "expected module:function"),
        ("{folder}/missing.py:warm", "cannot read .*missing.py"),
        ("{folder}/:warm", "cannot read"),
        ("no_such_module_here:warm", "no installed module"),
        ("no_such_package.part:warm", "importing no_such_package.part failed"),
        ("..mine:warm", "expected module:function"),
    ],
)
def test_bad_references(reference: str, message: str, code: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(reference.format(file=code, folder=code.parent))


@pytest.mark.parametrize("source", ["def (", "import no_such_module_here", "1 / 0", "\0"])
def test_code_that_cannot_be_imported(source: str, code: Path) -> None:
    code.write_text(source)
    with pytest.raises(ConfigError, match=r"importing .*mine.py failed: [A-Z]") as caught:
        resolve(f"{code}:warm")
    assert caught.value.__cause__ is not None


def test_unknown_arguments_of_a_function_are_named(code: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes no argument 'bonsu'. Did you mean 'bonus'"):
        resolve(f"{code}:warm", bonsu=1.0)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vadre", {}, "unknown reward 'vadre'. Did you mean 'vader'"),
        ("zzzz", {}, "Known: classifier, keywords, length"),
        ("mine.warm", {}, "file.py:function"),
        ("words", {}, "needs the argument 'words'"),
        ("words", {"word": ["a"]}, "takes no argument 'word'. Did you mean 'words'"),
        ("length", {"target": -1}, "reward 'length': target"),
    ],
)
def test_registered_names_are_checked(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name, allow_code=False, **args)


def test_register_a_function_and_a_class(own_names: None) -> None:
    @register("my-reward")
    def my_reward(completions: list[str], value: float = 1.0) -> list[float]:
        return [value for _ in completions]

    @register("my-judge")
    class Judge:
        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, completions: list[str]) -> list[float]:
            return [self.value for _ in completions]

    assert {"my-reward", "my-judge", "vader"} <= set(reward_names())
    assert resolve("my-reward", allow_code=False)(["a"]) == [1.0]
    assert resolve("my-reward", allow_code=False, value=2.0)(["a"]) == [2.0]
    assert resolve("my-judge", allow_code=False, value=3.0)(["a"]) == [3.0]
    with pytest.raises(ConfigError, match=r"needs the argument 'value'"):
        resolve("my-judge", allow_code=False)


@pytest.mark.parametrize("name", ["vader", "a:b", "a/b", " "])
def test_names_that_cannot_be_registered(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name"):
        register(name)
