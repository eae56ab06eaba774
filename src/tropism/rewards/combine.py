"""From what each term said to the reward that training sees: weighted sum, clip, scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ConfigError, RewardError
from tropism.rewards.config import RewardConfig
from tropism.rewards.raw import RawRewards, Value
from tropism.types import RewardBatch

_ROUNDING = 1e-9
"""A standard deviation below this share of the mean is rounding of equal rewards, not spread."""


@dataclass(kw_only=True)
class RunningMoments:
    """Mean and population variance of every reward seen, merged batch by batch (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""
    reference_std: float | None = None
    """Standard deviation of the first batch that had one."""

    def update(self, rewards: Tensor) -> None:
        """Add the rewards [N] (fp64) of a batch."""
        added = rewards.numel()
        if added == 0:
            return
        mean = float(rewards.mean())
        batch = RunningMoments(count=added, mean=mean, squares=float((rewards - mean).square().sum()))
        if self.reference_std is None:
            self.reference_std = batch.std
        total = self.count + added
        shift = mean - self.mean
        self.squares += batch.squares + shift * shift * self.count * added / total
        self.mean += shift * added / total
        self.count = total

    @property
    def std(self) -> float | None:
        """Population standard deviation; None of fewer than two rewards or of equal ones."""
        if self.count < 2:
            return None
        std = math.sqrt(self.squares / self.count)
        return std if std > _ROUNDING * abs(self.mean) else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; floats survive JSON exactly."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved state.

        Raises:
            ConfigError: the state has not exactly the expected entries.
        """
        if set(state) != set(vars(self)):
            raise ConfigError(f"reward state: expected {sorted(vars(self))}, found {sorted(state)}")
        vars(self).update(state)


def combine_rewards(
    raw: RawRewards,
    config: RewardConfig,
    moments: RunningMoments,
    lengths: Tensor,
    width: int,
    *,
    update_moments: bool,
    unscaled: bool,
) -> RewardBatch:
    """The reward of each completion and, where a term gives one, of each token.

        r = sum_k weight_k * term_k   over the terms that are not None
        r' = clip(r, -c, c)           the part for the whole completion, and each token's part
        r'' = r' / std   or   (r' - mean) / std

    Moments are of the clipped total of each scored completion (token rewards summed), this batch included when
    ``update_moments``. When normalising, the mean is subtracted once per completion, from the part for the whole.

    Args:
        raw: B rows, of all processes.
        lengths: [B] tokens of each completion.
        width: T >= longest length.
        update_moments: let ``moments`` move.
        unscaled: return r itself.

    Raises:
        RewardError: rows do not match ``lengths``, or a weighted sum exceeds fp32.
    """
    _check_shapes(raw, lengths, width)
    whole, tokens, scored = _weighted_sums(raw, config, width)
    totals = whole + tokens.sum(-1)
    _check_range(totals)
    metrics = _metrics(raw, totals[scored])
    if config.clip is not None:
        clipped, clipped_tokens = whole.clamp(-config.clip, config.clip), tokens.clamp(-config.clip, config.clip)
    else:
        clipped, clipped_tokens = whole, tokens
    if update_moments:
        moments.update((clipped + clipped_tokens.sum(-1))[scored])
    if not unscaled:
        mean, divisor = _shift_and_divisor(config, moments)
        whole = torch.where(scored, (clipped - mean) / divisor, 0.0)
        tokens = clipped_tokens / divisor
        if config.scale != "none" or config.normalise:
            metrics["reward/scale"] = divisor
    token_terms = _token_terms(raw)
    return RewardBatch(
        per_completion=whole.float().to(lengths.device),
        per_token=tokens.float().to(lengths.device) if token_terms else None,
        scored=scored.to(lengths.device),
        terms={name: _sums(values).float().to(lengths.device) for name, values in raw.values.items()},
        metrics=metrics,
        extras=dict(raw.extras),
        token_terms=token_terms,
        errors=dict(raw.errors),
    )


def _token_terms(raw: RawRewards) -> dict[str, list[list[float] | None]]:
    """The terms that give rewards per token to any completion."""
    return {
        name: [value if isinstance(value, list) else None for value in values]
        for name, values in raw.values.items()
        if any(isinstance(value, list) for value in values)
    }


def _check_shapes(raw: RawRewards, lengths: Tensor, width: int) -> None:
    if lengths.dim() != 1 or lengths.shape[0] != len(raw):
        raise RewardError(f"{len(raw)} rewards do not match lengths of shape {tuple(lengths.shape)}; expected [B]")
    counts = lengths.tolist()
    if counts and width < max(counts):
        raise RewardError(f"width {width} is less than the longest completion, {max(counts)} tokens")
    for name, values in raw.values.items():
        for row, (value, count) in enumerate(zip(values, counts, strict=True)):
            if isinstance(value, list) and len(value) != count:
                raise RewardError(f"reward {name!r}, row {row}: {len(value)} per-token rewards for {count} tokens")


def _weighted_sums(raw: RawRewards, config: RewardConfig, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 [B] for whole completions, fp64 [B, T] for tokens, bool [B] scored by a term whose weight counts."""
    rows = len(raw)
    whole = torch.zeros(rows, dtype=torch.float64)
    tokens = torch.zeros(rows, width, dtype=torch.float64)
    scored = torch.zeros(rows, dtype=torch.bool)
    for name, term in config.terms.items():
        if term.weight == 0:
            continue
        for row, value in enumerate(raw.values[name]):
            if value is None:
                continue
            scored[row] = True
            if isinstance(value, list):
                tokens[row, : len(value)] += term.weight * torch.tensor(value, dtype=torch.float64)
            else:
                whole[row] += term.weight * value
    return whole, tokens, scored


