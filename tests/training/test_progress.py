from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from tropism.training.progress import Lines, Live, Quiet, show_progress

NUMBERS = {"reward/mean": 0.123456, "policy/sequence_kl": 1.5, "throughput/tokens_per_second": 812.4, "optim/lr": 1.0}


@pytest.mark.parametrize(("wanted", "main"), [(None, True), (False, True), (True, False), (False, False)])
def test_quiet_where_there_is_no_terminal(wanted: bool | None, main: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3, done=0, wanted=wanted, main=main) as display:
        assert isinstance(display, Quiet)
        display.stage("training")
        display.step(1, NUMBERS)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_warnings_are_said_even_then(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3, done=0, wanted=None, main=True) as display:
        display.say("something is wrong")
    assert capsys.readouterr().err == "something is wrong\n"


def test_ci_gets_no_bar_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_progress(3, done=0, wanted=None, main=True) as display:
        assert isinstance(display, Quiet)


def test_lines_where_they_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3, done=0, wanted=True, main=True) as display:
        assert isinstance(display, Lines)
        for step in (1, 2, 3):
            display.step(step, NUMBERS)
    lines = capsys.readouterr().err.splitlines()
    # The first and the last; the ones between come every ten seconds.
    assert lines == ["step 1/3  reward 0.123  KL 1.50  812 tok/s", "step 3/3  reward 0.123  KL 1.50  812 tok/s"]


def test_a_step_that_samples_nothing_has_no_speed() -> None:
    assert Live.text({"loss/nll": 2.0, "throughput/tokens_per_second": 0.0}) == "loss 2.000"


def test_the_bar_shows_reward_kl_and_speed() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(TextColumn("{task.fields[numbers]}"), console=console) as progress:
        live = Live(progress, progress.add_task("training", total=3, numbers=""))
        live.stage("evaluating")
        live.step(2, {"loss/nll": 2.0})
        live.say("look out")
        (task,) = progress.tasks
        assert (task.description, task.completed, task.fields["numbers"]) == ("evaluating", 2, "loss 2.000")
    assert "look out" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_slow_reward_has_a_bar_of_its_own_while_it_works() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(TextColumn("{task.fields[numbers]}"), console=console) as progress:
        live = Live(progress, progress.add_task("training", total=3, numbers=""))
        for done in (0, 3):
            live.scoring(done, 8)
            (_, task) = progress.tasks
            assert (task.description, task.completed, task.total) == ("scoring", done, 8)
        live.scoring(8, 8)
        assert [task.description for task in progress.tasks] == ["training"]
        live.scoring(1, 4)
        assert [task.total for task in progress.tasks] == [3, 4]


def test_without_a_bar_scoring_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3, done=0, wanted=True, main=True) as display:
        for done in range(9):
            display.scoring(done, 8)
    assert capsys.readouterr().err.splitlines() == ["scored 0/8"]
    with show_progress(3, done=0, wanted=None, main=True) as display:
        display.scoring(1, 8)
    assert capsys.readouterr().err == ""
