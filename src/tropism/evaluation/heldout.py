"""Held-out evaluation: the same prompts and the same randomness every time, so that before and after are paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tropism.algorithms.base import Scorer
from tropism.data.demonstrations import Demonstration, collate_demonstrations
from tropism.evaluation.text_quality import distinct_n
from tropism.ops import kl_k1, masked_sum
from tropism.redaction import redact_values
from tropism.rewards import RewardHarness
from tropism.rollouts.config import Sampling
from tropism.rollouts.protocol import Sampler
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.training.processes import Processes
from tropism.training.run_folder import as_text
from tropism.types import Metrics, Prompt, Rollouts

Table = dict[str, list[Any]]


class RewardEvaluation:
    """One completion of every held-out prompt, scored by the reward, with its KL to the reference."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        policy: Any,
        sampler: Sampler,
        sampling: Sampling,
        harness: RewardHarness,
        transcribe: Transcriber,
        reference: Scorer | None,
        processes: Processes,
        seed: int,
    ) -> None:
        self.prompts = prompts
        self.policy, self.sampler, self.sampling = policy, sampler, sampling
        self.harness, self.transcribe, self.reference = harness, transcribe, reference
        self.processes, self.seed = processes, seed

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, step: int) -> tuple[Metrics, Table]:
        """Metrics, and one row per prompt in the order of the prompts."""
        first, mine = self.processes.share(self.prompts)

        def sample() -> list[Rollouts]:
            if not mine:
                return []
            key = StreamKey(seed=self.seed, purpose="evaluation")
            with self.processes.accelerator.autocast():
                own = self.sampler.generate(self.policy, mine, self.sampling, key=key, first_index=first)
            return [own.to("cpu")]

        with self.processes.entered(self.policy.whole()):
            parts = self.processes.together(sample)
        rollouts = Rollouts.concat([rollouts for part in parts for rollouts in part])
        inputs = self.transcribe(rollouts, self.prompts, {"step": step})
        own = inputs.rows(first, first + len(mine))
        raw = self.processes.together(lambda: self.harness.evaluate(own, first_row=first))
        lengths, width = rollouts.completion_lengths, rollouts.completion_ids.shape[1]
        merged = type(raw[0]).concat(raw)
        rewards = self.harness.combine(merged, lengths, width, update_moments=False, unscaled=True)
        kl = torch.full((len(rollouts),), float("nan"))
        if self.reference is not None:
            ref_logprobs = self.reference.logprobs(rollouts, temperature=rollouts.temperature)
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


class LossEvaluation:
    """Mean negative log-likelihood of held-out demonstrations, per learned token."""

    def __init__(self, demonstrations: Sequence[Demonstration], *, scorer: Scorer) -> None:
        self.demonstrations = demonstrations
        self.scorer = scorer

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __call__(self, step: int) -> tuple[Metrics, Table | None]:
        total, count = 0.0, 0
        for begin in range(0, len(self.demonstrations), 256):
            batch = collate_demonstrations(self.demonstrations[begin : begin + 256])
            logprobs = self.scorer.logprobs(batch, temperature=1.0)
            total -= float(masked_sum(logprobs, batch.loss_mask))
            count += int(batch.loss_mask.sum())
        return {"eval/loss": total / max(1, count)}, None
