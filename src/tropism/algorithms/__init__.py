"""The methods. Adding one is one file and one line here."""

from __future__ import annotations

from tropism.algorithms.base import AlgorithmConfig
from tropism.algorithms.conditioned import Online, RewardConditioned
from tropism.algorithms.dpo import DPO
from tropism.algorithms.grpo import GRPO
from tropism.algorithms.ilql import ILQL
from tropism.algorithms.kl_control import KLControl
from tropism.algorithms.kto import KTO
from tropism.algorithms.ppo import PPO, Critic, MissingEos
from tropism.algorithms.quark import Quark
from tropism.algorithms.reward_modeling import RewardModeling
from tropism.algorithms.rft import RFT
from tropism.algorithms.rloo import RLOO
from tropism.algorithms.sft import SFT

ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "sft": SFT,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "conditioned": RewardConditioned,
    "quark": Quark,
    "rft": RFT,
    "dpo": DPO,
    "kto": KTO,
    "ilql": ILQL,
    "reward-model": RewardModeling,
}

INFERENCE_ONLY: dict[str, str] = {
    "best-of-n": "It samples n completions and gives the one with the highest reward: "
    "policy.best_of(prompts, reward, n=16), or tropism evaluate MODEL --reward R --data FILE --best-of 1,4,16. "
    "To train a model to answer so at once: algorithm: {name: rft, preset: best-of-n}",
}
"""Names of methods that change no weights, and what to call instead of training."""

__all__ = [
    "ALGORITHMS",
    "DPO",
    "GRPO",
    "ILQL",
    "INFERENCE_ONLY",
    "KTO",
    "PPO",
    "RFT",
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
