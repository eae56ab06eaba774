"""The order in which prompts are used: a keyed permutation per epoch, the same on every machine and version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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


class PromptStream(Generic[T]):
    """Items in order, epoch after epoch without end.

    Args:
        items: at least one.
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

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position; the items, seed and shuffle must be those of the saved run."""
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ConfigError(f"the saved position in the prompts is {position!r}, not a count")
        self.position = position
