"""Demonstrations: texts to imitate, as a prompt that is read and a completion that is learned.

Token ids are those of TRL's ``SFTTrainer`` for the same records: the joint text is encoded in one piece, and the
completion begins where it departs from the encoded prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tropism.data.columns import as_chat, choose_column, end_of_words, prompt_value, text_or_messages
from tropism.data.config import DataConfig
from tropism.data.encoding import (
    encode_bare,
    encode_chat,
    encode_completion,
    encode_text,
    eos_id,
    render_chat,
    room_behind,
)
from tropism.data.preparation import Preparer, preparer_of
from tropism.data.readers import Record, locate_records
from tropism.errors import DataError
from tropism.texts import decoder_prefix_of
from tropism.types import DemonstrationBatch, Messages, pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FINISH_REASON = "finish_reason"
"""The column in which ``tropism score --model`` writes how a completion ended; ``length`` means that it was cut."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One text to imitate. ``[bos] Good film [eos]`` with the prompt "Good" is ``(bos, Good)`` and ``(film, eos)``."""

    prompt_ids: tuple[int, ...]
    """Token ids that are read only; never empty."""
    completion_ids: tuple[int, ...]
    """Token ids that follow; never empty."""
    loss_mask: tuple[bool, ...]
    """Which completion tokens are learned; as long as ``completion_ids``."""


def make_demonstrations(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    max_length: int | None,
    completion_only: bool = True,
) -> list[Demonstration]:
    """Demonstrations from texts, prompts with completions, or chats that end with the assistant's answer.

    Plain text is learned from its first token on, after the BOS if there is one; with ``first_words`` from the word
    after those. Of a chat the last answer is learned. One eos ends every plain text, unless the column
    ``finish_reason`` says ``length``; the chat template ends chats.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        tokenizer: of the model.
        config: how records become text; default: ``source`` itself, if it is a ``DataConfig``.
        max_length: most tokens; what is longer loses its end (and has no eos then), and is left out where nothing to
            learn remains. None: any length. Of an encoder-decoder most tokens of the prompt, and of the completion.
        completion_only: False learns the prompt as well, all but its first token; no encoder-decoder can.

    Raises:
        DataError: names the file and line or the record.
    """
    read = read_demonstrations(source, tokenizer, config, max_length=max_length, completion_only=completion_only)
    return [demonstration for _, demonstration in read]


def read_demonstrations(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    max_length: int | None,
    completion_only: bool = True,
) -> list[tuple[Record, Demonstration]]:
    """As ``make_demonstrations``, each with the record that it was made of."""
    demonstrations: list[tuple[Record, Demonstration]] = []
    for text in encoded_texts(source, tokenizer, config, max_length=max_length, completion_only=completion_only):
        completion = text.ids[text.start :]
        mask = (True,) * len(completion)
        made = Demonstration(prompt_ids=text.ids[: text.start], completion_ids=completion, loss_mask=mask)
        demonstrations.append((text.record, made))
    return demonstrations


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """The token ids of one record."""

    record: Record
    ids: tuple[int, ...]
    """Prompt and completion; what was too long has lost its end."""
    start: int
    """Where the completion begins."""


def encoded_texts(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    max_length: int | None,
    completion_only: bool = True,
    shortest_prompt: int = 1,
    called: str = "demonstrations",
) -> Iterator[EncodedText]:
    """Records of prompts and completions, one by one; what was left out is told after the last.

    Args:
        source, tokenizer, config, max_length, completion_only: as of ``make_demonstrations``.
        shortest_prompt: so many tokens at least are read only, even where they belong to the completion.
        called: what the items are called in messages.

    Raises:
        DataError: names the file and line or the record, or says why none is left.
    """
    if config is None and isinstance(source, DataConfig):
        config = source
    records = locate_records(source)
    layout = layout_of(records, config)
    if decoder_prefix_of(tokenizer) is not None:
        _check_apart(layout, config, completion_only)
    preparer = preparer_of(tokenizer, config.prepare if config else None)
    made = too_short = too_long = merged = endless = 0
    for record in records:
        if config is not None and made == config.limit:
            break
        texts = texts_of(record, layout, config)
        if texts is None:
            too_short += 1
            continue
        encoded = _encode(tokenizer, preparer, *texts, where=record.where, shortest_prompt=shortest_prompt)
        if encoded is None:
            continue
        ids, start, clean = encoded
        merged += not clean
        endless += tokenizer.eos_token_id not in ids[start:]
        ids = _as_cut(ids, start, record, tokenizer.eos_token_id)
        start = start if completion_only else shortest_prompt
        room = room_behind(tokenizer, start, max_length)
        if room == 0:
            too_long += 1
            continue
        made += 1
        yield EncodedText(record=record, ids=tuple(ids if room is None else ids[: start + room]), start=start)
    _report(called, too_short=too_short, too_long=too_long, merged=merged, endless=endless)
    if preparer is not None:
        preparer.report()
    if not made:
        few = f"{too_short} have too few words for first_words" if preparer is None else preparer.reasons()
        raise DataError(
            f"none of the {len(records)} records is left: {few + ', ' if few else ''}the prompts of {too_long} fill"
            f" max_length ({max_length}) alone"
        )


