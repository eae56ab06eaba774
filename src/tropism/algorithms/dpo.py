"""DPO: preferences learned directly, the log-ratio to the reference being the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tropism.algorithms.base import Algorithm, AlgorithmConfig, Ratios, RunFacts
from tropism.ops import dpo_loss
from tropism.preferences import PairBatch
from tropism.types import Sums

Variant = Literal["sigmoid", "ipo", "hinge"]


@dataclass(frozen=True, kw_only=True)
class DPO(AlgorithmConfig):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) on pairs of a chosen and a rejected
    completion, without a reward model and without sampling."""

    name: ClassVar[str] = "dpo"
    learns_from: ClassVar[str] = "pairs of completions, one of them preferred"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"beta": 0.1},
        "paper/summaries": {"beta": 0.5},
        "trl": {"beta": 0.1, "max_length": 1024},
    }

    beta: float = 0.1
    """How strongly the reference holds: the smaller, the further the policy goes for the same preferences."""
    variant: Variant = "sigmoid"
    """The loss: sigmoid (DPO), ipo (https://arxiv.org/abs/2310.12036, with log-ratios per token) or hinge
    (https://arxiv.org/abs/2305.10425)."""
    label_smoothing: float = 0.0
    """Assumed probability that a preference is the wrong way round, at most one half; for sigmoid alone."""
    reference_free: bool = False
    """Take the log-prob itself in place of the log-ratio; nothing then holds the policy to where it began."""
    max_length: int | None = None
    """Longer texts are cut at this many tokens (their end is then not learned); None: the model's context."""
    shuffle: bool = True
    """A new order in every pass over the data; False keeps the order of the file."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError("beta must be positive and finite")
        if self.variant not in ("sigmoid", "ipo", "hinge"):
            raise ValueError(f"variant must be sigmoid, ipo or hinge, not {self.variant!r}")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError("label_smoothing must lie between 0 and 0.5")
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError(f"label_smoothing means nothing for {self.variant}; leave one of the two out")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError("max_length must be at least 2, or None for the model's context")

    @property
    def reads(self) -> Literal["pairs"]:
        return "pairs"

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    def build(self, facts: RunFacts) -> DPOAlgorithm:
        return DPOAlgorithm(self, facts)


class DPOAlgorithm(Algorithm[DPO]):
    """DPO in a run; it has no state of its own."""

    def loss(self, policy: Any, batch: PairBatch) -> tuple[Sums, Ratios]:
        """The variant's loss of every pair, times its weight, from one pass over both completions."""
        rows = batch.rows
        return self.judge(batch.per_item(policy(**rows.inputs, want=frozenset({"logprobs"})).logprobs), batch)

    def judge(self, logprobs: Tensor, batch: PairBatch) -> tuple[Sums, Ratios]:
        """Sums over pairs, and the numbers for the log.

        Args:
            logprobs: [B, 2] of both completions under the policy, each summed over its tokens.
        """
        own, reference = logprobs, batch.ref_logprobs
        if self.config.variant == "ipo":
            # The paper's log-ratios are sums; its authors' results, and TRL's loss, are with means over the tokens, or
            # the target 1 / (2 beta) would be nearer for long completions than for short ones.
            own, reference = own / batch.lengths, reference / batch.lengths
        losses = dpo_loss(
            *own.unbind(1),
            *reference.unbind(1),
            beta=self.config.beta,
            variant=self.config.variant,
            label_smoothing=self.config.label_smoothing,
        )
        return {"preference": (losses * batch.weights).sum()}, self._ratios(logprobs, batch)

    @torch.no_grad()
    def _ratios(self, logprobs: Tensor, batch: PairBatch) -> Ratios:
        """Implicit rewards, beta times the log-ratio, of pairs that count."""
        counted = batch.weights > 0
        rewards = self.config.beta * (logprobs - batch.ref_logprobs)[counted]
        chosen, rejected = rewards.unbind(1)
        count = counted.sum()
        return {
            "implicit/chosen": (chosen.sum(), count),
            "implicit/rejected": (rejected.sum(), count),
            "implicit/margin": ((chosen - rejected).sum(), count),
            "implicit/accuracy": ((chosen > rejected).sum(), count),
        }

    def weight(self, batch: PairBatch) -> dict[str, float]:
        return {"preference": float(batch.weights.sum())}
