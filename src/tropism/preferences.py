"""What people preferred, as token ids and as batches: pairs of completions, and single ones that were liked or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from tropism.types import Batch, Tokens, length_mask, pad_rows


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two completions of one prompt, the first of which was preferred."""

    prompt_ids: tuple[int, ...]
    """Token ids that are read only; never empty."""
    chosen_ids: tuple[int, ...]
    """Token ids of the preferred completion, the final eos included; never empty."""
    rejected_ids: tuple[int, ...]
    """Of the other one; never empty, and never the same."""
    weight: float = 1.0
    """How much this pair counts, above 0."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """B pairs. A pair is never split over micro-batches.

    Two pairs, of the prompts ``[5, 6]`` and ``[7]``::

        prompt_ids      [[5, 6], [0, 7]]                              prompt_lengths  [2, 1]
        completion_ids  [[[8, 2, 0], [9, 9, 2]], [[8, 2, 0], [2, 0, 0]]]     lengths  [[2, 3], [2, 1]]
    """

    prompt_ids: Tensor
    """[B, P] padded on the left."""
    prompt_lengths: Tensor
    """[B] at least 1 each."""
    completion_ids: Tensor
    """[B, 2, T] padded on the right; the chosen one first."""
    lengths: Tensor
    """[B, 2] at least 1 each."""
    ref_logprobs: Tensor
    """[B, 2] log-prob in nats of each completion under the reference, summed over its tokens; 0 without reference."""
    weights: Tensor
    """[B] fp32; 0 takes a pair out of the loss."""

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def rows(self) -> Tokens:
        """The 2 B completions with their prompts, those of a pair side by side."""
        return Tokens(
            prompt_ids=self.prompt_ids.repeat_interleave(2, 0),
            prompt_lengths=self.prompt_lengths.repeat_interleave(2, 0),
            completion_ids=self.completion_ids.flatten(0, 1),
            completion_lengths=self.lengths.flatten(),
        )

    def per_item(self, logprobs: Tensor) -> Tensor:
        """[B, 2] sums over the tokens of each completion, from [2 B, T] of ``rows``."""
        return logprobs.sum(-1).view(len(self), 2)

    @property
    def loss_mask(self) -> Tensor:
        """[B, 2 * T] bool: the tokens of both completions, of pairs that count."""
        real = length_mask(self.lengths.flatten(), self.completion_ids.shape[2]).view(len(self), -1)
        return real & (self.weights > 0)[:, None]

    @property
    def completion_lengths(self) -> Tensor:
        """[B] tokens of both completions: what a pair takes beside its prompt where nothing is padded."""
        return self.lengths.sum(1)

    @property
    def total_lengths(self) -> Tensor:
        """[B] tokens that computing a pair takes where it is padded, pads included."""
        return 2 * (self.prompt_lengths + self.lengths.amax(1))

    def select(self, rows: Tensor) -> Self:
        """The given pairs (index tensor [N]), trimmed to the longest prompt and completion among them."""
        chosen: dict[str, Any] = {name: value[rows.to(value.device)] for name, value in self.tensors().items()}
        prompt, width = (int(chosen[name].max()) if len(rows) else 0 for name in ("prompt_lengths", "lengths"))
        chosen["prompt_ids"] = chosen["prompt_ids"][:, self.prompt_ids.shape[1] - prompt :]
        chosen["completion_ids"] = chosen["completion_ids"][:, :, :width]
        return replace(self, **chosen)

    def to(self, device: torch.device | str) -> Self:
        changes: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """All fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def emptied(self) -> Self:
        """The same rows, of which nothing is learned."""
        return replace(self, weights=torch.zeros_like(self.weights))


def collate_pairs(pairs: Sequence[Pair]) -> PairBatch:
    """A batch of pairs; what the reference says of them is 0."""
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return PairBatch(
        prompt_ids=pad_rows([pair.prompt_ids for pair in pairs], left=True),
        prompt_lengths=torch.tensor([len(pair.prompt_ids) for pair in pairs]),
        completion_ids=pad_rows(completions).view(len(pairs), 2, -1),
        lengths=torch.tensor([len(ids) for ids in completions]).view(len(pairs), 2),
        ref_logprobs=torch.zeros(len(pairs), 2),
        weights=torch.tensor([pair.weight for pair in pairs]),
    )


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """One completion, and whether it was liked."""

    prompt_ids: tuple[int, ...]
    """Token ids that are read only; never empty."""
    completion_ids: tuple[int, ...]
    """Token ids that follow, the final eos included; never empty."""
    liked: bool
    """Whether it was found good."""


@dataclass(frozen=True, kw_only=True)
class OpinionBatch(Batch):
    """B completions that were liked or not."""

    liked: Tensor
    """[B] bool."""
    ref_logprobs: Tensor
    """[B] log-prob in nats of each completion under the reference, summed over its tokens."""
    reference_points: Tensor
    """[B] the log-ratio in nats from which on a completion counts as gained; the same for all of an optimizer step."""

    @property
    def rows(self) -> Tokens:
        """The completions with their prompts."""
        return self

    def per_item(self, logprobs: Tensor) -> Tensor:
        """[B] sums over the tokens of each completion, from [B, T] of ``rows``."""
        return logprobs.sum(-1)


def collate_opinions(opinions: Sequence[Opinion]) -> OpinionBatch:
    """A batch of opinions; what the reference says of them, and the reference point, is 0."""
    lengths = torch.tensor([len(opinion.completion_ids) for opinion in opinions])
    completion_ids = pad_rows([opinion.completion_ids for opinion in opinions])
    return OpinionBatch(
        prompt_ids=pad_rows([opinion.prompt_ids for opinion in opinions], left=True),
        prompt_lengths=torch.tensor([len(opinion.prompt_ids) for opinion in opinions]),
        completion_ids=completion_ids,
        completion_lengths=lengths,
        loss_mask=length_mask(lengths, completion_ids.shape[1]),
        liked=torch.tensor([opinion.liked for opinion in opinions]),
        ref_logprobs=torch.zeros(len(opinions)),
        reference_points=torch.zeros(len(opinions)),
    )


def mismatched(opinions: Sequence[Opinion], *, max_length: int | None) -> list[Opinion]:
    """Every prompt with the completion of the opinion before it, the first with that of the last.

    Args:
        opinions: at least two.
        max_length: most tokens of prompt and completion; what is longer loses its end. None: any length.
    """
    if len(opinions) < 2:
        raise ValueError("a completion of another prompt needs at least two opinions")
    others = [opinions[-1], *opinions[:-1]]
    return [
        replace(opinion, completion_ids=other.completion_ids[: _room(opinion, max_length)])
        for opinion, other in zip(opinions, others, strict=True)
    ]


def _room(opinion: Opinion, max_length: int | None) -> int | None:
    return None if max_length is None else max(1, max_length - len(opinion.prompt_ids))
