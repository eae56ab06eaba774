"""Prompts to sample completions of."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from tropism.data.columns import as_chat, choose_column, end_of_words, other_columns, prompt_value
from tropism.data.config import DataConfig
from tropism.data.encoding import encode_chat, encode_text
from tropism.data.preparation import Preparer, preparer_of
from tropism.data.readers import locate_records
from tropism.errors import DataError
from tropism.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "messages", "text")
"""Columns taken for the prompt, in order of preference, where the settings name none."""


def make_prompts(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    max_length: int | None = None,
    overlong: Literal["error", "truncate_left", "leave_out"] | None = None,
) -> list[Prompt]:
    """Prompts with their token ids; every column but the prompt's travels along for the reward.

    Text is encoded as the tokenizer does it, with exactly one BOS if it adds one and nothing appended; what an encoder
    reads has every special token of its tokenizer. Chat messages go through the chat template, up to the header of the
    assistant's answer. An empty text becomes the BOS alone. With ``config.prepare`` each text is prepared first, and
    those that it skips are counted.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        tokenizer: of the model.
        config: how records become prompts; default: ``source`` itself, if it is a ``DataConfig``.
        max_length: most tokens a prompt may have (the model's context less the tokens to be sampled).
        overlong: a longer prompt is an error, loses its left but for the BOS (``Prompt.text`` stays whole), or is left
            out, so that there may be none; None: as ``config`` says, else an error.

    Raises:
        DataError: names the file and line or the record.
    """
    if config is None and isinstance(source, DataConfig):
        config = source
    records = locate_records(source)
    words, overlong = (config.first_words, overlong or config.overlong) if config else (None, overlong or "error")
    preparer = preparer_of(tokenizer, config.prepare if config else None)
    column: str | None = None
    if config is None or config.template is None:
        column = (config.prompt_column if config else None) or choose_column(records, PROMPT_COLUMNS)
    prompts: list[Prompt] = []
    skipped = truncated = left_out = 0
    for record, columns in zip(records, other_columns(records, column), strict=True):
        if config is not None and len(prompts) == config.limit:
            break
        read = _read(prompt_value(record, column, config), tokenizer, config, preparer, record.where)
        if read is None:
            skipped += 1
            continue
        value, ids = read
        if max_length is not None and len(ids) > max_length:
            if overlong == "leave_out":
                left_out += 1
                continue
            truncated += 1
            ids = _shorten(ids, max_length, overlong, tokenizer.bos_token_id, record.where)
        prompts.append(Prompt(text=value, ids=tuple(ids), columns=columns))
    _report_skipped(preparer, skipped, words)
    if truncated:
        logger.warning("%d prompts were longer than %s tokens and lost their beginning", truncated, max_length)
    if not prompts and not left_out:
        why = f"has {words} words; lower first_words" if preparer is None else f"is left: {preparer.reasons()}"
        raise DataError(f"none of the {len(records)} texts {why}")
    return prompts


def _read(
    value: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None,
    preparer: Preparer | None,
    where: str,
) -> tuple[str | Messages, list[int]] | None:
    """The prompt as rewards see it and its ids; None where the settings skip it."""
    if preparer is not None:
        prepared = preparer(value, where)
        return None if prepared is None else (prepared.text, list(prepared.ids))
    if config is not None and config.first_words is not None:
        opening = _opening(value, config.first_words, where)
        if opening is None:
            return None
        value = opening
    value = as_chat(value, config)
    return value, _encode(tokenizer, value, where)


def _report_skipped(preparer: Preparer | None, skipped: int, words: int | None) -> None:
    if preparer is not None:
        preparer.report()
    elif skipped:
        logger.info("skipped %d texts of fewer than %s words", skipped, words)


def _opening(value: str | Messages, words: int, where: str) -> str | None:
    if not isinstance(value, str):
        raise DataError(f"{where}: first_words is for plain text, but the prompt is a list of chat messages")
    end = end_of_words(value, words)
    return None if end is None else value[:end]


def _encode(tokenizer: PreTrainedTokenizerBase, value: str | Messages, where: str) -> list[int]:
    if not isinstance(value, str):
        if value[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the chat ends with the assistant's answer, so there is nothing to complete; leave the last"
                " message out, or name another column in prompt_column"
            )
        return encode_chat(tokenizer, value, where=where, add_generation_prompt=True)
    ids = encode_text(tokenizer, value)
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise DataError(f"{where}: the prompt {value!r} is empty and the tokenizer has no BOS to begin with; remove it")
    return [tokenizer.bos_token_id]


def _shorten(ids: list[int], max_length: int, overlong: str, bos: int | None, where: str) -> list[int]:
    if overlong != "truncate_left":
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens, but at most {max_length} fit beside the completion; shorten"
            " it (data.prepare.length cuts its end), sample fewer tokens, or cut such prompts on the left"
            " (data.overlong: truncate_left)"
        )
    if max_length < 1:
        raise DataError(f"{where}: no prompt fits into {max_length} tokens; sample fewer tokens")
    if ids[0] == bos:
        return [ids[0], *ids[len(ids) - max_length + 1 :]]
    return ids[len(ids) - max_length :]
