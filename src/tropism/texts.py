"""Texts: the plain text of strings and chat messages, the one token that stands for a text, whose tokenizer it is."""

from __future__ import annotations

from typing import Any

from tropism.errors import ConfigError

_DECODER_PREFIX = "tropism_decoder_prefix"


def tell_decoder_prefix(tokenizer: Any, prefix: tuple[int, ...] | None) -> None:
    """Note on a tokenizer whose model it belongs to: what ``decoder_prefix_of`` says from now on."""
    setattr(tokenizer, _DECODER_PREFIX, prefix)


def decoder_prefix_of(tokenizer: Any) -> tuple[int, ...] | None:
    """Of an encoder-decoder's tokenizer what its decoder begins every completion with; None of any other.

    Prompts and completions of such a model are encoded apart, each as a text of its own with its special tokens.
    Loading a model tells its tokenizer (``load_model``): all that reads texts is given the tokenizer, not the model.
    """
    return getattr(tokenizer, _DECODER_PREFIX, None)


def plain_text(text: str | list[dict[str, Any]]) -> str:
    """A string as it is; of chat messages the contents, one per line (only the text of contents that have parts)."""
    return text if isinstance(text, str) else "\n".join(_content(message.get("content")) for message in text)


def token_of_text(text: str, tokenizer: Any, *, setting: str) -> int:
    """The id of the one token that stands for a text behind another.

    Alone, tokenizers of the sentencepiece kind would give it a leading space, and so another id.

    Args:
        setting: names what the text was given as, in errors.

    Raises:
        ConfigError: it is not one token, or one that the tokenizer does not know.
    """
    before, whole, alone = (_ids(given, tokenizer) for given in ("a", "a" + text, text))
    following = whole[len(before) :] if whole[: len(before)] == before else alone
    ids = following if len(following) == 1 else alone
    if len(ids) != 1:
        raise ConfigError(
            f"{setting}: {text!r:.60} is {len(ids)} tokens of this tokenizer, and must be one; choose another, such as "
            "'.' or a line break"
        )
    if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise ConfigError(f"{setting}: {text!r:.60} is unknown to this tokenizer; choose one of its tokens")
    return ids[0]


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content or []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
