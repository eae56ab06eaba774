"""Which kind of records a method learns from, and one error where the data holds another kind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from tropism.data.config import DataConfig, template_parts
from tropism.data.judgement_records import FORMATS
from tropism.data.label_files import is_label
from tropism.data.readers import Record, remembering
from tropism.errors import DataError
from tropism.redaction import redact

EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("pairs", {"prompt": "The film was", "chosen": " a joy.", "rejected": " long."}),
    "opinions": ("opinions", {"prompt": "The film was", "completion": " a joy.", "label": True}),
    "episodes": (
        "texts of one or several turns with rewards",
        {"prompt": "The film was", "completion": " a joy.", "reward": 0.8},
    ),
    "scored": ("texts with rewards", {"prompt": "The film was", "completion": " a joy.", "reward": 0.8}),
    "comparisons": ("judgements", {"prompt": "The film was", "completions": [" a joy.", " long."], "choice": 0}),
    "demonstrations": ("demonstrations", {"prompt": "The film was", "completion": " a joy."}),
    "prompts": ("prompts that it completes", {"prompt": "The film was"}),
}
"""Kind of records -> what they are called, and one of them. The more a kind asks for, the earlier it stands."""

LEARN_FROM = {
    "pairs": "dpo and reward-model",
    "opinions": "kto",
    "episodes": "ilql and conditioned",
    "scored": "ilql and conditioned",
    "comparisons": "reward-model",
    "demonstrations": "sft",
    "prompts": "methods that sample, such as grpo",
}
"""Kind of records -> the methods that learn from it."""

LONGEST_VALUE = 40
"""Characters of a value in a message."""
MOST_COLUMNS = 8
"""Columns of a record in a message."""


class Method(Protocol):
    """The configuration of a method; it may have ``targets``, or one ``target``."""

    name: ClassVar[str]

    @property
    def reads(self) -> str:
        """The kind of records that it learns from."""
        ...


@contextmanager
def expecting(method: Method, data: Any, eval_data: Any = None, *, completes: bool = False) -> Iterator[None]:
    """Whatever is read inside: where it fails on records of another kind, the error says what kind was expected.

    An error about records of the right kind passes as it is.

    Args:
        data, eval_data: what the recipe names.
        completes: whether held-out prompts are completed, so that prompts alone may do in ``eval_data``.

    Raises:
        DataError: what a reader raised, or in place of it the one error.
    """
    with remembering() as read:
        try:
            yield
        except DataError as error:
            if not read:
                raise
            source, records = read[-1]
            held_out = completes and _path(source) == _path(eval_data) != _path(data)
            settings = source if isinstance(source, DataConfig) else None
            targets = rewards_of(method)
            accepted = (method.reads, "prompts") if held_out else (method.reads,)
            if any(fits(kind, records[0], settings, targets) for kind in accepted):
                raise
            message = wrong_kind(method.name, method.reads, records[0], settings, targets, str(error))
            raise DataError(message) from error


def rewards_of(method: Method) -> tuple[str, ...]:
    """The columns with rewards that a method learns from, where it learns from any."""
    several, one = getattr(method, "targets", ()), getattr(method, "target", None)
    return tuple(several) or ((str(one),) if one else ())


def wrong_kind(
    method: str, reads: str, record: Record, settings: DataConfig | None, targets: Sequence[str], why: str
) -> str:
    """The message: what the method learns from, a record as it expects, the first one that there is, and whose it is.

    Args:
        why: what the reader said; left out where it lists many records.
    """
    called, example = EXAMPLES[reads]
    if targets and "reward" in example:
        example = {name: value for name, value in example.items() if name != "reward"} | dict.fromkeys(targets, 0.8)
    there = {name: value for name, value in record.columns.items() if value is not None}
    filled = Record(where=record.where, columns=there)
    other = next((kind for kind in EXAMPLES if kind != reads and fits(kind, filled, settings, ("reward",))), None)
    whose = "" if other is None else f" (this is data for {LEARN_FROM[other]})"
    reason = "" if "\n" in why else f". {why}"
    return (
        f"{method} learns from {called}; expected records such as {shortened(example)}; {record.where} is "
        f"{shortened(record.columns)}{whose}{reason}"
    )


def fits(kind: str, record: Record, settings: DataConfig | None, targets: Sequence[str]) -> bool:
    """Whether a record has the columns of a kind, whatever stands in them."""
    names = set(record.columns)
    if kind == "comparisons":
        return is_label(record.columns) or any(all(names & set(some) for some in form.columns) for form in FORMATS)
    if kind == "pairs":
        return {"chosen", "rejected"} <= names or bool(
            names & {"completions", "samples"} and names & {"choice", "best"}
        )
    if kind == "prompts":
        return _has_prompt(names, settings, ("prompt", "messages", "text"))
    if kind == "opinions":
        return "label" in names and _has_text(names, settings)
    if kind in ("scored", "episodes"):
        has_rewards = bool(targets) and all(name in names or name.split(".")[0] in names for name in targets)
        return has_rewards and ("turns" in names or _has_text(names - set(targets), settings))
    return _has_text(names, settings)


def _has_text(names: set[str], settings: DataConfig | None) -> bool:
    """Whether there is a text to learn: a completion with its prompt, a text or a chat."""
    completion = (settings.completion_column if settings else None) or "completion"
    if completion.split(".")[0] in names:
        return _has_prompt(names - {completion}, settings, ("prompt", "messages", "text"))
    return _has_prompt(names, settings, ("messages", "text"))


def _has_prompt(names: set[str], settings: DataConfig | None, preferred: Sequence[str]) -> bool:
    if settings is not None and settings.template is not None:
        return {name.split(".")[0] for _, name in template_parts(settings.template) if name} <= names
    if settings is not None and settings.prompt_column is not None:
        return settings.prompt_column.split(".")[0] in names
    return bool(names.intersection(preferred)) or len(names) == 1


def _path(source: Any) -> Any:
    """What tells two sources apart: a path, or the very object."""
    named = getattr(source, "path", source)
    return str(named) if isinstance(named, str) or hasattr(named, "__fspath__") else id(named)


def shortened(columns: Mapping[str, Any]) -> str:
    """A record on one line, long values cut and secrets taken out."""
    shown = {str(name)[:LONGEST_VALUE]: _short(value) for name, value in list(columns.items())[:MOST_COLUMNS]}
    text = json.dumps(shown, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
    return redact(text if len(columns) <= MOST_COLUMNS else f"{text[:-1]}, ...}}")


def _short(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        redacted = redact(value[: 10 * LONGEST_VALUE])
        return redacted if len(redacted) <= LONGEST_VALUE else f"{redacted[: LONGEST_VALUE - 3]}..."
    if isinstance(value, Mapping):
        if depth == 2:
            return "{...}"
        return {str(name)[:LONGEST_VALUE]: _short(item, depth + 1) for name, item in list(value.items())[:4]}
    if isinstance(value, list | tuple):
        if depth == 2:
            return "[...]"
        return [_short(item, depth + 1) for item in value[:2]] + ["..."] * (len(value) > 2)
    if isinstance(value, int) and value.bit_length() > 64:
        return "a very large number"
    return value
