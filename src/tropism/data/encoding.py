"""Text and chat messages to token ids, the same way for rollouts, training and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tropism.errors import DataError
from tropism.foreign.templates import render_chat_template
from tropism.texts import decoder_prefix_of
from tropism.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text: exactly one BOS if the tokenizer adds one, and nothing added behind it. May be empty.

    A BOS written out in the text is not doubled, and an EOS (or SEP) that the tokenizer appends is taken off: the model
    is to go on from here. What an encoder reads keeps every special token of the tokenizer.
    """
    if decoder_prefix_of(tokenizer) is not None:
        return list(tokenizer(text, verbose=False)["input_ids"])
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


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What an encoder-decoder's decoder is to write: the text as its tokenizer encodes targets, up to one eos.

    A token that generation forces at the beginning (``decoder_prefix_of``) is none of it.
    """
    ids = list(tokenizer(text_target=text, verbose=False)["input_ids"])
    forced = (decoder_prefix_of(tokenizer) or ())[1:]
    if forced and tuple(ids[:1]) == forced:
        ids = ids[1:]
    eos = eos_id(tokenizer)
    while eos in ids[:-1] and not _text_after(tokenizer, ids, eos):
        ids.pop()  # a second eos, or the language that mBART writes behind it
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos: int) -> bool:
    """Whether a token that is no special one follows the last eos but one."""
    end = len(ids) - 2 - ids[:-1][::-1].index(eos)
    return any(token not in tokenizer.all_special_ids for token in ids[end + 1 :])


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and behind a text that is read: the BOS, of an encoder also an EOS."""
    if decoder_prefix_of(tokenizer) is None:
        return encode_text(tokenizer, ""), []
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    begin = special.index(0)
    end = len(special) - special[::-1].index(0)
    return ids[:begin], ids[end:]


def room_behind(tokenizer: PreTrainedTokenizerBase, prompt: int, max_length: int | None) -> int | None:
    """Most tokens that may follow a prompt of so many; None: any number.

    Prompt and completion share ``max_length``, except where an encoder reads the one and a decoder the other, behind
    its prefix.
    """
    if max_length is None:
        return None
    prefix = decoder_prefix_of(tokenizer)
    if prefix is None:
        return max(0, max_length - prompt)
    return max(0, max_length - len(prefix)) if prompt <= max_length else 0


def room_for_prompt(
    tokenizer: PreTrainedTokenizerBase, context_length: int | None, *, new: int, taken: int = 0
) -> int | None:
    """Most tokens of a prompt beside a completion of ``new`` and ``taken`` further ones; None: any number.

    Where an encoder reads the prompt, the completion takes nothing of its context, but must fit into the decoder's.
    """
    if context_length is None:
        return None
    prefix = decoder_prefix_of(tokenizer)
    if prefix is None:
        return context_length - new - taken
    return context_length - taken if len(prefix) + new <= context_length else 0


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
    if decoder_prefix_of(tokenizer) is not None:
        raise DataError(
            f"{where}: chat messages, but the model is an encoder-decoder, which no chat template is for; give prompts"
            " and completions as plain text (see template, prompt_column and completion_column)"
        )
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
