"""Two processes of ``tropism train``: what one of them meets ends both, and neither waits for the other in vain."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.sharded import LAUNCHED
from forked_runs import LIMIT, Server, assert_same_run, serving, write_recipe
from tropism.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def whole(server: Server, recipe: Path) -> Path:
    """The run of two processes that nothing happens to."""
    run = recipe.parent / "whole"
    ended = server.train(recipe, run, count=2)
    assert ended.codes == [0, 0], ended.said
    assert "model:" in ended.said[0] and ended.said[1] == ""
    return run


@pytest.mark.parametrize("phase", ["sampling", "reward", "update", "evaluation", "compiled reward", "saving"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all(
    rank: int, phase: str, server: Server, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    if phase == "saving" and rank == 1:
        pytest.skip("only the first process saves")
    run = tmp_path / "run"
    # The process that is signalled is not the slow one, but where compiled code could not hear of it from another.
    other = rank if phase == "compiled reward" else 1 - rank
    ended = server.train(recipe, run, phase, (0.3, signal.SIGTERM, other), count=2, rank=rank)
    assert ended.reached and ended.codes == [143, 143], ended.said
    assert max(ended.seconds) < LIMIT
    assert len(list_checkpoints(run / "checkpoints")) == 1
    assert ended.said[0].count("interrupted: saved") == 1
    server.finish(run, count=2)
    assert_same_run(run, whole)


def test_a_signal_to_all_processes(server: Server, recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    signals = (0.3, signal.SIGINT, 0), (0.0, signal.SIGINT, 1)
    ended = server.train(recipe, run, "update", *signals, count=2, rank=1)
    assert ended.reached and ended.codes == [130, 130], ended.said
    assert max(ended.seconds) < LIMIT
    server.finish(run, count=2)
    assert_same_run(run, whole)


@pytest.mark.parametrize("phase", ["loading", "pre-flight"])
def test_a_signal_before_training(phase: str, server: Server, recipe: Path, tmp_path: Path) -> None:
    ended = server.train(recipe, tmp_path / "run", phase, (0.3, signal.SIGTERM, 1), count=2, rank=1)
    assert ended.reached and ended.codes == [143, 143], ended.said
    assert max(ended.seconds) < LIMIT
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("phase", "text", "code"),
    [
        ("failing load", "error: process 1: there is no such model", 2),
        ("failing reward", "error: process 1: reward 'early': the judge is not there", 2),
        ("failing update", "error: process 1: out of memory: not even the smallest part of the work fits", 2),
        ("failing evaluation", "error: ArithmeticError: process 1: no", 1),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_message(
    phase: str, text: str, code: int, server: Server, recipe: Path, tmp_path: Path
) -> None:
    ended = server.train(recipe, tmp_path / "run", phase, count=2, rank=1)
    assert ended.reached and ended.codes == [code, code], ended.said
    assert max(ended.seconds) < LIMIT
    assert ended.said[0].count(text) == 1
    assert "error" not in ended.said[1]


def test_an_error_of_the_first_process_where_it_alone_is_at_work(server: Server, recipe: Path, tmp_path: Path) -> None:
    ended = server.train(recipe, tmp_path / "run", "failing log", count=2, rank=0)
    assert ended.reached and ended.codes == [2, 2], ended.said
    assert max(ended.seconds) < LIMIT
    assert ended.said[0].count("the disk is full") == 1


@pytest.mark.parametrize("phase", ["sampling", "update"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others(
    rank: int, phase: str, server: Server, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = server.train(recipe, run, phase, (0.3, signal.SIGKILL, rank), count=2, rank=rank)
    assert ended.reached and ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] == 1, ended.said
    assert max(ended.seconds) < LIMIT
    assert "process" in ended.said[1 - rank] and "died" in ended.said[1 - rank]
    if rank == 1:  # what the first process held is saved
        assert len(list_checkpoints(run / "checkpoints")) == 1
        server.finish(run, count=2)
        assert_same_run(run, whole)


def test_a_process_that_dies_while_the_other_is_busy(server: Server, recipe: Path, tmp_path: Path) -> None:
    """The other is not waiting for it, and will not for a minute."""
    ended = server.train(recipe, tmp_path / "run", "update", (0.3, signal.SIGKILL, 1), count=2, rank=0)
    assert ended.reached and ended.codes == [1, -signal.SIGKILL], ended.said
    assert max(ended.seconds) < LIMIT
    assert "process 1 of this run has died" in ended.said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_that_share_sharded_weights(
    rank: int, server: Server, recipe: Path, tmp_path: Path
) -> None:
    """The others wait inside a collective of a pass."""
    ended = server.train(recipe, tmp_path / "run", "failing update", count=2, rank=rank, settings=LAUNCHED)
    assert ended.reached and ended.codes == [2, 2], ended.said
    assert max(ended.seconds) < LIMIT
    assert "tried to allocate 2 GB" in ended.said[0] and "Weights are sharded" in ended.said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_that_share_its_weights(
    rank: int, server: Server, recipe: Path, tmp_path: Path
) -> None:
    """Nothing is saved: a part of every weight is lost. A signal that a launcher then sends changes nothing."""
    run = tmp_path / "run"
    signals = (0.3, signal.SIGKILL, rank), (1.0, signal.SIGTERM, 1 - rank)
    for count in (1, 2):
        ended = server.train(recipe, run, "update", *signals[:count], count=2, rank=rank, settings=LAUNCHED)
        assert ended.reached and ended.codes[rank] == -signal.SIGKILL, ended.said
        assert ended.codes[1 - rank] == 1, ended.said
        assert max(ended.seconds) < LIMIT
        assert "process" in ended.said[1 - rank] and "died" in ended.said[1 - rank]
        assert list_checkpoints(run / "checkpoints") == []
        shutil.rmtree(run)
