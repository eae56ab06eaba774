"""The order in which prompts are used: a keyed permutation per epoch, the same on every machine and version."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from tropism.errors import ConfigError, DataError

T = TypeVar("T")


def keyed_hash(*key: int | str) -> bytes:
    """8 bytes that depend on nothing but the key."""
    return hashlib.blake2b("/".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The permutation of ``range(count)`` in which an epoch goes through its items."""
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    return sorted(range(count), key=lambda index: (keyed_hash("order", seed, epoch, index), index))


def fingerprint(items: Sequence[object]) -> str:
    """Digest of items in their order: of all token ids, texts and columns, so that a changed file shows, and a changed
    tokenizer or template. Objects that JSON does not know count by what they print."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        fields = vars(item) if is_dataclass(item) else item
        digest.update(json.dumps(fields, default=_as_plain, skipkeys=True).encode("ascii") + b"\n")
    return digest.hexdigest()


def _as_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return [type(value).__qualname__, re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))]  # addresses differ by process


class PromptStream(Generic[T]):
    """Items in order, epoch after epoch without end.

    Args:
        items: at least one; they do not change while the stream is in use.
        seed: keys the order of every epoch.
        shuffle: False goes through the items as they stand.
    """

    def __init__(self, items: Sequence[T], *, seed: int, shuffle: bool = True) -> None:
        if not items:
            raise DataError("there are no prompts to draw from")
        self.items = items
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0
        """Items taken so far, over all epochs."""
        self._order: tuple[int, list[int]] | None = None

    def take(self, n: int) -> list[tuple[int, T]]:
        """The next ``n`` items, each with its index in ``items``."""
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        taken = []
        for position in range(self.position, self.position + n):
            epoch, offset = divmod(position, len(self.items))
            index = self._epoch(epoch)[offset]
            taken.append((index, self.items[index]))
        self.position += n
        return taken

    def _epoch(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            count = len(self.items)
            self._order = epoch, epoch_order(count, seed=self.seed, epoch=epoch) if self.shuffle else list(range(count))
        return self._order[1]

    @cached_property
    def fingerprint(self) -> str:
        """Of the items."""
        return fingerprint(self.items)

    def state_dict(self) -> dict[str, Any]:
        """The position and what it counts through, as plain JSON."""
        return {"position": self.position, "items": len(self.items), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position; seed and shuffle must be those of the saved run.

        Raises:
            ConfigError: the position is no count.
            DataError: the items are not those that were saved.
        """
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ConfigError(f"the saved position in the prompts is {position!r}, not a count")
        if state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the data is not that of the run, which has gone through {position} of {state.get('items')} items: "
                f"now there are {len(self.items)}, or other texts, columns or token ids. Give the run the same file, "
                "in the same order, with the same tokenizer and chat template, or start a new run"
            )
        self.position = position
