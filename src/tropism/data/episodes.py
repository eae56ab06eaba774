"""Episodes: texts of one or several turns, and the rewards of a whole text, of each turn, or of each token."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tropism.data.columns import as_chat, prompt_value, value_of
from tropism.data.config import DataConfig
from tropism.data.demonstrations import FINISH_REASON, encoded_texts, layout_of
from tropism.data.encoding import encode_bare, encode_completion, encode_text, eos_id, render_chat, room_behind
from tropism.data.files import shown
from tropism.data.judged_values import refuse_wrong
from tropism.data.readers import Record, locate_records
from tropism.data.scored import finite_reward, value_of_target
from tropism.episodes import Episode
from tropism.errors import DataError
from tropism.texts import decoder_prefix_of
from tropism.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TURNS = "turns"
"""The column with prompts and outputs in turn."""
LEAST_SPREAD = 1e-6
"""Deviation of the returns, as a share of the largest, below which they count as equal: float32 resolves no less."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of an episode."""

    ids: tuple[int, ...]
    output: bool
    """Whether it is an output, whose tokens are actions; otherwise it is read only."""


def read_episodes(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    target: str,
    max_length: int | None,
) -> list[tuple[Record, Episode]]:
    """Episodes, each with the record that it was made of.

    A record is a plain text, a prompt with a completion, ``turns`` (prompt, output, prompt, output, ...) or a chat, in
    which every answer of the assistant is an output. One eos ends the last output, unless the column ``finish_reason``
    says ``length``; the chat template ends chats.

    The rewards are one number, which is paid at the last action; in records of turns or chats a list of one per output,
    paid at its last token, or one list per output of one per token; in all others a list of one per token. The list of
    the last output may leave its eos out.

    Args:
        source: ``DataConfig`` or anything else that ``read_records`` takes.
        tokenizer: of the model.
        config: how records become text; default: ``source`` itself, if it is a ``DataConfig``.
        target: the column with the rewards; ``a.b`` reaches into nested records.
        max_length: most tokens; what is longer loses its end, whose rewards are then paid at the last action that is
            left. An episode whose first prompt alone fills it is left out and counted. None: any length.

    Raises:
        DataError: every wrong record with its place and reason.
    """
    if config is None and isinstance(source, DataConfig):
        config = source
    records = locate_records(source)
    by_turn = has_turns(records, config)
    segmented: Iterable[tuple[Record, list[Segment] | DataError]]
    segmented = _by_turns(records, tokenizer, config) if by_turn else _by_texts(records, tokenizer, config)
    episodes: list[tuple[Record, Episode]] = []
    wrong: list[str] = []
    cut = left_out = 0
    for record, segments in segmented:
        if config is not None and len(episodes) == config.limit:
            break
        try:
            if isinstance(segments, DataError):
                raise segments
            rewards = _rewards(record, target, segments, by_turn=by_turn)
        except DataError as error:
            wrong.append(str(error))
            continue
        episode, lost = _episode(segments, rewards, room_behind(tokenizer, len(segments[0].ids), max_length))
        cut, left_out = cut + (lost and episode is not None), left_out + (episode is None)
        if episode is not None:
            episodes.append((record, episode))
    refuse_wrong(wrong, len(records))
    _report(cut=cut, left_out=left_out)
    if not episodes:
        raise DataError(f"none of the {len(records)} episodes is left: their prompts fill max_length ({max_length})")
    return episodes


def _report(*, cut: int, left_out: int) -> None:
    if left_out:
        logger.warning("left out %d episodes whose first prompt alone fills max_length", left_out)
    if cut:
        logger.warning("%d episodes were cut to max_length; rewards of what was cut are paid at their last token", cut)


# Records --------------------------------------------------------------------------------------------------------------


def has_turns(records: Sequence[Record], config: DataConfig | None) -> bool:
    """Whether records hold outputs in turn: a column ``turns``, or chats without a completion of their own.

    Raises:
        DataError: some records have turns and others not, or settings that are for other records.
    """
    having = [TURNS in record.columns for record in records]
    if any(having):
        if not all(having):
            raise DataError(f"{records[having.index(False)].where}: there is no column 'turns', as other records have")
        names = ("prompt_column", "completion_column", "template", "first_words", "system_prompt", "prepare")
        given = [name for name in names if config is not None and getattr(config, name) is not None]
        if given or (config is not None and config.chat):
            raise DataError(f"{given[0] if given else 'chat'} is not for records with turns; leave it out")
        return True
    layout = layout_of(records, config)
    if layout.completion is not None or layout.prompt is None:
        return False
    values = [prompt_value(record, layout.prompt, config) for record in records[:1]]
    return not isinstance(values[0], str)


