"""Whole runs on tiny random models: the settings that the invariants go through, and how to start one in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiny_models import SEQ2SEQ, tiny_model, tiny_tokenizer
from tropism.algorithms import (
    DPO,
    GRPO,
    ILQL,
    KTO,
    PPO,
    RFT,
    RLOO,
    SFT,
    AlgorithmConfig,
    KLControl,
    Online,
    Quark,
    RewardConditioned,
    RewardModeling,
)
from tropism.algorithms.base import OnPolicyConfig
from tropism.build import Assembly, assembly_for
from tropism.config import Recipe
from tropism.data.prompts import make_prompts
from tropism.models.lora import LoRA
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.training.config import TrainerConfig
from tropism.training.normalisation import Normalisation
from tropism.types import Rollouts

PROMPTS = ["a cat", "the big dog", "oh", "is it so, my friend?", "we ran", "no"]
TEXTS = ["a cat sat on a mat.", "the dog ran.", "oh no!", "is it so, my friend? it is.", "we ran and ran.", "no, no."]

SCORED = [
    {"prompt": "a cat", "completion": " sat on a mat.", "reward": 0.9},
    {"prompt": "the dog", "completion": " ran.", "reward": 0.2},
    {"prompt": "oh", "completion": " no!", "reward": -0.4},
    {"prompt": "is it so", "completion": ", my friend? it is.", "reward": 0.5},
    {"prompt": "we ran", "completion": " and ran.", "reward": 1.3},
    {"prompt": "no", "completion": ", no.", "reward": 0.0},
]

EPISODES: list[dict[str, Any]] = [
    {"turns": ["a cat", " sat.", " and?", " it ran."], "reward": 0.9},
    {"turns": ["the dog", " ran."], "reward": -0.4},
    {"turns": ["oh", " no!", " why", " so?"], "reward": [0.5, -1.0]},
    {"turns": ["is it so", ", my friend"], "reward": 0.2},
    {"turns": ["we ran", " and", " ran", "."], "reward": [[0.1, 0.0, 0.2, 0.3], [1.3, 0.0]]},
    {"turns": ["no", ", no."], "reward": [[0.5, 0.0, 0.0, -0.25, 0.1]]},
]
"""Texts of one or several turns, with rewards per text, per output and per token."""

JUDGED: list[dict[str, Any]] = [
    {"prompt": "a cat", "completions": [" sat on a mat.", " ran.", " is no dog!"], "choice": 0},
    {"prompt": "the dog", "completions": [" ran.", " ran and ran.", " sat."], "choice": 1},
    {"prompt": "oh", "completions": [" no!", " yes.", "?"], "choice": 1},
    {"prompt": "is it so", "completions": [", my friend? it is.", "? no.", "!"], "choice": 0},
    {"prompt": "we ran", "completions": [".", " and ran.", " to a big mat."], "choice": 2},
    {"prompt": "no", "completions": [", no.", "!", " dog is so big."], "choice": 2},
]

JUDGED_APART = [{**item, "prompt": f"so {item['prompt']}"} for item in JUDGED]
"""The same judgements of other prompts, to hold out: what is trained on may not be among them."""

PAIRED: list[dict[str, Any]] = [
    {"prompt": "a cat", "chosen": " sat on a mat.", "rejected": " ran."},
    {"prompt": "the dog", "chosen": " ran and ran.", "rejected": " sat."},
    {"prompt": "oh", "chosen": "?", "rejected": " no!"},
    {"prompt": "is it so", "chosen": ", my friend? it is.", "rejected": "!"},
    {"prompt": "we ran", "chosen": " to a big mat.", "rejected": "."},
    {"prompt": "no", "chosen": " dog is so big.", "rejected": ", no."},
]

LIKED: list[dict[str, Any]] = [
    {"prompt": item["prompt"], "completion": item["chosen" if place % 2 else "rejected"], "label": bool(place % 2)}
    for place, item in enumerate(PAIRED)
]

METHODS: dict[str, AlgorithmConfig] = {
    "sft": SFT(),
    "ppo": PPO(group_size=2, num_epochs=2, minibatch_size=4, kl=KLControl(target=0.5, horizon=100)),
    "grpo": GRPO(group_size=2, num_epochs=2, minibatch_size=4),
    "rloo": RLOO(group_size=2, num_epochs=2, minibatch_size=4),
    "conditioned": RewardConditioned(target_dropout=0.3, prompt_loss_weight=0.5),
    "conditioned-online": RewardConditioned(online=Online(group_size=2, updates=4, batch_size=4, top=0.5)),
    "quark": Quark(quantiles=3, group_size=2, updates=4, batch_size=4),
    "rft": RFT(start_percentile=0.2, improve_steps=1, group_size=2, updates=4, batch_size=4),
    "dpo": DPO(),
    "kto": KTO(undesirable_weight=1.5),
    "ilql": ILQL(target_sync_every=2, awac_beta=0.5, q_rate=1.0),
    "reward-model": RewardModeling(),
}
"""Every method with several updates per collect, where it collects."""

ON_POLICY = [name for name, config in METHODS.items() if isinstance(config, OnPolicyConfig)]
"""Those that learn from the completions of the same step alone."""


@dataclass(frozen=True)
class Setting:
    """A method, what it trains, and the family of its model."""

    method: str
    adapter: bool
    family: str
    train_layers: int | None = None

    def __str__(self) -> str:
        part = "lora" if self.adapter else "full" if self.train_layers is None else f"last{self.train_layers}"
        return f"{self.method}-{part}-{self.family}"

    @property
    def algorithm(self) -> AlgorithmConfig:
        return METHODS[self.method]

    @property
    def on_policy(self) -> bool:
        """Whether it learns from the completions of the same step alone."""
        return self.method in ON_POLICY

    @property
    def trains_policy(self) -> bool:
        """Whether it reads what a policy learns from; a reward model has no log-probs, and no reference."""
        return self.algorithm.reads != "comparisons"

    @property
    def texts(self) -> list[Any]:
        """What it reads."""
        texts: dict[str, list[Any]] = {
            "prompts": [*PROMPTS],
            "demonstrations": [*TEXTS],
            "scored": [*SCORED],
            "comparisons": [*JUDGED],
            "episodes": [*EPISODES],
            "pairs": [*PAIRED],
            "opinions": [*LIKED],
        }
        if self.two_sided:  # an encoder needs a prompt, and reads one
            texts["demonstrations"] = [{**item, "completion": item["completion"].strip()} for item in SCORED]
            texts["episodes"] = [episode for episode in EPISODES if len(episode["turns"]) == 2]
        return texts[self.algorithm.reads]

    @property
    def two_sided(self) -> bool:
        """Whether the family has an encoder and a decoder."""
        return self.family in SEQ2SEQ

    def with_algorithm(self, **changes: Any) -> AlgorithmConfig:
        return replace(self.algorithm, **changes)


ALL_SETTINGS = [Setting(m, a, f) for m in METHODS for a in (False, True) for f in ("llama", "gpt2")]
"""Every method x all weights or an adapter x two families."""

SETTINGS = [s for s in ALL_SETTINGS if s.adapter == (s.family == "gpt2")]
"""One family each: all weights of a Llama, an adapter on a GPT-2 (whose layers are transposed)."""

SEQ2SEQ_SETTINGS = [
    s for m in METHODS for a in (False, True) if (s := Setting(m, a, "bart" if a else "t5")).trains_policy
]
"""All weights of a T5, an adapter on a BART; reward models have no decoder."""

PARTIAL_SETTINGS = [s for m in METHODS if (s := Setting(m, False, "gpt2", train_layers=1)).trains_policy]
"""The last of two blocks of a GPT-2, whose output embedding is tied."""


def early_letters(completions: list[str]) -> list[float]:
    """The share of letters before n: a reward that differs from completion to completion and is easily raised."""
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]


def make_recipe(setting: Setting, run: Path, **changes: Any) -> Recipe:
    """A recipe of two steps (four where a step is an update) of a few prompts, with a running scale of the reward.

    A reward model is put on a scale before and after training, by samples of the body that it starts from.
    """
    algorithm = changes.pop("algorithm", setting.algorithm)
    if setting.two_sided and isinstance(algorithm, RewardConditioned):
        algorithm = replace(algorithm, prompt_loss_weight=0.0)  # an encoder predicts no tokens
    trainer = changes.pop("trainer", {})
    fields: dict[str, Any] = {
        "model": (tiny_model(setting.family, seed=3), tiny_tokenizer(add_eos=setting.two_sided)),
        "algorithm": algorithm,
        "data": setting.texts,
        "reward": RewardConfig.of({"terms": {"early": {"use": early_letters}}, "scale": "running"}),
        "run": str(run),
        "total_steps": 2 if algorithm.on_policy else 4,
        "prompts_per_step": 4,
        "seed": 7,
        "sampling": Sampling(max_new_tokens=6),
        "lora": LoRA(rank=4) if setting.adapter else None,
        "train_layers": setting.train_layers,
        "trainer": TrainerConfig(**{"learning_rate": 1e-3, "progress": False, **trainer}),
    }
    if algorithm.reads != "prompts":
        fields["reward"] = None
    if algorithm.reads == "comparisons":
        fields["normalise"] = Normalisation(samples=8)
    return Recipe(**{**fields, **changes})


def assemble(setting: Setting, run: Path, *, resume: bool = False, **changes: Any) -> Assembly:
    """Everything of a tiny run, connected and not yet started."""
    recipe = make_recipe(setting, run, **changes)
    return assembly_for(recipe)(recipe, resume=resume)


def execute(assembly: Assembly, *, export: bool = False) -> Assembly:
    """Run it to its end; exporting the model and writing the report take a third of the time, so few tests do."""
    if not export:
        assembly.run.export = lambda: None
    assembly.check()
    assembly.run.execute(assembly.recipe.total_steps, resumed=assembly.checkpoint)
    return assembly


def stop_after(assembly: Assembly, updates: int, number: int) -> None:
    """Let a run receive signal ``number`` right after that many updates."""
    keep_books: Callable[..., bool] = assembly.trainer.after_update

    def after_update(metrics: dict[str, float], ended: bool) -> bool:
        if assembly.trainer.counts.updates == updates:
            assembly.run.interrupts.received = number
        return keep_books(metrics, ended)

    assembly.trainer.after_update = after_update


def logged(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind: collect, update or evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def weights_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    """A copy of every weight of what is trained, frozen ones and the value head (or gain and bias) included."""
    return {name: value.detach().clone() for name, value in assembly.policy.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, first {different[0]}"


def sample(assembly: Assembly, *, group: int = 2) -> Rollouts:
    """Completions of every prompt by the policy as it is."""
    prompts = make_prompts(PROMPTS, assembly.loaded.tokenizer, max_length=None)
    key = StreamKey(seed=11, purpose="checks")
    sampler = EmbeddedSampler(assembly.loaded.tokenizer, assembly.loaded.tokens.eos_ids)
    return sampler.generate(assembly.policy, prompts, assembly.recipe.sampling, group, key=key)