def _check_apart(layout: Layout, config: DataConfig | None, completion_only: bool) -> None:
    """Refuses texts of which an encoder-decoder cannot learn.

    Raises:
        DataError: they have no prompt, or the prompt is to be learned.
    """
    if not completion_only:
        raise DataError(
            "completion_only: false learns the prompt as well, but of an encoder-decoder the prompt goes to the"
            " encoder, which predicts no tokens; leave completion_only out"
        )
    if layout.completion is None and (config is None or config.first_words is None):
        raise DataError(
            "the records are texts without a prompt of their own, and an encoder-decoder needs one for its encoder;"
            " give prompt and completion (or name them in prompt_column and completion_column), or set first_words"
        )


def _as_cut(ids: list[int], start: int, record: Record, eos: Any) -> list[int]:
    """A completion that was cut while it was sampled did not end there, so no eos follows it."""
    return without_end(ids, start, eos) if record.columns.get(FINISH_REASON) == "length" else ids


def without_end(ids: list[int], start: int, eos: Any) -> list[int]:
    """Ids of a text whose completion begins at ``start`` and was cut, without the eos that was put behind it."""
    return ids[:-1] if len(ids) > start + 1 and ids[-1] == eos else ids


def _report(called: str, *, too_short: int, too_long: int, merged: int, endless: int) -> None:
    if too_short:
        logger.info("skipped %d texts with too few words for first_words", too_short)
    if too_long:
        logger.warning("left out %d %s whose prompt alone fills max_length", too_long, called)
    if merged:
        logger.warning(
            "in %d %s the prompt's last token merges with the completion's first, so the completion begins one token"
            " earlier than at sampling; end prompts at a word and begin completions with the space",
            merged,
            called,
        )
    if endless:
        logger.warning(
            "the chat template ends %d answers without the tokenizer's eos, so the model does not learn to stop there",
            endless,
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns hold prompt and completion, or (text or messages, None). Prompt is None with a template."""

    prompt: str | None
    completion: str | None


def layout_of(records: Sequence[Record], config: DataConfig | None) -> Layout:
    """Which columns to read.

    Raises:
        DataError: none of them is called as a prompt is, ``first_words`` beside completions, or ``prepare`` without.
    """
    completion = config.completion_column if config else None
    if completion is None and any("completion" in record.columns for record in records):
        completion = "completion"
    if completion is None and config is not None and config.prepare is not None:
        raise DataError(
            "prepare is for prompts, but the records are texts without a prompt of their own; name the column of their"
            " completions in completion_column, or leave prepare out"
        )
    if config is not None and config.template is not None:
        return Layout(prompt=None, completion=completion)
    prompt = config.prompt_column if config else None
    if prompt is None:
        preferred = ("messages", "text") if completion is None else ("prompt", "messages", "text")
        prompt = choose_column(records, preferred, but=completion)
    if completion is not None and config is not None and config.first_words is not None:
        raise DataError("first_words parts plain texts, but the records have completions of their own; leave it out")
    return Layout(prompt=prompt, completion=completion)


def texts_of(
    record: Record, layout: Layout, config: DataConfig | None
) -> tuple[str, str] | tuple[Messages, Messages] | None:
    """Prompt and completion, as text or as messages; None where ``first_words`` leaves nothing to learn."""
    prompt = prompt_value(record, layout.prompt, config)
    if layout.completion is not None:
        completion = text_or_messages(record, layout.completion)
        prompt = as_chat(prompt, config)
        if isinstance(prompt, str):
            if isinstance(completion, str):
                return prompt, completion
            raise DataError(f"{record.where}: the prompt is text but the completion is messages; set chat: true")
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return prompt, completion
    if isinstance(prompt, str):
        if config is not None and config.chat:
            raise DataError(f"{record.where}: chat needs the answer as well; name its column in completion_column")
        return _parted(prompt, config)
    if prompt[-1]["role"] != "assistant" or len(prompt) < 2:
        raise DataError(f"{record.where}: the chat must end with an assistant message after at least one other")
    chat = as_chat(prompt[:-1], config)
    assert not isinstance(chat, str)
    return chat, prompt[-1:]


def _parted(text: str, config: DataConfig | None) -> tuple[str, str] | None:
    as_chat(text, config)  # refuses a system prompt for plain text
    if config is None or config.first_words is None:
        return "", text
    end = end_of_words(text, config.first_words)
    if end is None or not text[end:].strip():
        return None
    return text[:end], text[end:]


def encode_parts(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    completion: str | Messages,
    *,
    where: str,
    shortest_prompt: int,
) -> tuple[list[int], int, bool]:
    """Ids of the whole, where the completion begins, and whether it begins where the prompt's ids end."""
    if decoder_prefix_of(tokenizer) is not None and isinstance(prompt, str) and isinstance(completion, str):
        if not prompt:
            raise DataError(f"{where}: the prompt is empty, and an encoder-decoder needs one for its encoder")
        prompt_ids = encode_text(tokenizer, prompt)
        return [*prompt_ids, *encode_completion(tokenizer, completion)], len(prompt_ids), True
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = _ended(tokenizer, encode_text(tokenizer, prompt + completion), completion)
        prompt_ids = encode_text(tokenizer, prompt)
    else:
        assert isinstance(prompt, list) and isinstance(completion, list)
        ids = encode_chat(tokenizer, prompt + completion, where=where, add_generation_prompt=False)
        prompt_ids = encode_chat(tokenizer, prompt, where=where, add_generation_prompt=True)
    common = _common_length(prompt_ids, ids)
    clean = common == len(prompt_ids)
    if not clean and isinstance(prompt, list) and isinstance(completion, list):
        _check_prefix(tokenizer, prompt, prompt + completion, where)
    start = max(common, shortest_prompt)
    if len(ids) <= start:
        raise DataError(f"{where}: there is nothing to learn; the completion is empty")
    return ids, start, clean


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    preparer: Preparer | None,
    prompt: str | Messages,
    completion: str | Messages,
    *,
    where: str,
    shortest_prompt: int,
) -> tuple[list[int], int, bool] | None:
    """As ``encode_parts``; the ids of a prepared prompt are those that samples begin with. None: it is skipped."""
    if preparer is None:
        return encode_parts(tokenizer, prompt, completion, where=where, shortest_prompt=shortest_prompt)
    prepared = preparer(prompt, where)
    if prepared is None:
        return None
    assert isinstance(completion, str)  # since the prompt is text
    if decoder_prefix_of(tokenizer) is not None:
        return [*prepared.ids, *encode_completion(tokenizer, completion)], len(prepared.ids), True
    ids = _ended(tokenizer, [*prepared.ids, *encode_bare(tokenizer, completion)], completion)
    return ids, len(prepared.ids), True


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], completion: str) -> list[int]:
    """The ids with one eos at their end."""
    eos = eos_id(tokenizer)
    # A completion that spells the eos out has it already; the last id alone does not say so where bos == eos.
    spelled = completion.endswith(str(tokenizer.eos_token)) and ids[-1:] == [eos]
    return ids if spelled else [*ids, eos]


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences share at their beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _check_prefix(tokenizer: PreTrainedTokenizerBase, prompt: Messages, whole: Messages, where: str) -> None:
    """Refuses a template whose text of the prompt alone is not how its text of the whole chat begins."""
    opening = render_chat(tokenizer, prompt, where=where, add_generation_prompt=True)
    text = render_chat(tokenizer, whole, where=where, add_generation_prompt=False)
    if not text.startswith(opening):
        rest = opening[_common_length(opening, text) :]
        raise DataError(
            f"{where}: the chat template ends the prompt alone with {rest[:60]!r}, which the chat with its"
            " answer does not have there, so what is learned would differ from what is sampled; use a template without"
            " that difference, or give prompt and completion as text"
        )


def collate_demonstrations(items: Sequence[Demonstration]) -> DemonstrationBatch:
    """A batch of demonstrations: prompts padded on the left, completions on the right; ``[B, P]`` and ``[B, T]``."""
    if not items:
        raise ValueError("no demonstrations to collate")
    return DemonstrationBatch(
        prompt_ids=pad_rows([item.prompt_ids for item in items], left=True),
        prompt_lengths=torch.tensor([len(item.prompt_ids) for item in items]),
        completion_ids=pad_rows([item.completion_ids for item in items]),
        completion_lengths=torch.tensor([len(item.completion_ids) for item in items]),
        loss_mask=pad_rows([item.loss_mask for item in items], value=False, dtype=torch.bool),
    )
