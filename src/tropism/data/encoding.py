"""Text and chat messages to token ids, the same way for rollouts, training and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tropism.errors import DataError
from tropism.foreign.templates import render_chat_template
from tropism.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text: exactly one BOS if the tokenizer adds one, and nothing added behind it. May be empty.

    A BOS written out in the text is not doubled, and an EOS (or SEP) that the tokenizer appends is taken off: the model
    is to go on from here.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    added: list[int] = list(encoded["special_tokens_mask"])
    bos = tokenizer.bos_token_id
    if all(added):  # no token of the text itself
        return ids[:1] if ids and ids[0] == bos else []
    while added[-1]:
        ids.pop()
        added.pop()
    if bos is not None and ids[:2] == [bos, bos] and added[0] and not added[1]:
        return ids[1:]
    return ids


def encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that stands within others, without any that the tokenizer adds. May be empty."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, where: str, add_generation_prompt: bool
) -> list[int]:
    """Ids of a chat through the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        messages: at least one.
        where: names the record in errors.
        add_generation_prompt: end with the header of the assistant's answer.

    Raises:
        DataError: no chat template, or it refuses these messages.
    """
    text = render_chat(tokenizer, messages, where=where, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, where: str, add_generation_prompt: bool
) -> str:
    """The text that ``encode_chat`` encodes."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: chat messages, but the model's tokenizer has no chat template; use an instruction-tuned model,"
            " or give the prompts as plain text (see template and prompt_column)"
        )
    return render_chat_template(tokenizer, messages, where=where, add_generation_prompt=add_generation_prompt)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a completion."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the model's tokenizer has no eos token, so completions cannot end; set tokenizer.eos_token")
    return eos
