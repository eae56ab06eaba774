"""Keeping the libraries below quiet, so that a command shows its own messages only."""

from __future__ import annotations


def quieten_libraries() -> None:
    """No progress bars while weights load, no advice of transformers, no announcements of what will be deprecated."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
