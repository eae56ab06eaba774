"""Held-out evaluation: the same prompts and the same randomness every time, so that before and after are paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tropism.algorithms.base import Scorer
from tropism.evaluation.text_quality import distinct_n
from tropism.ops import kl_k1, masked_sum
from tropism.redaction import redact_values
from tropism.training.rollout_maker import CompletionMaker, RolloutMaker
from tropism.training.run_folder import as_text
from tropism.types import Batch, Metrics, Prompt, RewardBatch, RewardInputs, Rollouts, pad_rows

T = TypeVar("T")
Table = dict[str, list[Any]]


class Measures(Protocol):
    """Numbers about completions by name, one per completion, None where there is none."""

    def evaluate(self, inputs: RewardInputs, *, first_row: int = 0) -> dict[str, list[float | None]]: ...


class RewardEvaluation:
    """One completion of every held-out prompt, scored by the reward, with its KL to the reference.

    Args:
        maker: completes the prompts; one without rewards leaves them unscored.
        condition: what the prompts are sampled with instead, in their order: those of a model that is asked for a
            reward. Rewards and reference see the plain prompts. None: the prompts themselves.
        measures: further numbers about the completions; None: none.
        settings: makers that sample in other ways, by label. Their metrics and columns have ``@label`` at the end.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        maker: CompletionMaker,
        reference: Scorer | None,
        condition: Callable[[Sequence[Prompt]], Sequence[Prompt]] | None = None,
        measures: Measures | None = None,
        settings: Mapping[str, CompletionMaker] | None = None,
    ) -> None:
        self.prompts, self.maker, self.reference, self.condition = prompts, maker, reference, condition
        self.measures, self.settings = measures, settings or {}

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, step: int, *, collect: int = 0) -> tuple[Metrics, Table]:
        """Metrics, and one row per prompt in the order of the prompts.

        Args:
            collect: another number gives other completions of the same prompts.
        """
        own = self._sampled(self.maker, step, collect)
        metrics, table = dict(own[0]), dict(own[1])
        for label, maker in self.settings.items():
            # Equal settings and keys give equal completions, so they are not sampled twice.
            numbers, columns = own if maker.sampling == self.maker.sampling else self._sampled(maker, step, collect)
            metrics |= {f"{name}@{label}": value for name, value in numbers.items()}
            table |= {f"{name}@{label}": values for name, values in columns.items() if name != "prompt"}
        return metrics, table

    def _sampled(self, maker: CompletionMaker, step: int, collect: int) -> tuple[Metrics, Table]:
        """The same for one way to sample."""
        asked = self.prompts if self.condition is None else self.condition(self.prompts)
        rollouts = maker.sample(asked, purpose="evaluation", collect=collect)
        state = {"step": step}
        if isinstance(maker, RolloutMaker):
            inputs, rewards = maker.score(rollouts, self.prompts, state, raw=True)
            metrics, scores = _reward_metrics(rewards), _reward_columns(rewards)
        else:
            inputs = maker.transcribe(rollouts, self.prompts, state)
            metrics, scores = {}, {"reward": [math.nan] * len(rollouts)}
        kl = self._sequence_kl(rollouts)
        lengths = rollouts.seen_lengths
        completions = [as_text(completion) for completion in inputs.completions]
        metrics |= {
            "eval/length_mean": float(lengths.float().mean()),
            "eval/eos_fraction": sum(reason == "eos" for reason in rollouts.finish_reasons) / len(rollouts),
            "eval/distinct_2": distinct_n(completions, 2),
        }
        if self.reference is not None:
            metrics["eval/sequence_kl"] = float(kl.mean())
        table: Table = {
            "prompt": [as_text(prompt) for prompt in inputs.prompts],
            "completion": completions,
            "length": lengths.tolist(),
            "sequence_kl": kl.tolist(),
            "finish_reason": list(rollouts.finish_reasons),
            **scores,
        }
        for name, values in self._measured(maker, inputs).items():
            numbers = [math.nan if value is None else value for value in values]
            metrics[f"eval/{name}"] = float(torch.tensor(numbers, dtype=torch.float64).nanmean())
            table[f"metric/{name}"] = numbers
        return metrics, table

    def _sequence_kl(self, rollouts: Rollouts) -> Tensor:
        """[B] nats; NaN where there is no reference."""
        if self.reference is None:
            return torch.full((len(rollouts),), float("nan"))
        plain = replace(
            rollouts,
            prompt_ids=pad_rows([prompt.ids for prompt in self.prompts], left=True),
            prompt_lengths=torch.tensor([len(prompt.ids) for prompt in self.prompts]),
        )
        ref_logprobs = self.reference.logprobs(plain, temperature=rollouts.temperature)
        return (kl_k1(rollouts.logprobs, ref_logprobs) * rollouts.completion_mask).sum(-1)

    def _measured(self, maker: CompletionMaker, inputs: RewardInputs) -> dict[str, list[float | None]]:
        """What ``measures`` says of all completions; each process asks it about its share."""
        measures = self.measures
        if measures is None:
            return {}
        first, mine = maker.processes.share(range(len(inputs)))
        own = inputs.rows(first, first + len(mine))
        parts = maker.processes.together(lambda: (len(own), measures.evaluate(own, first_row=first)))
        names = dict.fromkeys(name for _, part in parts for name in part)
        return {name: [value for rows, part in parts for value in part.get(name, [None] * rows)] for name in names}


def _reward_metrics(rewards: RewardBatch) -> Metrics:
    scored = torch.where(rewards.scored, rewards.totals, torch.nan)
    return {
        "eval/reward": float(scored.nanmean()),
        **{f"eval/reward/{name}": float(values.nanmean()) for name, values in rewards.terms.items()},
        **{
            f"eval/reward/{name}/skipped": float(sum(reason is not None for reason in reasons))
            for name, reasons in rewards.errors.items()
        },
    }


def _reward_columns(rewards: RewardBatch) -> Table:
    return {
        "reward": torch.where(rewards.scored, rewards.totals, torch.nan).tolist(),
        **{f"reward/{name}": values.tolist() for name, values in rewards.terms.items()},
        **{f"error/{name}": redact_values(reasons) for name, reasons in rewards.errors.items()},
    }


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