def first_turns(records: Sequence[Record], config: DataConfig | None) -> tuple[list[Record], DataConfig | None]:
    """Records of several turns as their first prompt and its answer, and how to read them; others as they are.

    Raises:
        DataError: as of ``read_episodes``.
    """
    if not has_turns(records, config):
        return list(records), config
    layout = None if TURNS in records[0].columns else layout_of(records, config)
    name = TURNS if layout is None else str(layout.prompt)
    parted = []
    for record in records:
        columns = {key: value for key, value in record.columns.items() if key not in (name, "prompt", "completion")}
        prompt: str | Messages
        if layout is None:
            prompt, completion = _turns_of(record)[:2]
        else:
            chat = _chat_of(record, name, config)
            end = next((i for i, message in enumerate(chat) if message["role"] == "assistant"), len(chat))
            prompt, completion = chat[:end], str(chat[end].get("content")) if end < len(chat) else ""
        parted.append(replace(record, columns={"prompt": prompt, "completion": completion, **columns}))
    if config is not None:
        config = replace(config, prompt_column="prompt", completion_column="completion", system_prompt=None, chat=False)
    return parted, config


def _turns_of(record: Record) -> list[str]:
    turns = value_of(record, TURNS)
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{record.where}: turns is {shown(turns)}, not a list of texts: prompt, output, prompt, output")
    if len(turns) < 2 or len(turns) % 2:
        raise DataError(
            f"{record.where}: turns has {len(turns)} texts; prompts and outputs take turns, so their number is even"
        )
    return list(turns)


def _chat_of(record: Record, column: str, config: DataConfig | None) -> Messages:
    value = prompt_value(record, column, config)
    if isinstance(value, str):
        raise DataError(f"{record.where}: the column {column!r} is text, but other records have chats there")
    chat = as_chat(value, config)
    assert not isinstance(chat, str)
    return chat


# Ids ------------------------------------------------------------------------------------------------------------------


def _by_texts(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig | None
) -> Iterator[tuple[Record, list[Segment]]]:
    """Texts with one output, of the ids that demonstrations have."""
    for text in encoded_texts(records, tokenizer, config, max_length=None, called="episodes"):
        output = text.ids[text.start :]
        if _was_cut(text.record) and len(output) > 1 and output[-1] == tokenizer.eos_token_id:
            output = output[:-1]
        yield text.record, [Segment(ids=text.ids[: text.start], output=False), Segment(ids=output, output=True)]


def _was_cut(record: Record) -> bool:
    return record.columns.get(FINISH_REASON) == "length"


def _by_turns(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig | None
) -> Iterator[tuple[Record, list[Segment] | DataError]]:
    """Records of several outputs; with a wrong one what is wrong with it."""
    column = None if TURNS in records[0].columns else str(layout_of(records, config).prompt)
    for record in records:
        found: list[Segment] | DataError
        try:
            if column is None:
                found = _segments_of_turns(record, tokenizer)
            else:
                found = _segments_of_chat(record, _chat_of(record, column, config), tokenizer)
        except DataError as error:
            found = error
        yield record, found


