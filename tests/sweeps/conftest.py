"""A recipe that names everything and loads nothing, and sweeps of runs that are not trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stub_sweeps import Runs, make_config
from tropism.sweeps.sweep import Sweep


@pytest.fixture
def base() -> dict[str, Any]:
    return {
        "model": "demo",
        "algorithm": {"name": "grpo", "group_size": 4},
        "data": "prompts.txt",
        "eval_data": "held.txt",
        "reward": "vader",
        "total_steps": 3,
        "seed": 10,
    }


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def sweep(base: dict[str, Any], runs: Runs, tmp_path: Path) -> Callable[..., Sweep]:
    """A sweep in ``tmp_path/sweep`` of runs that are not trained; keyword arguments change its settings."""

    def make(**settings: Any) -> Sweep:
        return Sweep(make_config(**settings), base, tmp_path / "sweep", execute=runs)

    return make
