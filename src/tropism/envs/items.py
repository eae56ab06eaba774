"""What an environment is asked to complete: items, each a prompt and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from tropism.data.encoding import room_for_prompt
from tropism.data.prompts import make_prompts
from tropism.data.readers import read_records
from tropism.errors import ConfigError, DataError
from tropism.generation import TextPolicy
from tropism.types import Messages, Prompt

PROMPT_KEYS = ("prompt", "input")
"""Where a record has its prompt."""


@dataclass(frozen=True)
class OwnItem:
    """An item of the caller's own, which may be a number and still is no index."""

    item: Any


class Items:
    """Items and their prompts as the policy reads them.

    Args:
        source: texts, lists of chat messages, records with "prompt" or "input", or anything else that ``read_records``
            takes; with ``prompt_of`` a list of anything.
        model: whose tokenizer, context and reward conditioning count.
        new_tokens: most tokens of a completion, which have to fit into the context beside the prompt.
        prompt_of: makes the text or messages of the prompt from an item; None takes the item's own.

    Raises:
        DataError: no items, an item without a prompt, or a prompt that is too long; says which.
    """

    def __init__(
        self, source: Any, model: TextPolicy, *, new_tokens: int, prompt_of: Callable[[Any], str | Messages] | None
    ) -> None:
        self.model, self.prompt_of, self.new_tokens = model, prompt_of, new_tokens
        self.given: list[Any] = list(source) if isinstance(source, list | tuple) else list(read_records(source))
        if not self.given:
            raise DataError("the environment needs at least one item; pass texts or records with a prompt")
        columns = [self._columns(item) for item in self.given]
        self._names = list(dict.fromkeys(name for of_item in columns for name in of_item))
        self.prompts = self._encoded([self._text(item, f"item {i}") for i, item in enumerate(self.given)], columns)

    def __len__(self) -> int:
        return len(self.given)

    def find(self, item: Any) -> tuple[Any, Prompt]:
        """An item and its prompt, by index (from the end where it is negative) or as an item of the caller's own.

        Raises:
            DataError: no such index, or an item without a usable prompt.
        """
        if isinstance(item, OwnItem):
            item = item.item
        elif isinstance(item, Integral) and not isinstance(item, bool):
            index = int(item)
            if not -len(self.given) <= index < len(self.given):
                raise DataError(f"there is no item {index}; the environment has {len(self.given)}, counted from 0")
            return self.given[index], self.prompts[index]
        return item, self._encoded([self._text(item, "the item")], [self._columns(item)])[0]

    def _text(self, item: Any, where: str) -> str | Messages:
        if self.prompt_of is not None:
            return self._checked(self.prompt_of(item), f"prompt_of({where})")
        if not isinstance(item, Mapping):
            return self._checked(item, where)
        for key in PROMPT_KEYS:
            if item.get(key) is not None:
                return self._checked(item[key], f"{where}, {key!r}")
        found = ", ".join(repr(key) for key in item) or "nothing"
        raise DataError(
            f"{where} has no prompt: a record needs 'prompt' or 'input', and this one has {found}; rename the column, "
            "or pass prompt_of, which makes the prompt of an item"
        )

    @staticmethod
    def _checked(value: Any, where: str) -> str | Messages:
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
            return [dict(message) for message in value]
        raise DataError(
            f"{where} is {type(value).__name__} {str(value)[:60]!r}; a prompt is text or a list of chat messages"
        )

    def _columns(self, item: Any) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            return {}
        own = () if self.prompt_of is not None else [key for key in PROMPT_KEYS if item.get(key) is not None][:1]
        return {str(name): value for name, value in item.items() if name not in own}

    def _encoded(self, texts: Sequence[str | Messages], columns: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        prompts = make_prompts([{"prompt": text} for text in texts], self.model.tokenizer, max_length=self._room)
        if self.model.conditioner is not None:
            prompts = list(self.model.conditioner.condition(prompts, None))
        empty = dict.fromkeys(self._names)
        return [replace(prompt, columns={**empty, **own}) for prompt, own in zip(prompts, columns, strict=True)]

    @property
    def _room(self) -> int | None:
        """Most tokens of a prompt."""
        model, limit = self.model, self.model.policy.context_length
        taken = 0 if model.conditioner is None else model.conditioner.width
        room = room_for_prompt(model.tokenizer, limit, new=self.new_tokens, taken=taken)
        if room is not None and room < 1:
            raise ConfigError(
                f"max_new_tokens={self.new_tokens} leaves no room for a prompt in the model's context of {limit}; "
                "choose fewer tokens"
            )
        return room
