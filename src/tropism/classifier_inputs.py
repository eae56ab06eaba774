"""How a model that judges texts reads a prompt and a completion: one way, when it is trained and when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tropism.errors import ConfigError, ModelError, TropismError
from tropism.foreign.templates import render_chat_template
from tropism.texts import plain_text

ReadText = Literal["completion", "prompt+completion"]
"""What a reward model that is trained here may read."""
JudgedText = Literal["completion", "prompt+completion", "pair"]
"""What a classifier of others may have been trained to read."""
JUDGED_TEXTS: tuple[JudgedText, ...] = get_args(JudgedText)


class UnreadableError(TropismError):
    """A completion that does not fit, or messages that a chat template refuses."""


class NothingToReadError(UnreadableError):
    """An empty text, for a tokenizer that adds no special token to it."""


@dataclass(frozen=True, kw_only=True)
class ClassifierInput:
    """What a classifier reads of one prompt and completion."""

    ids: list[int]
    """Token ids, special tokens included; never empty."""
    segments: list[int] | None = None
    """For each id the text it belongs to (``token_type_ids``), where a model tells the texts of a pair apart by it."""


class ClassifierInputs:
    """Token ids of a prompt and a completion for a sequence classifier, special tokens included.

    The two are encoded in one piece, so that nothing tells the model where one ends; a chat goes through the model's
    chat template, where it has one. Only as a ``pair`` they are two texts, with what the tokenizer puts between them.

    Args:
        model: the classifier; what it can read at once is looked up there.
        text: the completion alone, both as one text, or both as a pair.
        max_length: most tokens; None: what the model takes.
        cut_completion: allow a completion longer than that to lose its end; otherwise it is an error.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        text: JudgedText = "completion",
        max_length: int | None = None,
        cut_completion: bool = False,
    ) -> None:
        self.tokenizer, self.text, self.cut_completion = tokenizer, text, cut_completion
        self.before, self.after = _special_affixes(tokenizer)
        self.pair = _pair_frame(model, tokenizer) if text == "pair" else None
        longest = _longest_input(model, tokenizer)
        self.max_length = min(max_length or longest, longest)
        special = len(self.before) + len(self.after) if self.pair is None else self.pair.length
        if self.max_length <= special:
            raise ConfigError(f"max_length: {max_length} leaves no room for text beside the special tokens")

    def read(self, prompt: Any, completion: Any) -> ClassifierInput:
        """What the classifier is given; a prompt that is too long loses its beginning.

        Args:
            prompt: text, or chat messages. completion: the same.

        Raises:
            NothingToReadError: no id at all. UnreadableError: the completion does not fit.
        """
        if self.pair is None:
            return ClassifierInput(ids=self.ids(prompt, completion))
        head, tail = self._encode(plain_text(prompt)), self._encode(plain_text(completion))
        return self.pair.around(*self._shortened(head, tail, self.max_length - self.pair.length))

    def ids(self, prompt: Any, completion: Any) -> list[int]:
        """Ids of one text, never empty; a prompt that is too long loses its beginning. Not of a pair.

        Args:
            prompt: text, or chat messages. completion: the same.

        Raises:
            NothingToReadError: no id at all. UnreadableError: the completion does not fit.
        """
        head, tail, templated = self._parts(prompt, completion)
        room = self._room(templated)
        ids = self._encode(head + tail)
        if len(ids) > room:
            kept, judged = self._shortened(self._encode(head), self._encode(tail), room)
            return self._framed(kept + judged, templated)
        return self._framed(ids, templated)

    def joined(self, prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
        """The same of a text that is given as ids of this tokenizer, without special tokens."""
        head = [] if self.text == "completion" else prompt_ids
        room = self._room(False)
        if len(head) + len(completion_ids) <= room:
            return self._framed([*head, *completion_ids], False)
        kept, judged = self._shortened(head, completion_ids, room)
        return self._framed(kept + judged, False)

    def _room(self, templated: bool) -> int:
        return self.max_length - (0 if templated else len(self.before) + len(self.after))

    def _shortened(self, head: list[int], tail: list[int], room: int) -> tuple[list[int], list[int]]:
        """What is left of both: the first gives way, from its left, as the second is what is judged."""
        if len(tail) > room and not self.cut_completion:
            raise UnreadableError(
                f"the completion has {len(tail)} tokens and the classifier takes {room}; lower max_new_tokens, or set "
                "cut_completion to drop its end"
            )
        return head[max(len(head) + len(tail) - room, 0) :], tail[:room]

    def _framed(self, ids: list[int], templated: bool) -> list[int]:
        framed = ids if templated else [*self.before, *ids, *self.after]
        if framed:
            return framed
        if self.tokenizer.eos_token_id is None:  # an empty text for a tokenizer that adds nothing
            raise NothingToReadError("it is empty, and the classifier's tokenizer has no special token for it")
        return [self.tokenizer.eos_token_id]

    def _parts(self, prompt: Any, completion: Any) -> tuple[str, str, bool]:
        """What may be cut, what must stay, and whether a chat template already put the special tokens in."""
        if self.text == "completion":
            return "", plain_text(completion), False
        if isinstance(prompt, str):
            return prompt, plain_text(completion), False
        if not self.tokenizer.chat_template:
            return plain_text(prompt) + "\n", plain_text(completion), False
        whole = self._rendered([*prompt, *completion], opened=False)
        for opened in (True, False):
            head = self._rendered(prompt, opened=opened)
            if whole.startswith(head):
                return head, whole[len(head) :], True
        return "", whole, True

    def _rendered(self, messages: list[Any], *, opened: bool) -> str:
        """Messages by the classifier's chat template; ``opened`` ends them with the header of an answer."""
        return render_chat_template(
            self.tokenizer, messages, where="the classifier", add_generation_prompt=opened, error=UnreadableError
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens the tokenizer puts before and after a text, read off a sample."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise ModelError("the classifier's tokenizer changes a text when it adds special tokens; this is not supported")


@dataclass(frozen=True, kw_only=True)
class _PairFrame:
    """What a tokenizer puts around two texts: ids, and the segment of every part."""

    before: list[int]
    between: list[int]
    after: list[int]
    segments: tuple[int, int, int, int, int] | None
    """Of ``before``, the first text, ``between``, the second text, ``after``; None for a model without segments."""

    @property
    def length(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, first: list[int], second: list[int]) -> ClassifierInput:
        parts = (self.before, first, self.between, second, self.after)
        segments = None
        if self.segments is not None:
            segments = [segment for part, segment in zip(parts, self.segments, strict=True) for _ in part]
        return ClassifierInput(ids=[token for part in parts for token in part], segments=segments)


def _pair_frame(model: Any, tokenizer: Any) -> _PairFrame:
    """Read off a sample.

    Raises:
        ConfigError: the tokenizer puts nothing between two texts, so that a pair would be one text.
        ModelError: the sample's texts are not to be found in it.
    """
    first, second = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", "b"))
    sample = tokenizer("a", "b", return_token_type_ids=True)
    ids = list(sample["input_ids"])
    types = list(sample.get("token_type_ids", [0] * len(ids)))
    begin = _place(first, ids, 0)
    middle = _place(second, ids, begin + len(first))
    end = middle + len(second)
    before, between, after = ids[:begin], ids[begin + len(first) : middle], ids[end:]
    if not between:
        raise ConfigError(
            "text: the classifier's tokenizer puts nothing between the texts of a pair; use 'prompt+completion'"
        )
    # Other models take such ids for something else (GPT-2 adds the embedding of that token), or have one segment; and
    # where a tokenizer does not declare them, the model was trained without.
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", 0)
    if not (isinstance(kinds, int) and kinds > 1 and "token_type_ids" in tokenizer.model_input_names):
        return _PairFrame(before=before, between=between, after=after, segments=None)
    segments = (types[0], types[begin], types[begin + len(first)], types[middle], types[-1])
    frame = _PairFrame(before=before, between=between, after=after, segments=segments)
    if frame.around(first, second).segments != types:
        raise ModelError("the classifier's tokenizer gives the special tokens of a pair several segments in one place")
    return frame


def _place(part: list[int], ids: list[int], start: int) -> int:
    for place in range(start, len(ids) - len(part) + 1):
        if ids[place : place + len(part)] == part:
            return place
    raise ModelError("the classifier's tokenizer changes a text when it is one of a pair; this is not supported")


def _longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens the classifier takes: the least of what tokenizer and position table say."""
    limits = [int(min(tokenizer.model_max_length, 10**9))]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = 0  # RoBERTa's first positions belong to padding
        for name, module in model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                offset = module.padding_idx + 1
        limits.append(positions - offset)
    return min(limits)
