"""The tokenizer of a model, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tropism.errors import ModelError
from tropism.foreign.pretrained import configuration, load_tokenizer
from tropism.foreign.view import model_view
from tropism.generation import model_path
from tropism.models.loading import DEMO, folder_or_hub_id, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run folder, a model folder, a hub id, a .gguf file or "demo".

    Raises:
        ModelError: there is none of this name.
    """
    path = model_path(name)
    if path == DEMO or path.endswith(".gguf"):  # it has no folder of its own
        return load_model(path).tokenizer
    source = folder_or_hub_id(path, Path(path))
    try:
        with model_view(source, revision=None, weights=False) as view:
            return load_tokenizer(view, configuration(view, source), source)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the tokenizer of {source} cannot be loaded: {reason.rstrip('.')}; name a model folder or hub id"
        ) from error
