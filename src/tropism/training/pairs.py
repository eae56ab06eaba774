"""Batches of preferences, with what the reference says of them, which is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tropism.algorithms.base import Scorer
from tropism.errors import ConfigError
from tropism.preferences import (
    Opinion,
    OpinionBatch,
    Pair,
    PairBatch,
    collate_opinions,
    collate_pairs,
    mismatched,
)
from tropism.training.finite import require_finite
from tropism.training.sources import TextSource, TimedScorer

B = TypeVar("B", PairBatch, OpinionBatch)

CHUNK = 256
"""Held-out items that are laid out at once."""


class KeptReference:
    """Log-probs under the reference of items that do not change, each computed when it is first asked for.

    Args:
        scorer: of the reference; None: all log-probs are 0.
        shape: [N] or [N, 2], of all items.
    """

    def __init__(self, scorer: Scorer | None, *shape: int) -> None:
        self.scorer = scorer
        self.kept = torch.full(shape, torch.nan)
        """NaN where it was not asked for yet. Replaced, never changed: checkpoints hold it by reference."""

    def complete(self, batch: B, places: Sequence[int]) -> B:
        """The batch with the reference's log-probs.

        Args:
            places: of its items among all.

        Raises:
            NumericsError: one of them is not finite.
        """
        if self.scorer is None:
            return batch
        wanted = torch.tensor(places)
        first = {place: row for row, place in reversed(list(enumerate(places)))}
        unknown = [row for place, row in sorted(first.items()) if bool(self.kept[place].isnan().any())]
        if unknown:
            rows = torch.tensor(unknown)
            part = batch.select(rows)
            found = part.per_item(self.scorer.logprobs(part.rows, temperature=1.0)).float()
            require_finite({"the log-prob under the reference": found}, "before any update on it")
            self.kept = self.kept.index_put((wanted[rows],), found)
        return replace(batch, ref_logprobs=self.kept[wanted])


class PairSource(TextSource[Pair]):
    """Batches of pairs. Its state holds what the reference has said so far.

    Args:
        reference: None where the method does without.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, batch_size: int, seed: int, shuffle: bool, reference: Scorer | None
    ) -> None:
        super().__init__(pairs, batch_size=batch_size, seed=seed, shuffle=shuffle)
        timed = None if reference is None else TimedScorer(reference, self.watch)
        self.reference = KeptReference(timed, len(pairs), 2)

    def batch_of(self, taken: Sequence[tuple[int, Pair]], first: int) -> PairBatch:
        places, pairs = zip(*taken, strict=True)
        return self.reference.complete(collate_pairs(pairs), places)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able values, and the reference's log-probs."""
        return super().state_dict()[0], _kept(self.reference)

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict(values, tensors)
        self.reference.kept = tensors.get("ref_logprobs", self.reference.kept)


class OpinionSource(TextSource[Opinion]):
    """Batches of opinions with their reference point. Its state holds what the reference has said so far.

    Args:
        scorer: the policy as it is, for the reference point.
        max_length: most tokens of prompt and completion.
    """

    def __init__(
        self,
        opinions: Sequence[Opinion],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        scorer: Scorer,
        reference: Scorer,
        max_length: int | None,
    ) -> None:
        super().__init__(opinions, batch_size=batch_size, seed=seed, shuffle=shuffle)
        if batch_size < 2:
            raise ConfigError(
                "prompts_per_step is 1, but the reference point is measured on completions of other prompts of the same"
                " step; set it to 2 or more"
            )
        self.scorer, self.max_length = TimedScorer(scorer, self.watch), max_length
        self.reference = KeptReference(TimedScorer(reference, self.watch), len(opinions))

    def batch_of(self, taken: Sequence[tuple[int, Opinion]], first: int) -> OpinionBatch:
        places, opinions = zip(*taken, strict=True)
        others = collate_opinions(mismatched(opinions, max_length=self.max_length))
        assert self.reference.scorer is not None
        ratios = log_ratios(others, self.scorer, self.reference.scorer)
        require_finite({"the log-ratio": ratios}, "on the completion of another prompt; the weights are unchanged")
        batch = self.reference.complete(collate_opinions(opinions), places)
        return replace(batch, reference_points=ratios.mean().clamp(min=0).expand(len(batch)))

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able values, and the reference's log-probs."""
        return super().state_dict()[0], _kept(self.reference)

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict(values, tensors)
        self.reference.kept = tensors.get("ref_logprobs", self.reference.kept)


def _kept(reference: KeptReference) -> dict[str, Tensor]:
    return {} if reference.scorer is None else {"ref_logprobs": reference.kept}


def log_ratios(batch: OpinionBatch, policy: Scorer, reference: Scorer) -> Tensor:
    """[B] log pi - log ref of whole completions, in nats, without gradient."""
    own, ref = (scorer.logprobs(batch.rows, temperature=1.0) for scorer in (policy, reference))
    return batch.per_item(own) - batch.per_item(ref)


# Held out ------------------------------------------------------------------------------------------------------------


class HeldOutPairs:
    """Held-out pairs as batches, with what the reference says of them."""

    def __init__(self, pairs: Sequence[Pair], *, reference: Scorer | None) -> None:
        self.pairs, self.reference = pairs, KeptReference(reference, len(pairs), 2)

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self) -> Iterator[PairBatch]:
        """All of them in their order."""
        for begin in range(0, len(self.pairs), CHUNK):
            pairs = self.pairs[begin : begin + CHUNK]
            yield self.reference.complete(collate_pairs(pairs), range(begin, begin + len(pairs)))


class HeldOutOpinions:
    """Held-out opinions as batches, with one reference point, measured on all of them by the policy as it is."""

    def __init__(
        self, opinions: Sequence[Opinion], *, scorer: Scorer, reference: Scorer, max_length: int | None
    ) -> None:
        self.opinions, self.scorer = opinions, scorer
        # A single one has no completion of another prompt beside it, so that its reference point is 0.
        self.others = mismatched(opinions, max_length=max_length) if len(opinions) > 1 else []
        self.reference = KeptReference(reference, len(opinions))
        self.reference_of_others = KeptReference(reference, len(self.others))

    def __len__(self) -> int:
        return len(self.opinions)

    def batches(self) -> Iterator[OpinionBatch]:
        """All of them in their order."""
        total = 0.0
        for batch in _chunks(self.others, self.reference_of_others):
            own = batch.per_item(self.scorer.logprobs(batch.rows, temperature=1.0))
            total += float((own - batch.ref_logprobs).sum())
        point = max(0.0, total / max(1, len(self.others)))
        for batch in _chunks(self.opinions, self.reference):
            yield replace(batch, reference_points=torch.full((len(batch),), point))


def _chunks(opinions: Sequence[Opinion], reference: KeptReference) -> Iterator[OpinionBatch]:
    for begin in range(0, len(opinions), CHUNK):
        part = opinions[begin : begin + CHUNK]
        yield reference.complete(collate_opinions(part), range(begin, begin + len(part)))
