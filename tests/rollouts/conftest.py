"""Tokenizers of the three kinds that matter to text: characters, pieces with a leading space, and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tiny_models import tiny_tokenizer
from tropism.models.policy import Policy


@pytest.fixture(scope="session")
def characters() -> Any:
    """One token per character."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def byte_tokens() -> Any:
    """One token per byte of UTF-8, as GPT-2's tokenizer falls back to; eos is 256."""
    ids = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(ids, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="session")
def pieces(stories: Path) -> Any:
    """Pieces that carry their leading space, which decoding drops at the start of a text; with byte fallback."""
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="session")
def stories_policy(stories: Path) -> Policy:
    return Policy(AutoModelForCausalLM.from_pretrained(stories).eval())
