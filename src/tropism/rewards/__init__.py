"""Rewards: what a run is turned toward. Torch is imported when the harness is, not with the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tropism.rewards.config import RewardConfig, RewardTerm
from tropism.rewards.registry import RewardFn, register, reward_names

if TYPE_CHECKING:
    from tropism.rewards.harness import RewardHarness
    from tropism.rewards.raw import RawRewards

__all__ = ["RawRewards", "RewardConfig", "RewardFn", "RewardHarness", "RewardTerm", "register", "reward_names"]


def __getattr__(name: str) -> Any:
    if name == "RewardHarness":
        from tropism.rewards.harness import RewardHarness

        return RewardHarness
    if name == "RawRewards":
        from tropism.rewards.raw import RawRewards

        return RawRewards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
