"""What people said about texts, record by record: which columns say it, and the texts as text or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from tropism.data.columns import as_chat, prompt_value, text_or_messages, value_of
from tropism.data.config import DataConfig
from tropism.data.files import listed, shown
from tropism.data.judged_values import choice_in, is_tie, number_in
from tropism.data.label_files import is_label, label_kind
from tropism.data.readers import Record
from tropism.errors import ConfigError, DataError
from tropism.judgements import Kind
from tropism.texts import plain_text
from tropism.types import Messages

Texts = tuple[str | Messages, ...]
"""Completions of one prompt."""

OPTIONAL = ("prompt", "ratings", "margin", "annotator", "weight", "tie")
"""Columns that may be left out."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""How dialogues written as one text, such as those of Anthropic/hh-rlhf, begin each turn."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write judgements down."""

    name: str
    """For messages."""
    kind: Kind
    columns: tuple[tuple[str, ...], ...] = ()
    """The columns that make it, each with the other names it may have; none for label files."""

    def __str__(self) -> str:
        return f"{self.name} ({' and '.join(names[0] for names in self.columns) or 'token ids'})"


CHOICES = Format(name="choices", kind="choice", columns=(("completions", "samples"), ("choice", "best")))
PAIRS = Format(name="pairs", kind="choice", columns=(("chosen",), ("rejected",)))
RATINGS = Format(name="ratings", kind="rating", columns=(("completion",), ("rating",)))
DIFFERENCES = Format(name="differences", kind="difference", columns=(("completions", "samples"), ("difference",)))
FORMATS = (CHOICES, PAIRS, RATINGS, DIFFERENCES)
"""The formats that hold texts."""
DECISIVE = frozenset(name for form in FORMATS for names in form.columns for name in names)
"""All columns by which these are told apart."""
LABELS: dict[Kind, Format] = {
    "choice": Format(name="choice labels", kind="choice"),
    "rating": Format(name="rating labels", kind="rating"),
    "difference": Format(name="difference labels", kind="difference"),
}
"""The formats of label files, which hold token ids in place of texts."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one record says. Without a prompt the prompt is an empty text."""

    prompt: str | Messages
    completions: Texts
    choice: int | None = None
    target: float | None = None


def format_of(record: Record) -> Format:
    """The one format whose columns a record has.

    Raises:
        DataError: none, or several.
    """
    if is_label(record.columns):
        return LABELS[label_kind(record)]
    # A column that is null counts only where that leaves no format: tables fill up with nulls.
    filled = {name for name, value in record.columns.items() if value is not None}
    for there in (filled, set(record.columns)):
        found = [form for form in FORMATS if all(there.intersection(names) for names in form.columns)]
        if len(found) == 1:
            return found[0]
        if found:
            both = " as well as ".join(str(form) for form in found)
            raise DataError(f"{record.where}: it can be read as {both}; leave out the columns of all but one")
    raise DataError(
        f"{record.where}: no judgement in the columns {listed(record.columns)}{_nearest(record)}. There are"
        f" {', '.join(str(form) for form in FORMATS)}, and label files (query and sample0 with token ids)"
    )


def _nearest(record: Record) -> str:
    """What columns of similar names may be meant for."""
    missing = sorted(DECISIVE - set(record.columns))
    others = [name for name in record.columns if name not in DECISIVE and name not in OPTIONAL]
    pairs = ((other, get_close_matches(other.lower()[:60], missing, n=2, cutoff=0.7)) for other in others[:20])
    meant = [f"{shown(other)} for {' or '.join(close)}" for other, close in pairs if close]
    return f" (is {', '.join(meant)}?)" if meant else ""


def prompt_column_of(records: Sequence[Record], config: DataConfig | None) -> str | None:
    """The column with the prompt; None where a template makes it, or where there are no prompts."""
    if config is not None and (config.prompt_column is not None or config.template is not None):
        return config.prompt_column
    return "prompt" if any(record.columns.get("prompt") is not None for record in records) else None


def read_judged(record: Record, form: Format, prompt_column: str | None, config: DataConfig | None) -> Judged:
    """Prompt, completions and what was said about them, of any format but those of label files.

    Raises:
        DataError: a column is missing or holds something else, or a completion is empty.
        ConfigError: settings for chats, but the prompts are none.
    """
    prompt: str | Messages | None = None
    if prompt_column is not None or (config is not None and config.template is not None):
        prompt = _with_text_parts(prompt_value(record, prompt_column, config), f"{record.where}: the prompt")
    choice: int | None = None
    target: float | None = None
    if form is PAIRS:
        names = ["chosen", "rejected"]
        prompt, completions = _parted_pair(record, prompt)
        choice = None if is_tie(record) else 0
    elif form is RATINGS:
        names, completions = ["completion"], (_text_in(record, "completion"),)
        target = number_in(record, "rating")
    else:
        column = _named(record, form.columns[0])
        completions = _completions(record, column, exactly_two=form is DIFFERENCES)
        names = [f"completion {k}" for k in range(len(completions))]
        said = _named(record, form.columns[1])
        if form.kind == "choice":
            choice = choice_in(record, said, len(completions), may_tie=True)
        else:
            target = number_in(record, said)
    for name, completion in zip(names, completions, strict=True):
        _check_completion(completion, f"{record.where}: {name}")
    prompt, completions = _as_asked(record, prompt, completions, config)
    return Judged(prompt=prompt, completions=completions, choice=choice, target=target)


