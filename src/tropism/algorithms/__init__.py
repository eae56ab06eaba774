"""The methods. Adding one is one file and one line here."""

from __future__ import annotations

from tropism.algorithms.base import AlgorithmConfig
from tropism.algorithms.conditioned import Online, RewardConditioned
from tropism.algorithms.grpo import GRPO
from tropism.algorithms.kl_control import KLControl
from tropism.algorithms.ppo import PPO, Critic, MissingEos
from tropism.algorithms.quark import Quark
from tropism.algorithms.reward_modeling import RewardModeling
from tropism.algorithms.rloo import RLOO
from tropism.algorithms.sft import SFT

ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "sft": SFT,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "conditioned": RewardConditioned,
    "quark": Quark,
    "reward-model": RewardModeling,
}

__all__ = [
    "ALGORITHMS",
    "GRPO",
    "PPO",
    "RLOO",
    "SFT",
    "AlgorithmConfig",
    "Critic",
    "KLControl",
    "MissingEos",
    "Online",
    "Quark",
    "RewardConditioned",
    "RewardModeling",
]
