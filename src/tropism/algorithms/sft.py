"""SFT: maximum likelihood of given texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tropism.algorithms.base import Algorithm, AlgorithmConfig, Ratios, RunFacts, count_tokens
from tropism.ops import masked_sum
from tropism.types import DemonstrationBatch, Sums


@dataclass(frozen=True, kw_only=True)
class SFT(AlgorithmConfig):
    """Supervised fine-tuning on demonstrations: prompt with completion, chat messages, or plain text."""

    name: ClassVar[str] = "sft"
    learns_from: ClassVar[str] = "demonstrations"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"trl": {}, "trlx": {"completion_only": False}}

    completion_only: bool = True
    """Learn from the completion alone; False also from the prompt. Plain texts are learned whole either way."""
    max_length: int | None = None
    """Longer texts are cut at this many tokens (their end is then not learned); None: the model's context."""
    shuffle: bool = True
    """A new order in every pass over the data; False keeps the order of the file."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError("max_length must be at least 2, or None for the model's context")

    @property
    def reads(self) -> Literal["demonstrations"]:
        return "demonstrations"

    def build(self, facts: RunFacts) -> SFTAlgorithm:
        return SFTAlgorithm(self, facts)


class SFTAlgorithm(Algorithm[SFT]):
    """SFT in a run; it has no state of its own."""

    def loss(self, policy: Any, batch: DemonstrationBatch) -> tuple[Sums, Ratios]:
        """-sum of log-probs of the learned tokens."""
        logprobs = policy(**batch.inputs, mask=batch.loss_mask, want=frozenset({"logprobs"})).logprobs
        return {"nll": -masked_sum(logprobs, batch.loss_mask)}, {}

    def weight(self, batch: DemonstrationBatch) -> dict[str, float]:
        return {"nll": count_tokens(batch)}
