"""YAML files that have no end, or that unfold without one, are refused at once."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from fuzz_budget import within
from tropism.errors import ConfigError
from tropism.safe_yaml import read_yaml


def test_pipes_and_devices_are_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    for path in (tmp_path / "recipe.yaml", "/dev/zero"):
        with within(20), pytest.raises(ConfigError, match="a device or pipe, not a regular file; save the recipe"):
            read_yaml(path)


def test_shared_anchors_that_would_unfold_to_billions_are_refused_at_once(tmp_path: Path) -> None:
    laughs = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in pairwise("abcdefghij"))
    path = tmp_path / "recipe.yaml"
    path.write_text(laughs)
    with within(20), pytest.raises(ConfigError, match=r"recipe\.yaml:2: aliases \(\*name\) are not supported"):
        read_yaml(path)
