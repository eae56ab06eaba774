"""How a model that judges texts reads a prompt and a completion: one way, when it is trained and when it is used."""

from __future__ import annotations

from typing import Any, Literal, get_args

from tropism.errors import ConfigError, ModelError, TropismError
from tropism.foreign.templates import render_chat_template
from tropism.texts import plain_text

ReadText = Literal["completion", "prompt+completion"]
READ_TEXTS: tuple[ReadText, ...] = get_args(ReadText)


class UnreadableError(TropismError):
    """A completion that does not fit, one that is empty, or messages that a chat template refuses."""


class ClassifierInputs:
    """Token ids of a prompt and a completion for a sequence classifier, special tokens included.

    The two are encoded in one piece, so that nothing tells the model where one ends; a chat goes through the model's
    chat template, where it has one.

    Args:
        model: the classifier; what it can read at once is looked up there.
        text: the completion alone, or both.
        max_length: most tokens; None: what the model takes.
        cut_completion: allow a completion longer than that to lose its end; otherwise it is an error.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        text: ReadText = "completion",
        max_length: int | None = None,
        cut_completion: bool = False,
    ) -> None:
        self.tokenizer, self.text, self.cut_completion = tokenizer, text, cut_completion
        self.before, self.after = _special_affixes(tokenizer)
        longest = _longest_input(model, tokenizer)
        self.max_length = min(max_length or longest, longest)
        if self.max_length <= len(self.before) + len(self.after):
            raise ConfigError(f"max_length: {max_length} leaves no room for text beside the special tokens")

    def ids(self, prompt: Any, completion: Any) -> list[int]:
        """Ids of one text, never empty; a prompt that is too long loses its beginning.

        Args:
            prompt: text, or chat messages. completion: the same.

        Raises:
            UnreadableError: the completion does not fit, or there is nothing to read.
        """
        head, tail, templated = self._parts(prompt, completion)
        room = self._room(templated)
        ids = self._encode(head + tail)
        if len(ids) > room:
            return self._framed(self._shortened(self._encode(head), self._encode(tail), room), templated)
        return self._framed(ids, templated)

    def joined(self, prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
        """The same of a text that is given as ids of this tokenizer, without special tokens."""
        head = [] if self.text == "completion" else prompt_ids
        room = self._room(False)
        if len(head) + len(completion_ids) <= room:
            return self._framed([*head, *completion_ids], False)
        return self._framed(self._shortened(head, completion_ids, room), False)

    def _room(self, templated: bool) -> int:
        return self.max_length - (0 if templated else len(self.before) + len(self.after))

    def _shortened(self, head: list[int], tail: list[int], room: int) -> list[int]:
        if len(tail) > room and not self.cut_completion:
            raise UnreadableError(
                f"the completion has {len(tail)} tokens and the classifier takes {room}; lower max_new_tokens, or set "
                "cut_completion to drop its end"
            )
        return head[max(len(head) + len(tail) - room, 0) :] + tail[:room]

    def _framed(self, ids: list[int], templated: bool) -> list[int]:
        framed = ids if templated else [*self.before, *ids, *self.after]
        if framed:
            return framed
        if self.tokenizer.eos_token_id is None:  # an empty text for a tokenizer that adds nothing
            raise UnreadableError("it is empty, and the classifier's tokenizer has no special token for it")
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