def _segments_of_turns(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Every turn encoded by itself, as the model reads it when it answers."""
    turns = _turns_of(record)
    if decoder_prefix_of(tokenizer) is not None:
        return _segments_of_halves(record, turns, tokenizer)
    first = encode_text(tokenizer, turns[0])
    if not first and tokenizer.bos_token_id is None:
        raise DataError(f"{record.where}: the first prompt is empty, and the tokenizer has no BOS to begin with")
    segments = [Segment(ids=tuple(first or [tokenizer.bos_token_id]), output=False)]
    for index, turn in enumerate(turns[1:], start=1):
        ids = encode_bare(tokenizer, turn)
        if index == len(turns) - 1 and not _was_cut(record) and ids[-1:] != [eos_id(tokenizer)]:
            ids.append(eos_id(tokenizer))
        if not ids and index % 2:
            raise DataError(f"{record.where}: output {index // 2} of turns is empty, so that there is nothing to learn")
        segments.append(Segment(ids=tuple(ids), output=index % 2 == 1))
    return segments


def _segments_of_halves(record: Record, turns: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The one prompt that an encoder reads, and the one output that its decoder writes."""
    if len(turns) > 2:
        raise DataError(
            f"{record.where}: turns has {len(turns)} texts, and an encoder-decoder reads one prompt and writes one"
            " output; part the record, or use a causal model"
        )
    output = encode_completion(tokenizer, turns[1])
    if _was_cut(record) and len(output) > 1:
        output = output[:-1]
    prompt = encode_text(tokenizer, turns[0])
    if not prompt or not turns[0]:
        raise DataError(f"{record.where}: the prompt is empty, and an encoder-decoder needs one for its encoder")
    return [Segment(ids=tuple(prompt), output=False), Segment(ids=tuple(output), output=True)]


def _segments_of_chat(record: Record, chat: Messages, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Every answer up to its eos is an output; what the chat template writes behind that is read only."""
    if chat[-1]["role"] != "assistant" or chat[0]["role"] == "assistant":
        raise DataError(f"{record.where}: a chat must end with the assistant's answer, and begin with something else")
    segments: list[Segment] = []
    written = ""
    for index in (i for i, message in enumerate(chat) if message["role"] == "assistant"):
        opening = render_chat(tokenizer, chat[:index], where=record.where, add_generation_prompt=True)
        whole = render_chat(tokenizer, chat[: index + 1], where=record.where, add_generation_prompt=False)
        if not (opening.startswith(written) and whole.startswith(opening)):
            raise DataError(
                f"{record.where}: the chat template writes the messages before answer {index} otherwise once the "
                "answer follows, so what is learned would differ from what is sampled; use a template without that "
                "difference, or give the turns as text"
            )
        answer = encode_bare(tokenizer, whole[len(opening) :])
        eos = tokenizer.eos_token_id
        end = len(answer) - answer[::-1].index(eos) if eos in answer else len(answer)
        if not end:
            raise DataError(f"{record.where}: message {index} of the assistant is empty, so there is nothing to learn")
        segments.append(Segment(ids=tuple(encode_bare(tokenizer, opening[len(written) :])), output=False))
        segments.append(Segment(ids=tuple(answer[:end]), output=True))
        if answer[end:]:
            segments.append(Segment(ids=tuple(answer[end:]), output=False))
        written = whole
    return segments


# Rewards --------------------------------------------------------------------------------------------------------------


def _rewards(record: Record, target: str, segments: Sequence[Segment], *, by_turn: bool) -> list[list[float]]:
    """Of every token of each output."""
    value = value_of_target(record, target, setting="target")
    where = f"{record.where}: the column {target!r}"
    lengths = [len(segment.ids) for segment in segments if segment.output]
    rewards = [[0.0] * length for length in lengths]
    if not isinstance(value, list | tuple):
        rewards[-1][-1] = finite_reward(value, where)
        return rewards
    if not by_turn:
        return [_of_tokens(value, lengths[0], where, last=True)]
    if len(value) != len(lengths):
        raise DataError(f"{where} has {len(value)} rewards, and the text has {len(lengths)} outputs; give one for each")
    for index, (one, length) in enumerate(zip(value, lengths, strict=True)):
        place = f"{where}, output {index}"
        if isinstance(one, list | tuple):
            rewards[index] = _of_tokens(one, length, place, last=index == len(lengths) - 1)
        else:
            rewards[index][-1] = finite_reward(one, place)
    return rewards


def _of_tokens(values: Sequence[Any], length: int, where: str, *, last: bool) -> list[float]:
    """One per token; of the last output the eos may be left out."""
    numbers = [finite_reward(value, f"{where}, token {index}") for index, value in enumerate(values)]
    if last and len(numbers) == length - 1:
        numbers.append(0.0)
    if len(numbers) != length:
        without = f" (or {length - 1}, without its eos)" if last else ""
        raise DataError(
            f"{where} has {len(numbers)} rewards for an output of {length} tokens{without}; give one for each"
        )
    return numbers


def _episode(
    segments: Sequence[Segment], rewards: Sequence[Sequence[float]], most: int | None
) -> tuple[Episode | None, bool]:
    """The segments as one row, None where no action is left; and whether actions were cut off.

    Args:
        most: tokens behind the first prompt; None: any number.
    """
    prompt, *rest = segments
    ids = [token for segment in rest for token in segment.ids]
    mask = [segment.output for segment in rest for _ in segment.ids]
    of_outputs = iter(rewards)
    paid = [reward for s in rest for reward in (next(of_outputs) if s.output else [0.0] * len(s.ids))]
    room = len(ids) if most is None else min(len(ids), most)
    actions = [place for place in range(room) if mask[place]]
    if not actions:
        return None, True
    end = actions[-1] + 1
    paid[end - 1] += math.fsum(paid[end:])
    episode = Episode(
        prompt_ids=prompt.ids,
        completion_ids=tuple(ids[:end]),
        loss_mask=tuple(mask[:end]),
        rewards=tuple(paid[:end]),
    )
    return episode, any(mask[end:])


# Scale ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReturnScale:
    """Mean and deviation of the returns of training episodes."""

    mean: float
    std: float

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> ReturnScale:
        """That of these episodes; the deviation is the population's.

        Raises:
            DataError: their returns are all equal, up to rounding.
        """
        totals = [episode.total for episode in episodes]
        mean = math.fsum(totals) / len(totals)
        std = math.sqrt(math.fsum((total - mean) ** 2 for total in totals) / len(totals))
        if std <= LEAST_SPREAD * max(map(abs, totals)):
            raise DataError(
                f"all {len(totals)} episodes have the return {mean:g}, so there is nothing to tell apart: give "
                "episodes that differ in it, or, where their rewards differ from token to token, set "
                "normalise_returns to false"
            )
        return cls(mean=mean, std=std)

    def apply(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes with rewards over the deviation, and the mean taken off at the last action.

        So returns have mean 0 and deviation 1, however the rewards lie along the text.
        """
        return [self._scaled(episode) for episode in episodes]

    def _scaled(self, episode: Episode) -> Episode:
        rewards = [reward / self.std for reward in episode.rewards]
        rewards[-1] -= self.mean / self.std
        return replace(episode, rewards=tuple(rewards))