def _check_range(totals: Tensor) -> None:
    beyond = torch.nonzero(~torch.isfinite(totals.float())).flatten().tolist()
    if beyond:
        raise RewardError(f"the weighted reward of row {beyond[0]} is {float(totals[beyond[0]])}: lower the weights")


def _shift_and_divisor(config: RewardConfig, moments: RunningMoments) -> tuple[float, float]:
    if config.normalise:
        return moments.mean, moments.std or 1.0
    if config.scale == "running":
        return 0.0, moments.std or 1.0
    if config.scale == "reference":
        return 0.0, moments.reference_std or 1.0
    return 0.0, 1.0


def _sums(values: Sequence[Value]) -> Tensor:
    """[B] fp64: each value, token rewards summed, NaN for None."""
    plain = [math.nan if value is None else sum(value) if isinstance(value, list) else value for value in values]
    return torch.tensor(plain, dtype=torch.float64)


def _metrics(raw: RawRewards, totals: Tensor) -> dict[str, float]:
    """Metrics of the raw reward. A mean of nothing is left out rather than logged as NaN."""
    metrics = {name: sum(values) / len(values) for name, values in raw.metrics.items() if values}
    if len(totals):
        metrics["reward/mean"] = float(totals.mean())
        metrics["reward/std"] = float(totals.std(correction=0))
    if len(raw):
        metrics["reward/unscored"] = 1.0 - len(totals) / len(raw)
    for name, values in raw.values.items():
        sums = _sums([value for value in values if value is not None])
        if len(sums):
            metrics[f"reward/{name}"] = float(sums.mean())
    return metrics | _count_metrics(raw)


def _count_metrics(raw: RawRewards) -> dict[str, float]:
    """What happened to the calls of each term. Rewards from a cache count as speed: equal runs may differ in them."""
    metrics: dict[str, float] = {}
    for name, counts in raw.counts.items():
        named = {
            f"reward/{name}/failed": counts.get("failed"),
            f"reward/{name}/skipped": counts.get("skipped"),
            f"reward/{name}/timeouts": counts.get("timeouts"),
            f"reward/{name}/retries": counts.get("retries"),
            f"throughput/cached/{name}": counts.get("cached"),
        }
        metrics |= {metric: float(count) for metric, count in named.items() if count}
    return metrics
