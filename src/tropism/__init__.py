"""tropism turns a language model toward a reward, by every method that does it, and measures what each one bought."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The libraries below read these when they are imported: no telemetry, no count of loaded data sets, and no request to a
# third party to convert the weights of a hub model. What the user has set stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

if TYPE_CHECKING:
    from tropism.algorithms import (
        ALGORITHMS,
        DPO,
        GRPO,
        ILQL,
        KTO,
        PPO,
        RFT,
        RLOO,
        SFT,
        Critic,
        KLControl,
        MissingEos,
        Online,
        Quark,
        RewardConditioned,
        RewardModeling,
    )
    from tropism.api import train
    from tropism.comparing.api import compare
    from tropism.comparing.results import Comparison
    from tropism.config import Recipe
    from tropism.data.config import DataConfig, Preparation
    from tropism.envs.text_generation import TextGenerationEnv
    from tropism.envs.vector import TextGenerationVectorEnv
    from tropism.errors import TropismError
    from tropism.evaluation.report import write_report
    from tropism.generation import TextPolicy
    from tropism.models.loading import ModelConfig, load_model
    from tropism.models.lora import LoRA
    from tropism.models.policy import Policy
    from tropism.models.reference import Reference
    from tropism.result import Result
    from tropism.rewards import RewardConfig, RewardTerm, register
    from tropism.rollouts.config import Sampling, Truncation
    from tropism.text_reward_model import TextRewardModel
    from tropism.toxicity.meter import ToxicityMeter
    from tropism.toxicity.result import compare_toxicity
    from tropism.training.config import CheckpointConfig, EvaluationConfig, OptimizerConfig, TrainerConfig
    from tropism.training.normalisation import Normalisation

_HOMES = {
    "tropism.algorithms": (
        "ALGORITHMS",
        "DPO",
        "GRPO",
        "ILQL",
        "KTO",
        "PPO",
        "RFT",
        "RLOO",
        "SFT",
        "Critic",
        "KLControl",
        "MissingEos",
        "Online",
        "Quark",
        "RewardConditioned",
        "RewardModeling",
    ),
    "tropism.api": ("train",),
    "tropism.comparing.api": ("compare",),
    "tropism.comparing.results": ("Comparison",),
    "tropism.config": ("Recipe",),
    "tropism.data.config": ("DataConfig", "Preparation"),
    "tropism.envs.text_generation": ("TextGenerationEnv",),
    "tropism.envs.vector": ("TextGenerationVectorEnv",),
    "tropism.errors": ("TropismError",),
    "tropism.evaluation.report": ("write_report",),
    "tropism.generation": ("TextPolicy",),
    "tropism.models.loading": ("ModelConfig", "load_model"),
    "tropism.models.lora": ("LoRA",),
    "tropism.models.policy": ("Policy",),
    "tropism.models.reference": ("Reference",),
    "tropism.result": ("Result",),
    "tropism.rewards": ("RewardConfig", "RewardTerm", "register"),
    "tropism.rollouts.config": ("Sampling", "Truncation"),
    "tropism.text_reward_model": ("TextRewardModel",),
    "tropism.toxicity.meter": ("ToxicityMeter",),
    "tropism.toxicity.result": ("compare_toxicity",),
    "tropism.training.config": ("CheckpointConfig", "EvaluationConfig", "OptimizerConfig", "TrainerConfig"),
    "tropism.training.normalisation": ("Normalisation",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ALGORITHMS",
    "DPO",
    "GRPO",
    "ILQL",
    "KTO",
    "PPO",
    "RFT",
    "RLOO",
    "SFT",
    "CheckpointConfig",
    "Comparison",
    "Critic",
    "DataConfig",
    "EvaluationConfig",
    "KLControl",
    "LoRA",
    "MissingEos",
    "ModelConfig",
    "Normalisation",
    "Online",
    "OptimizerConfig",
    "Policy",
    "Preparation",
    "Quark",
    "Recipe",
    "Reference",
    "Result",
    "RewardConditioned",
    "RewardConfig",
    "RewardModeling",
    "RewardTerm",
    "Sampling",
    "TextGenerationEnv",
    "TextGenerationVectorEnv",
    "TextPolicy",
    "TextRewardModel",
    "ToxicityMeter",
    "TrainerConfig",
    "TropismError",
    "Truncation",
    "__version__",
    "compare",
    "compare_toxicity",
    "load_model",
    "register",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that ``import tropism`` is quick."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tropism' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
