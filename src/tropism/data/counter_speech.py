"""Dialogues and pairs of hate speech and its answers, in the formats of https://github.com/marcoguerini/CONAN.

DIALOCONAN (https://arxiv.org/abs/2211.03433) is a table of turns: ``text``, ``TARGET``, ``dialogue_id``, ``turn_id``,
``source`` and ``type`` (HS or CN, in turns). CONAN has pairs in ``hateSpeech`` and ``counterSpeech``, multi-target
CONAN in ``HATE_SPEECH`` and ``COUNTER_NARRATIVE``, its knowledge-grounded part in ``hate_speech`` and
``counter_narrative``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

from tropism.data.files import shown
from tropism.data.prepared import PreparedData, check_choice, column_of, name_of, prepared, text_in
from tropism.data.readers import Record, locate_records
from tropism.errors import ConfigError, DataError

Form = Literal["texts", "pairs", "chats"]
"""What an answer becomes with all before it: one text, prompt and completion, or chat messages."""

SPEECH = ("HATE_SPEECH", "hateSpeech", "hate_speech")
"""Names of the column with what is answered."""
ANSWER = ("COUNTER_NARRATIVE", "counterSpeech", "counter_narrative")
"""Names of the column with the answer."""
TARGET = ("TARGET", "target", "hsType")
"""Names of the column that says whom the hate speech is about."""
TURN_TYPES = ("HS", "CN")
"""What ``type`` says of a user's turn and of an assistant's."""

Exchange = tuple[str, str]
"""What a user says, and the answer; empty where there is none."""


def dialoconan(
    source: Any,
    *,
    form: Form = "texts",
    delete_last_answer: bool = False,
    user_name: str = "User:",
    bot_name: str = "Assistant:",
    text_only: bool = False,
) -> PreparedData:
    """Dialogues in the format of DIALOCONAN, one record per exchange with all exchanges before it.

    With the exchanges (u0, a0), (u1, a1) of a dialogue, ``texts`` makes of it::

        User: u0.\\nAssistant: a0
        User: u0.\\nAssistant: a0\\nUser: u1.\\nAssistant: a1

    ``pairs`` parts each of them behind the last ``Assistant:``, so that ``prompt + completion`` is that text; ``chats``
    makes messages of the turns, for models with a chat template. Line breaks within a turn become blanks. Each record
    also has ``dialogue_id``, ``turn`` (of the exchange, from 0) and ``target``.

    A dialogue whose turns are not numbered once each, are not HS and CN in turns, or are blank, is left out, since it
    would teach the wrong side; so is a last turn that nobody answers, unless answers are deleted.

    Args:
        source: ``DataConfig``, path of the CSV file, hub id, list or data set.
        form: what a record is made of.
        delete_last_answer: end where the last answer would begin: prompts to complete, also of unanswered turns.
        user_name: stands before each of the user's turns.
        bot_name: stands before each answer.
        text_only: leave the other columns out.

    Returns:
        Records whose rows (``read``, ``left_out``) are turns.

    Raises:
        ConfigError: a form that is none.
        DataError: the source has another format, or nothing is left.
    """
    check_choice("form", form, get_args(Form))
    located = locate_records(source)
    column_of(located, ("text",), of="DIALOCONAN")
    column_of(located, ("dialogue_id",), of="DIALOCONAN")
    made: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for name, rows in _dialogues(located).items():
        turns = _in_order(rows)
        reason = _why_not(turns)
        if reason is not None:
            left_out[reason] += len(rows)
            continue
        exchanges = _exchanges(turns)
        if not exchanges[-1][1] and not delete_last_answer:
            left_out["last turns without an answer"] += 1
            exchanges.pop()
        for index in range(len(exchanges)):
            columns = _written(exchanges[: index + 1], form, delete_last_answer, user_name, bot_name)
            others = {"dialogue_id": name, "turn": index, "target": _target(turns[0])}
            made.append(columns if text_only else {**columns, **others})
    return prepared(made, noun="turns", read=len(located), left_out=left_out, name=name_of(source))


def conan(
    source: Any,
    *,
    form: Form = "pairs",
    delete_last_answer: bool = False,
    user_name: str = "User:",
    bot_name: str = "Assistant:",
    targets: Sequence[str] = (),
    text_only: bool = False,
) -> PreparedData:
    """Pairs of hate speech and answer in the formats of CONAN and multi-target CONAN.

    ``pairs`` makes ``{"prompt": hate speech, "completion": answer}``, as they stand there; ``template`` of the recipe's
    data frames the prompt. ``chats`` makes messages of the two, ``texts`` one exchange as in ``dialoconan``. Line
    breaks become blanks. Each record also has ``target``, where the data names one.

    Args:
        source: ``DataConfig``, path of a CSV or JSON file, hub id, list or data set.
        form: what a record is made of.
        delete_last_answer: leave the answer out: prompts to complete. Equal ones are kept once.
        user_name: stands before the hate speech in ``texts``.
        bot_name: stands before the answer in ``texts``.
        targets: keep pairs about these, only, such as ``WOMEN``; as the data spells them.
        text_only: leave the column ``target`` out.

    Returns:
        Records whose rows are pairs.

    Raises:
        ConfigError: a form that is none.
        DataError: the source has another format, a target does not occur, or nothing is left.
    """
    check_choice("form", form, get_args(Form))
    located = locate_records(source)
    speech, answer = column_of(located, SPEECH, of="CONAN"), column_of(located, ANSWER, of="CONAN")
    _check_targets(located, targets)
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for record in located:
        said, answered, target = text_in(record, speech), text_in(record, answer), _target(record)
        if targets and target not in targets:
            left_out[f"not about {' or '.join(targets)} (targets)"] += 1
        elif not said.strip() or not (delete_last_answer or answered.strip()):
            left_out["pairs with a blank side"] += 1
        elif delete_last_answer and said in seen:
            left_out["prompts that were there already"] += 1
        else:
            seen.add(said)
            columns: dict[str, Any] = {"prompt": said, "completion": answered}
            if form != "pairs":
                columns = _written([(said, answered)], form, delete_last_answer, user_name, bot_name)
            elif delete_last_answer:
                del columns["completion"]
            made.append(columns if text_only else {**columns, "target": target})
    return prepared(made, noun="pairs", read=len(located), left_out=left_out, name=name_of(source))


def texts_by_dialogue(data: PreparedData) -> dict[str, dict[int, str]]:
    """The texts of ``dialoconan`` by dialogue and exchange: ``{"17": {0: "User: ...", 1: "User: ..."}}``.

    Raises:
        DataError: the records lack ``dialogue_id``, or hold chat messages.
    """
    grouped: dict[str, dict[int, str]] = {}
    for record, text in zip(data.records, data.texts, strict=True):
        if "dialogue_id" not in record:
            raise DataError("the records have no dialogue_id; prepare them by dialoconan without text_only")
        grouped.setdefault(record["dialogue_id"], {})[record["turn"]] = text
    return grouped


# ---- dialogues -----------------------------------------------------------------------------------------------------


def _dialogues(located: list[Record]) -> dict[str, list[Record]]:
    """The turns of each dialogue, as they stand there."""
    dialogues: dict[str, list[Record]] = {}
    for record in located:
        name = record.columns.get("dialogue_id")
        if name is None or not str(name).strip():
            raise DataError(f"{record.where}: there is no dialogue_id, so it cannot be said which dialogue this is of")
        dialogues.setdefault(str(name), []).append(record)
    return dialogues


def _in_order(rows: list[Record]) -> list[Record]:
    """A dialogue's turns by their numbers, or as they stand where the data has none."""
    return sorted(rows, key=_number) if any("turn_id" in row.columns for row in rows) else rows


