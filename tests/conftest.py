"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
# A shell that starts this in the background has SIGINT ignored, which children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the data folder ../shared is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real 260 k-parameter language model with its tokenizer (bos = eos = 1)."""
    return shared / "models" / "stories260k"


@pytest.fixture(autouse=True)
def _own_logging() -> None:
    """The command line sets the library's logger up for the terminal; every test finds it as after import."""
    logger = logging.getLogger("tropism")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
