"""Checks on the real model and prompts before the first update: what is wrong fails here, loudly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tropism.errors import NumericsError
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.rollouts.config import Sampling
from tropism.rollouts.protocol import Sampler
from tropism.rollouts.randomness import StreamKey
from tropism.types import Prompt, Rollouts

EXACT_LIMIT = 1e-2
"""Nats by which sampling and training forward may differ in fp32 before a run is refused."""
REDUCED_LIMIT = 0.5
"""The same where the arithmetic is bf16; there old log-probs are recomputed."""
NEW_TOKENS = 8
EXTRA_PADS = 3


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What the checks measured, in nats per token."""

    sampler_mismatch: float
    """Largest |log-prob while sampling - log-prob in the training forward|."""
    padding_mismatch: float
    """Largest change of a log-prob when every row gets padding on its left, too."""
    reference_kl: float | None
    """Largest |log-prob of policy - log-prob of reference| from the same forward path; None without a reference."""


@torch.no_grad()
def sample_rows(
    policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], *, sampling: Sampling, seed: int
) -> tuple[list[Prompt], Rollouts]:
    """A few tokens for two prompts of different lengths (one where there is only one)."""
    ordered = sorted(prompts, key=lambda p: len(p.ids))
    chosen = [ordered[0], ordered[len(ordered) // 2]][: len(prompts)]
    short = replace(sampling, min_new_tokens=min(1, sampling.min_new_tokens)).shortened(NEW_TOKENS)
    rollouts = sampler.generate(policy, chosen, short, 1, key=StreamKey(seed=seed, purpose="checks"))
    return chosen, rollouts.to(policy.device)


@torch.no_grad()
def preflight(
    policy: Policy,
    reference: Reference | None,
    rollouts: Rollouts,
    *,
    exact: bool,
    fresh: bool,
    eos_ids: Sequence[int] = (),
) -> PreflightReport:
    """Compare every path to the same log-probs.

    Checked are: log-probs out of (cached) sampling against one training forward, which covers positions, padding
    and cache; right against left padding; that a final eos is learned, not masked; and, before the first update,
    policy against reference (ratio 1, KL 0).

    Args:
        rollouts: of ``sample_rows``.
        exact: fp32 arithmetic.
        fresh: nothing was trained yet, so policy and reference must be equal.
        eos_ids: the model's; empty where it has none.

    Raises:
        NumericsError: a check failed; the message says which, by how much, and the likely cause.
    """
    forward = _logprobs(policy, rollouts)
    limit = EXACT_LIMIT if exact else REDUCED_LIMIT
    report = PreflightReport(
        sampler_mismatch=_largest(forward - rollouts.logprobs),
        padding_mismatch=_padding_mismatch(policy, rollouts, forward),
        reference_kl=_reference_gap(reference, rollouts, forward) if reference is not None else None,
    )
    # Written so that NaN fails.
    if not report.sampler_mismatch <= limit:
        raise NumericsError(
            f"log-probs of sampling and of the training forward differ by {report.sampler_mismatch:.3g} "
            f"nats (limit {limit}): the model's cache, positions or dropout are not what training assumes. "
            "Please report the model"
        )
    if not report.padding_mismatch <= limit:
        raise NumericsError(
            f"log-probs change by {report.padding_mismatch:.3g} nats when rows are padded on the left (limit {limit}): "
            "the model mishandles attention masks or positions. Please report the model"
        )
    if eos_ids and not _learns_eos(policy, rollouts, eos_ids[0]):
        raise NumericsError(
            f"the eos token {eos_ids[0]} at the end of a completion has no log-prob: it is masked, so the model would "
            "never learn to stop. Please report the model"
        )
    if fresh and report.reference_kl:
        raise NumericsError(
            f"before the first update policy and reference differ by {report.reference_kl:.3g} nats; they must be "
            "equal. Is the adapter fresh, and dropout off?"
        )
    return report


def _logprobs(policy: Any, rollouts: Rollouts) -> Tensor:
    output = policy(**rollouts.inputs, temperature=rollouts.temperature)
    return output.logprobs.float()  # type: ignore[no-any-return]


def _learns_eos(policy: Policy, rollouts: Rollouts, eos_id: int) -> bool:
    """Whether a completion that is the eos alone has a log-prob, also where eos is the pad or begins the prompt."""
    ended = replace(
        rollouts,
        completion_ids=torch.full_like(rollouts.completion_ids[:, :1], eos_id),
        completion_lengths=torch.ones_like(rollouts.completion_lengths),
    )
    return bool((_logprobs(policy, ended) < 0).all())


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _padding_mismatch(policy: Policy, rollouts: Rollouts, right: Tensor) -> float:
    # The extra columns put pads before every row, also where all prompts have the same length.
    widened = replace(rollouts, prompt_ids=torch.nn.functional.pad(rollouts.prompt_ids, (EXTRA_PADS, 0)))
    before = policy.padding
    try:
        policy.padding = "both"
        return _largest(_logprobs(policy, widened) - right)
    finally:
        policy.padding = before


def _reference_gap(reference: Reference, rollouts: Rollouts, forward: Tensor) -> float:
    with reference.active() as model:
        return _largest(_logprobs(model, rollouts) - forward)
