"""Batches of episodes."""

from __future__ import annotations

from collections.abc import Sequence

from tropism.episodes import Episode, EpisodeBatch, collate_episodes
from tropism.training.sources import TextSource


class EpisodeSource(TextSource[Episode]):
    """Batches of texts with their rewards."""

    def batch_of(self, taken: Sequence[tuple[int, Episode]], first: int) -> EpisodeBatch:
        return collate_episodes([episode for _, episode in taken])
