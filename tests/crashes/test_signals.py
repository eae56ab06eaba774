"""``tropism train`` ends within seconds of a signal, whatever it is doing, and goes on as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked_runs import LIMIT, Server, assert_same_run, serving, write_recipe
from tropism.training.checkpoint import list_checkpoints

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def whole(server: Server, recipe: Path) -> Path:
    """The run that nothing interrupts."""
    run = recipe.parent / "whole"
    ended = server.train(recipe, run)
    assert ended.codes == [0], ended.said
    return run


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("loading", signal.SIGTERM),
        ("loading", signal.SIGINT),
        ("memory", signal.SIGTERM),
        ("pre-flight", signal.SIGTERM),
    ],
)
def test_before_training_nothing_is_left_behind(
    phase: str, number: signal.Signals, server: Server, recipe: Path, tmp_path: Path
) -> None:
    ended = server.train(recipe, tmp_path / "run", phase, (0.1, number))
    assert ended.reached and ended.codes == [CODES[number]], ended.said
    assert ended.seconds[0] < LIMIT
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in ended.said[0]


PHASES = {
    "first evaluation": signal.SIGTERM,
    "sampling": signal.SIGINT,
    "reward": signal.SIGTERM,
    "compiled reward": signal.SIGTERM,
    "stubborn reward": signal.SIGINT,
    "update": signal.SIGTERM,
    "evaluation": signal.SIGINT,
    "last evaluation": signal.SIGTERM,
    "saving": signal.SIGTERM,
    "export": signal.SIGINT,
}


@pytest.mark.parametrize("phase", PHASES)
def test_out_in_time_and_resumed_to_the_same_run(
    phase: str, server: Server, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = server.train(recipe, run, phase, (0.1, PHASES[phase]))
    assert ended.reached and ended.codes == [CODES[PHASES[phase]]], ended.said
    assert ended.seconds[0] < LIMIT
    assert "Traceback" not in ended.said[0]
    assert len(list_checkpoints(run / "checkpoints")) == 1
    server.finish(run)
    assert_same_run(run, whole)


def test_a_second_signal_ends_the_run_at_once(server: Server, recipe: Path, tmp_path: Path) -> None:
    """Even while a checkpoint is being written, which the first one waits for."""
    ended = server.train(recipe, tmp_path / "run", "saving", (0.1, signal.SIGTERM), (0.5, signal.SIGINT))
    assert ended.reached and ended.codes == [CODES[signal.SIGINT]], ended.said
    assert ended.seconds[0] < 1.5
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_signal_that_comes_twice_at_once_is_one(server: Server, recipe: Path, tmp_path: Path) -> None:
    """As coreutils' timeout sends it: to the process, and to its group."""
    ended = server.train(recipe, tmp_path / "run", "update", (0.1, signal.SIGTERM), (0.02, signal.SIGTERM))
    assert ended.reached and ended.codes == [CODES[signal.SIGTERM]], ended.said
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1
