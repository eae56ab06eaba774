"""Transitions that are allowed: which tokens may follow which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.rollouts.protocol import FilterContext

MOST_BYTES = 100_000_000
"""Of the file; a list of every pair of a thousand tokens takes a tenth."""


class AllowedTokens:
    """A logit filter that forbids every token but those that may follow the last one.

    The eos may follow a token only where its list names it, or is empty: a token that nothing follows can but end. Of a
    token that is named as a follower alone the list is empty.

    Args:
        followers: token id -> ids that may follow it.
        eos_ids: tokens that end a completion.

    Raises:
        ConfigError: a token that nothing follows, in a model that has no eos to end with; when called, a prompt that
            ends with a token of which nothing is said.
    """

    def __init__(self, followers: Mapping[int, Sequence[int]], eos_ids: Sequence[int]) -> None:
        whole = {**{token: () for ids in followers.values() for token in ids}, **followers}
        self.followers = {token: torch.tensor(sorted(set(ids) or eos_ids)) for token, ids in whole.items()}
        stuck = [token for token, ids in whole.items() if not ids]
        if stuck and not eos_ids:
            raise ConfigError(
                f"allowed_tokens lets nothing follow the token with the id {stuck[0]}, and the model has no eos that "
                "could end the completion there; name its followers"
            )

    def __call__(self, logits: Tensor, context: FilterContext) -> Tensor:
        allowed = torch.full_like(logits, -torch.inf)
        for row, ids in enumerate(context.ids):
            kept = self.followers.get(ids[-1]) if ids else None
            if kept is None:
                last = f"the token with the id {ids[-1]}" if ids else "nothing but what asks for a reward"
                raise ConfigError(f"allowed_tokens says nothing of what may follow {last}, with which a prompt ends")
            kept = kept.to(logits.device)
            allowed[row, kept] = logits[row, kept]
        return allowed


def read_allowed_tokens(path: str | Path, tokenizer: Any, eos_ids: Sequence[int], vocabulary: int) -> AllowedTokens:
    """The filter of a JSON file ``{token: [tokens that may follow it]}``.

    A token is written as the tokenizer lists it, or as a text that is exactly one token of it.

    Raises:
        ConfigError: the file cannot be read, is no such object, or names what is no token of the model.
    """
    content = _read(Path(path))
    known = tokenizer.get_vocab()
    ids: dict[str, int] = {}

    def id_of(token: Any, place: str) -> int:
        if not isinstance(token, str):
            raise ConfigError(f"allowed_tokens: {path}: {place} is {token!r:.60}, not the text of a token")
        if token not in ids:
            ids[token] = _token_id(token, known, tokenizer, f"{path}: {place}", vocabulary)
        return ids[token]

    followers: dict[int, list[int]] = {}
    for token, after in content.items():
        if not isinstance(after, list):
            raise ConfigError(
                f"allowed_tokens: {path}: {token!r:.60} has {after!r:.60}; give the list of tokens that may follow it"
            )
        places = (f"entry {index} of {token!r:.60}" for index in range(len(after)))
        own = id_of(token, "a key")
        if own in followers:
            raise ConfigError(f"allowed_tokens: {path}: two keys are the token with the id {own}; give it one list")
        followers[own] = [id_of(other, place) for other, place in zip(after, places, strict=True)]
    return AllowedTokens(followers, eos_ids)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"allowed_tokens: {path} takes more than {MOST_BYTES:,} bytes; it is no such table")
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"allowed_tokens: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"allowed_tokens: {path} is no valid JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"allowed_tokens: {path} must hold an object {{token: [tokens that may follow it]}}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"allowed_tokens: the key {twice!r:.60} occurs twice; give each token one list")
    return content


def _token_id(token: str, known: Mapping[str, int], tokenizer: Any, place: str, vocabulary: int) -> int:
    if token in known:
        found = int(known[token])
    else:
        encoded = list(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"])
        # A tokenizer may stand any text it does not know by its unknown token, which is then another text.
        if len(encoded) != 1 or encoded[0] == tokenizer.unk_token_id:
            close = get_close_matches(token, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"allowed_tokens: {place}: {token!r:.60} is no token of the model's tokenizer, and no text that is"
                f" exactly one{hint}"
            )
        found = int(encoded[0])
    if found >= vocabulary:
        raise ConfigError(f"allowed_tokens: {place}: {token!r:.60} has the id {found}, beyond the model's vocabulary")
    return found
