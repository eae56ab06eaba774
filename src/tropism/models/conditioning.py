"""Reward slots: from the ids that stand for targets to the embeddings that the model reads there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tropism.errors import ModelError
from tropism.models.modules import replaced_forward
from tropism.ops.slots import read_slots

HIDDEN = ("linear", "add", "replace", "token")
"""Mechanisms with slots; ``text`` has none."""


class RewardSlots(nn.Module):
    """Embeddings of K rewards' slots, in the space that the model's input embedding answers in.

    linear:   w_k r + b_k, w_k = 0 and b_k = the base token's embedding before training, so that the model starts as if
              it were given one more such token; https://arxiv.org/abs/1912.02877 (command as input), the form of
              conditionme's DecisionGPT2LMHeadModel
    add:      e + r u_k, e the base token's live embedding, u_k a fixed direction
    replace:  r u_k
    token:    row r of a table per reward, r the number of a bin; drawn from a normal with the mean and deviation of the
              embedding matrix, as in Quark, https://arxiv.org/abs/2205.13636

    A reward left open has a learned embedding of its own, the base token's before training.

    Args:
        mechanism: one of ``HIDDEN``.
        rewards: K. bins: of each, for ``token``.
        base_id: the token that slots start from.
        size: of an embedding.
    """

    def __init__(self, mechanism: str, *, rewards: int, bins: int, base_id: int, size: int) -> None:
        super().__init__()
        if mechanism not in HIDDEN:
            raise ValueError(f"the mechanism {mechanism!r} has no slots; those with slots are {', '.join(HIDDEN)}")
        self.mechanism, self.base_id = mechanism, base_id

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=torch.float32))

        self.open = zeros(rewards, size)
        """[K, H] of rewards that are not asked for."""
        if mechanism == "linear":
            self.weight, self.bias = zeros(rewards, size), zeros(rewards, size)
        elif mechanism == "token":
            self.table = zeros(rewards, bins, size)
        else:
            self.direction: Tensor
            self.register_buffer("direction", torch.zeros(rewards, size))

    @torch.no_grad()
    def start(self, embedding: nn.Module, *, seed: int, ones: bool) -> None:
        """Values before training, from the model's input embedding.

        Args:
            ones: directions of 1 everywhere instead of random ones of an embedding's length (add and replace).
        """
        matrix: Tensor = embedding.weight  # type: ignore[assignment]
        base = self._answer(embedding, self.base_id)
        longest = int(matrix.float().norm(dim=-1).argmax())  # not the base token, whose row may be a pad's zeros
        scale = self._answer(embedding, longest).norm() / matrix[longest].float().norm().cpu()  # families scale theirs
        generator = torch.Generator().manual_seed(seed)
        self.open.copy_(base.expand_as(self.open))
        if self.mechanism == "linear":
            self.bias.copy_(base.expand_as(self.bias))
        elif self.mechanism == "token":
            rows = matrix.float()
            noise = torch.randn(self.table.shape, generator=generator)
            self.table.copy_(scale * (rows.mean().cpu() + rows.std().cpu() * noise))
        elif ones:
            self.direction.fill_(1.0)
        else:
            noise = torch.randn(self.direction.shape, generator=generator)
            length = scale * matrix.float().norm(dim=-1).mean().cpu()
            self.direction.copy_(noise / noise.norm(dim=-1, keepdim=True) * length)

    def _answer(self, embedding: nn.Module, token: int) -> Tensor:
        """[H] of a token, as the model's embedding answers (scaled, where it scales)."""
        device = next(embedding.parameters()).device
        answer: Tensor = embedding(torch.tensor([token], device=device))
        return answer[0].float().cpu()

    def forward(self, ids: Tensor, base: Tensor) -> Tensor:
        """[N] slot ids -> [N, H].

        Args:
            base: [H] the base token's embedding now.
        """
        rewards, values, absent = read_slots(ids)
        if self.mechanism == "linear":
            asked = values[:, None] * self.weight[rewards] + self.bias[rewards]
        elif self.mechanism == "token":
            asked = self.table[rewards, values.long()]
        else:
            asked = values[:, None] * self.direction[rewards]
            if self.mechanism == "add":
                asked = base.float() + asked
        return torch.where(absent[:, None], self.open[rewards], asked).to(base.dtype)

    @contextmanager
    def embedded(self, embedding: Any) -> Iterator[None]:
        """A block in which the model's input embedding answers ids below 0 with slots."""
        plain = embedding.forward

        def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            at_slots = ids < 0
            answer: Tensor = plain(ids.clamp(min=0), *args, **kwargs)
            if not bool(at_slots.any()):
                return answer
            base = plain(ids.new_full((1,), self.base_id), *args, **kwargs)[0]
            return answer.index_put((at_slots,), self(ids[at_slots], base).to(answer.dtype))

        with replaced_forward(embedding, forward):
            yield


def make_slots(policy_model: Any, *, mechanism: str, rewards: int, bins: int, base_id: int) -> RewardSlots:
    """Slots that fit a causal LM; their values are still to be set by ``start``, or loaded.

    Raises:
        ModelError: the model has no input embedding of the usual kind.
    """
    embedding = policy_model.get_input_embeddings()
    if getattr(embedding, "weight", None) is None or embedding.weight.dim() != 2:
        raise ModelError(
            f"{type(policy_model).__name__} has no plain input embedding, so reward slots cannot stand in its prompts; "
            "use the mechanism text, or add the family (docs/extending.md)"
        )
    size = int(embedding.weight.shape[1])
    return RewardSlots(mechanism, rewards=rewards, bins=bins, base_id=base_id, size=size).to(embedding.weight.device)
