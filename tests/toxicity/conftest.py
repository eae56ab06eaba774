"""A tiny model with its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model() -> tuple[Any, Any]:
    """With room for 64 tokens."""
    return tiny_model("llama", max_position_embeddings=64), tiny_tokenizer(chat=True)