def _exchanges(turns: list[Record]) -> list[Exchange]:
    """Turns two by two; the answer to the last one is empty where there is none."""
    texts = [text_in(turn, "text") for turn in turns]
    return list(itertools.zip_longest(texts[::2], texts[1::2], fillvalue=""))


def _number(row: Record) -> float:
    value = row.columns.get("turn_id")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{row.where}: turn_id is {shown(value)}, expected a number") from error


def _why_not(turns: list[Record]) -> str | None:
    """Why a dialogue is left out; None where it is kept."""
    numbers = [_number(turn) for turn in turns if "turn_id" in turn.columns]
    if len(set(numbers)) < len(numbers):
        return "turns of a dialogue that numbers two of them alike"
    if any(not text_in(turn, "text").strip() for turn in turns):
        return "turns of a dialogue with a blank turn"
    types = [turn.columns.get("type") for turn in turns]
    given = [(kind, TURN_TYPES[place % 2]) for place, kind in enumerate(types) if kind not in (None, "")]
    if any(str(kind).strip() != expected for kind, expected in given):
        return f"turns of a dialogue that is not {' and '.join(TURN_TYPES)} in turns"
    return None


def _written(
    exchanges: Sequence[Exchange], form: Form, delete_last_answer: bool, user_name: str, bot_name: str
) -> dict[str, Any]:
    """The columns of one record: exchanges, of which the last one ends it."""
    *before, (said, answer) = exchanges
    if form == "chats":
        messages = [
            message
            for user, assistant in before
            for message in ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
        ]
        chat: dict[str, Any] = {"prompt": [*messages, {"role": "user", "content": said}]}
        return chat if delete_last_answer else {**chat, "completion": [{"role": "assistant", "content": answer}]}
    history = "".join(f"{user_name} {user}.\n{bot_name} {assistant}\n" for user, assistant in before)
    prompt = f"{history}{user_name} {said}.\n{bot_name}"
    if form == "texts":
        return {"text": f"{prompt} {'' if delete_last_answer else answer}"}
    return {"prompt": prompt} if delete_last_answer else {"prompt": prompt, "completion": f" {answer}"}


# ---- targets -------------------------------------------------------------------------------------------------------


def _target(record: Record) -> str | None:
    """Whom the hate speech is about, where the data says it."""
    found = next((record.columns[name] for name in TARGET if record.columns.get(name) not in (None, "")), None)
    return None if found is None else str(found)


def _check_targets(located: list[Record], targets: Sequence[str]) -> None:
    """Each target that is asked for occurs."""
    if isinstance(targets, str):
        raise ConfigError(f"targets is one text; pass a list of them: [{targets!r}]")
    there = sorted({target for record in located if (target := _target(record)) is not None})
    missing = [target for target in targets if target not in there]
    if missing:
        raise DataError(f"no pair is about {missing[0]!r}; there are: {', '.join(there) or 'none with a target'}")
