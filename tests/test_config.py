"""The name of a run folder, which everything that a run writes goes by."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tropism.config import Recipe
from tropism.errors import ConfigError


def recipe(run: str | None) -> Recipe:
    return Recipe.from_mapping({"model": "demo", "algorithm": "sft", "data": "texts.txt", "run": run})


@pytest.mark.parametrize("name", [None, "runs/warm", "warm", "/somewhere/warm", "runs/Ünder Strich", "a.b", ".hidden"])
def test_plain_names_stay_as_they_are(name: str | None) -> None:
    assert recipe(name).run == name
    assert replace(recipe(name), seed=3).run == name


WRONG = {
    "empty": "",
    "blank": "  ",
    "NUL": "runs/a\0b",
    "line break": "runs/a\nb",
    "escape": "runs/\x1b[31mred",
    "lone surrogate": "runs/\ud800",
    "right to left override": "runs/\u202etxt.exe",
    "root": "/",
    "home": "~",
    "home spelled out": "{home}",
    "home by a detour": "{home}/runs/..",
    "above home": "{home}/..",
}


@pytest.mark.parametrize("kind", WRONG)
def test_names_that_are_no_run_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    with pytest.raises(ConfigError, match="run: ") as caught:
        recipe(WRONG[kind].replace("{home}", str(tmp_path / "users" / "me")))
    assert "give" in str(caught.value) and str(caught.value).isprintable()


def test_detours_are_resolved_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    for folder in (work, tmp_path / "other" / "below", tmp_path / "me"):
        folder.mkdir(parents=True)
    os.symlink(tmp_path / "other" / "below", work / "link")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for given, meant in (
        ("runs/../warm", "work/warm"),
        ("link/../warm", "other/warm"),
        ("~/warm", "me/warm"),
        (".", "work"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tropism"):
            assert recipe(given).run == str(tmp_path / meant)
        assert f"the run folder {given} is {tmp_path / meant}" in caplog.text


@pytest.mark.parametrize("keeping", [{"use_best": True}, {"patience": 2}])
def test_the_best_by_a_reward_needs_a_reward(keeping: dict[str, object]) -> None:
    recipe = {"model": "demo", "algorithm": "sft", "data": "texts.txt", "trainer": {"checkpoints": keeping}}
    with pytest.raises(ConfigError, match="best_metric is eval/reward, and there is no reward; set it to eval/loss"):
        Recipe.from_mapping(recipe)
    told = {**keeping, "best_metric": "eval/loss", "best_mode": "min"}
    Recipe.from_mapping({**recipe, "trainer": {"checkpoints": told}})
    Recipe.from_mapping({**recipe, "reward": "vader"})