def _named(record: Record, names: Sequence[str]) -> str:
    """The first of several names of a column that a record uses."""
    for there in ([n for n in names if record.columns.get(n) is not None], [n for n in names if n in record.columns]):
        if there:
            return there[0]
    return names[0]


def _completions(record: Record, column: str, *, exactly_two: bool) -> Texts:
    """A list of texts, messages, or lists of messages; two where the difference is told."""
    value = value_of(record, column)
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{record.where}: {column} is {type(value).__name__} {shown(value)}, not a list of texts or messages"
        )
    if len(value) < 2 or (exactly_two and len(value) != 2):
        needed = "exactly two are" if exactly_two else "at least two are"
        raise DataError(f"{record.where}: {column} holds {len(value)}, and {needed} needed to compare")
    completions = []
    for index, item in enumerate(value):
        name = f"{column}[{index}]"
        one = replace(record, columns={name: [item] if isinstance(item, Mapping) else item})
        completions.append(_text_in(one, name))
    return tuple(completions)


def _text_in(record: Record, name: str) -> str | Messages:
    return _with_text_parts(text_or_messages(record, name), f"{record.where}: {name}")


def _with_text_parts(value: str | Messages, what: str) -> str | Messages:
    """The same; messages in parts must have text in each that has a ``text``."""
    for message in () if isinstance(value, str) else value:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if isinstance(part, Mapping) and not isinstance(part.get("text", ""), str):
                raise DataError(f"{what} has a part whose text is {type(part['text']).__name__} {shown(part['text'])}")
    return value


def _parted_pair(record: Record, prompt: str | Messages | None) -> tuple[str | Messages | None, Texts]:
    """The prompt and both completions of a record whose ``chosen`` and ``rejected`` may both begin with the prompt."""
    chosen, rejected = (_text_in(record, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _parted_dialogues(chosen, rejected)
        return prompt, (chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(f"{record.where}: one of chosen and rejected is text and the other messages; write both alike")
    shared = _shared_messages(chosen, rejected)
    if isinstance(prompt, list):
        repeated = _shared_messages(prompt, chosen, whole=True) == len(prompt) <= shared
        shared = len(prompt) if repeated else 0
    elif isinstance(prompt, str):  # the question as text beside the whole chats
        asked = any(plain_text([message]).strip() == prompt.strip() for message in chosen[:shared])
        shared = shared if asked else 0
    begin = chosen[:shared] if shared and not isinstance(prompt, list) else prompt
    return begin, (chosen[shared:], rejected[shared:])


def _shared_messages(first: Messages, second: Messages, *, whole: bool = False) -> int:
    """How many messages two chats share at their beginning; each keeps its last, unless the first may be ``whole``."""
    most = len(first) if whole else min(len(first), len(second)) - 1
    count = 0
    for one, other in zip(first[:most], second, strict=False):
        if one["role"] != other["role"] or plain_text([one]) != plain_text([other]):
            break
        count += 1
    return count


def _parted_dialogues(chosen: str, rejected: str) -> tuple[str | None, Texts]:
    """Dialogues written as text: all up to the last turn of the assistant that begins in both is the prompt."""
    turn = chosen.rfind(_ASSISTANT) if chosen.startswith(_HUMAN) else -1
    while turn >= 0:
        end = turn + len(_ASSISTANT)
        if rejected.startswith(chosen[:end]):
            return chosen[:end], (chosen[end:], rejected[end:])
        turn = chosen.rfind(_ASSISTANT, 0, turn)
    return None, (chosen, rejected)


def _check_completion(completion: str | Messages, what: str) -> None:
    if not plain_text(completion).strip():
        raise DataError(f"{what} is empty; leave the record out")
    if not isinstance(completion, str) and completion[0]["role"] in ("user", "system"):
        raise DataError(
            f"{what} begins with a message of the role {completion[0]['role']}, not with an answer; chosen and"
            " rejected may both begin with the same prompt, others give it in the column `prompt`"
        )


def _as_asked(
    record: Record, prompt: str | Messages | None, completions: Texts, config: DataConfig | None
) -> tuple[str | Messages, Texts]:
    """Prompt and completions as the settings for chats say: all of them text, or all messages."""
    if prompt is None:
        if config is not None and (config.chat or config.system_prompt is not None):
            raise ConfigError(f"{record.where}: chat and system_prompt are for prompts, and there is none")
        return "", completions
    prompt = as_chat(prompt, config)
    if not isinstance(prompt, str):
        return prompt, tuple([{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions)
    if not all(isinstance(completion, str) for completion in completions):
        raise DataError(f"{record.where}: the prompt is text but the completions are messages; set chat: true")
    return prompt, completions
