"""The tokens of a model with a meaning of their own, as ids."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tropism.errors import ModelError
from tropism.models.modules import base_model

logger = logging.getLogger("tropism")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own."""

    pad_id: int
    """Fills up rows; its value never matters, as masks come from lengths. eos or 0 where the tokenizer has none."""
    eos_ids: tuple[int, ...]
    """Every id that ends a completion; empty where the model has none."""
    bos_id: int | None = None
    """Starts a text, where the tokenizer declares one."""


def special_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Special tokens as tokenizer and generation config declare them; the embeddings are never resized for them.

    Raises:
        ModelError: the tokenizer or the generation config knows ids that the model has no embedding for.
    """
    embeddings: Any = base_model(model).get_input_embeddings()
    rows = embeddings.weight.shape[0]
    # Where ids have gaps, the highest says more than their number.
    ids_of_tokenizer = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if ids_of_tokenizer > rows:
        raise ModelError(
            f"the tokenizer has {ids_of_tokenizer} tokens but the model has embeddings for {rows} only; "
            "use the tokenizer that the model was trained with, or resize the model's embeddings and train them first"
        )
    eos: list[int] = []
    generation = getattr(base_model(model), "generation_config", None)
    for declared in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        ids = declared if isinstance(declared, list | tuple) else [declared]
        if not all(i is None or isinstance(i, int) for i in ids):
            raise ModelError(f"the model's eos_token_id is {declared!r:.80}, and not a whole number or a list of them")
        # Some configurations write -1 for none.
        eos.extend(int(i) for i in ids if i is not None and int(i) >= 0 and int(i) not in eos)
    if max(eos, default=0) >= rows:
        raise ModelError(
            f"the model's generation config names the eos token {max(eos)}, but there are embeddings for {rows} tokens "
            "only; correct eos_token_id in generation_config.json"
        )
    if not eos:
        logger.warning("the model declares no eos token: completions end by their length limit or a stop string only")
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    bos = tokenizer.bos_token_id
    return SpecialTokens(pad_id=int(pad), eos_ids=tuple(eos), bos_id=None if bos is None else int(bos))
