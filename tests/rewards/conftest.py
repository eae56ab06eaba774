"""Completions to reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tropism.types import RewardInputs


@pytest.fixture
def make_inputs() -> Callable[..., RewardInputs]:
    """Reward inputs of some completions; each has as many tokens as words unless ``ids`` are given."""

    def make(
        completions: list[Any], ids: list[list[int]] | None = None, step: int = 3, **columns: list[Any]
    ) -> RewardInputs:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return RewardInputs(
            prompts=[f"prompt {row}" for row in range(len(completions))],
            completions=completions,
            completion_ids=[list(range(len(text.split()))) for text in texts] if ids is None else ids,
            finish_reasons=["eos"] * len(completions),
            columns=columns,
            trainer_state={"step": step, "total_steps": 10},
        )

    return make
