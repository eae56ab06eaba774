"""Held-out evaluation: the same prompts and the same randomness every time, so that before and after are paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch

from tropism.algorithms.base import Scorer
from tropism.evaluation.text_quality import distinct_n
from tropism.ops import kl_k1, masked_sum
from tropism.redaction import redact_values
from tropism.training.rollout_maker import RolloutMaker
from tropism.training.run_folder import as_text
from tropism.types import Batch, Metrics, Prompt, pad_rows

T = TypeVar("T")
Table = dict[str, list[Any]]


class RewardEvaluation:
    """One completion of every held-out prompt, scored by the reward, with its KL to the reference.

    Args:
        condition: what the prompts are sampled with instead, in their order: those of a model that is asked for a
            reward. Rewards and reference see the plain prompts. None: the prompts themselves.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        maker: RolloutMaker,
        reference: Scorer | None,
        condition: Callable[[Sequence[Prompt]], Sequence[Prompt]] | None = None,
    ) -> None:
        self.prompts, self.maker, self.reference, self.condition = prompts, maker, reference, condition

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, step: int, *, collect: int = 0) -> tuple[Metrics, Table]:
        """Metrics, and one row per prompt in the order of the prompts.

        Args:
            collect: another number gives other completions of the same prompts.
        """
        asked = self.prompts if self.condition is None else self.condition(self.prompts)
        rollouts = self.maker.sample(asked, purpose="evaluation", collect=collect)
        inputs, rewards = self.maker.score(rollouts, self.prompts, {"step": step}, raw=True)
        lengths = rollouts.seen_lengths
        kl = torch.full((len(rollouts),), float("nan"))
        if self.reference is not None:
            plain = replace(
                rollouts,
                prompt_ids=pad_rows([prompt.ids for prompt in self.prompts], left=True),
                prompt_lengths=torch.tensor([len(prompt.ids) for prompt in self.prompts]),
            )
            ref_logprobs = self.reference.logprobs(plain, temperature=rollouts.temperature)
            kl = (kl_k1(rollouts.logprobs, ref_logprobs) * rollouts.completion_mask).sum(-1)
        scored = torch.where(rewards.scored, rewards.totals, torch.nan)
        completions = [as_text(completion) for completion in inputs.completions]
        metrics: Metrics = {
            "eval/reward": float(scored.nanmean()),
            "eval/length_mean": float(lengths.float().mean()),
            "eval/eos_fraction": sum(reason == "eos" for reason in rollouts.finish_reasons) / len(rollouts),
            "eval/distinct_2": distinct_n(completions, 2),
            **{f"eval/reward/{name}": float(values.nanmean()) for name, values in rewards.terms.items()},
            **{
                f"eval/reward/{name}/skipped": float(sum(reason is not None for reason in reasons))
                for name, reasons in rewards.errors.items()
            },
        }
        if self.reference is not None:
            metrics["eval/sequence_kl"] = float(kl.mean())
        table: Table = {
            "prompt": [as_text(prompt) for prompt in inputs.prompts],
            "completion": completions,
            "reward": scored.tolist(),
            "length": lengths.tolist(),
            "sequence_kl": kl.tolist(),
            "finish_reason": list(rollouts.finish_reasons),
            **{f"reward/{name}": values.tolist() for name, values in rewards.terms.items()},
            **{f"error/{name}": redact_values(reasons) for name, reasons in rewards.errors.items()},
        }
        return metrics, table


class LossEvaluation(Generic[T]):
    """Mean negative log-likelihood of held-out texts, per learned token.

    Args:
        collate: texts -> a batch, as in training. A batch may have ``token_weights`` [B, T], 0 outside of its
            ``loss_mask``: then the mean is weighted by them, as the training loss of such a batch is.
    """

    def __init__(self, texts: Sequence[T], *, collate: Callable[[Sequence[T]], Batch], scorer: Scorer) -> None:
        self.texts, self.collate, self.scorer = texts, collate, scorer

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, step: int) -> tuple[Metrics, Table | None]:
        total = weight = 0.0
        for begin in range(0, len(self.texts), 256):
            batch = self.collate(self.texts[begin : begin + 256])
            logprobs = self.scorer.logprobs(batch, temperature=1.0)
            weights = getattr(batch, "token_weights", batch.loss_mask.to(logprobs.dtype)).to(logprobs.device)
            total -= float(masked_sum(weights * logprobs, batch.loss_mask))
            weight += float(weights.sum())
        return {"eval/loss": total / weight if weight else 0.0}, None
