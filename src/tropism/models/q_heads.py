"""Values of states and actions on top of a language model: a V head, Q heads over the vocabulary, and their targets."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tropism.ops import taken_and_logsumexp

WantedOfHeads = Literal["state_values", "q", "q_logsumexp", "target_q"]
WANTED = frozenset(get_args(WantedOfHeads))
"""What the heads can be asked for at completion tokens, see ``QHeads.at_tokens``."""


class HeadMLP(nn.Module):
    """Linear(H, 2H), ReLU, Linear(2H, out), in fp32 whatever the precision of the trunk.

    The last layer starts at zero, so that before training nothing is worth more than anything else.
    """

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        # Without torch's own start values, for which it would draw from the global generator.
        self.inner = cast(nn.Linear, nn.utils.skip_init(nn.Linear, hidden_size, 2 * hidden_size, dtype=torch.float32))
        self.outer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, 2 * hidden_size, outputs, dtype=torch.float32))

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """The values before training: torch's usual range in the first layer, zero in the last."""
        bound = 1 / math.sqrt(self.inner.in_features)
        for parameter in (self.inner.weight, self.inner.bias):
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(
        self, hidden: Tensor, ids: Tensor | None = None, *, chunk_size: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Outputs, all of them or one per row.

        Args:
            hidden: [..., H]; [N, H] with ids.
            ids: [N] the output to take of each row; None: all outputs [..., out].
            chunk_size: above 0 the logsumexp over all outputs [N] comes with it, for so many rows at a time.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            inner = torch.relu(self.inner(hidden.float()))
            if ids is None:
                return cast(Tensor, self.outer(inner))
            weight, bias = self.outer.weight, self.outer.bias
            if chunk_size:
                return taken_and_logsumexp(inner, weight, bias, ids, chunk_size=chunk_size)
            return (inner * weight[ids]).sum(-1) + bias[ids]


class QHeads(nn.Module):
    """V(s), Q_i(s, a) for every token a, and frozen copies of the Q_i that follow them slowly.

    ILQL, https://arxiv.org/abs/2206.11871.

    Args:
        hidden_size: H, of what the vocabulary projection reads.
        vocabulary: V, the actions.
        count: Q heads, 1 or 2.
    """

    def __init__(self, hidden_size: int, vocabulary: int, *, count: int = 2) -> None:
        super().__init__()
        self.value = HeadMLP(hidden_size, 1)
        self.q = nn.ModuleList(HeadMLP(hidden_size, vocabulary) for _ in range(count))
        self.targets = copy.deepcopy(self.q).requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        return self.value.inner.in_features

    @property
    def vocabulary(self) -> int:
        """Actions: rows of the output embedding."""
        return cast(HeadMLP, self.q[0]).outer.out_features

    def start(self, *, seed: int) -> None:
        """Values before training; the targets are equal to the Q heads."""
        generator = torch.Generator().manual_seed(seed)
        for head in (self.value, *self.q):
            cast(HeadMLP, head).start(generator)
        self.sync(1.0)

    def parts(self) -> Iterator[HeadMLP]:
        """Every network by itself; sharded weights are gathered one after the other."""
        for head in (self.value, *self.q, *self.targets):
            yield cast(HeadMLP, head)

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """Move the targets towards the Q heads: target <- alpha Q + (1 - alpha) target."""
        for target, own in zip(self.targets.parameters(), self.q.parameters(), strict=True):
            if alpha == 1:
                _here(target).copy_(_here(own))
            else:
                _here(target).lerp_(_here(own), alpha)

    def at_tokens(self, hidden: Tensor, ids: Tensor, want: Collection[str], *, chunk_size: int) -> dict[str, Tensor]:
        """What is wanted of the states [N, H] in which the tokens ``ids`` [N] were taken.

        Args:
            want: any of ``state_values`` [N]; ``q`` [N, K], the value of the token by each Q head; ``q_logsumexp``
                [N, K] over all tokens; ``target_q`` [N], the least that a target says of the token, without gradient.
            chunk_size: rows for which values of all tokens may exist at a time.
        """
        found: dict[str, Tensor] = {}
        if "state_values" in want:
            found["state_values"] = cast(Tensor, self.value(hidden)).squeeze(-1)
        if "q_logsumexp" in want:
            pairs = [head(hidden, ids, chunk_size=chunk_size) for head in self.q]
            found["q"] = torch.stack([taken for taken, _ in pairs], dim=-1)
            found["q_logsumexp"] = torch.stack([total for _, total in pairs], dim=-1)
        elif "q" in want:
            found["q"] = torch.stack([head(hidden, ids) for head in self.q], dim=-1)
        if "target_q" in want:
            with torch.no_grad():
                found["target_q"] = torch.stack([head(hidden, ids) for head in self.targets], dim=-1).amin(-1)
        return {name: values for name, values in found.items() if name in want}

    def advantages(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], fp32: what every token is worth beyond its state, min_i target_i(s, a) - V(s)."""
        worth = torch.stack([head(hidden) for head in self.targets]).amin(0)
        advantages: Tensor = worth - self.value(hidden)
        return advantages


def _here(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is. Targets are sharded as the Q heads are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
