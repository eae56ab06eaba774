"""The loss and the gradient of an update do not depend on how its batch is split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import ALL_SETTINGS, JUDGED, METHODS, PARTIAL_SETTINGS, SEQ2SEQ_SETTINGS, Setting, assemble
from tropism.algorithms import GRPO, PPO, RLOO, AlgorithmConfig, Critic, KLControl, RewardModeling
from tropism.build import Assembly
from tropism.types import Batch, Metrics

GROUPS: dict[str, Any] = {"group_size": 2}
VARIANTS: dict[str, AlgorithmConfig] = {
    "grpo-sequence": GRPO(**GROUPS, normalisation="sequence"),
    "grpo-constant": GRPO(**GROUPS, normalisation="constant", scale="none"),
    "grpo-batch-scale": GRPO(**GROUPS, scale="batch"),
    "grpo-k1": GRPO(**GROUPS, kl_estimator="k1"),
    "grpo-k2": GRPO(**GROUPS, kl_estimator="k2"),
    "grpo-truncated-masked": GRPO(**GROUPS, mask_truncated=True),
    "gspo-sequence": GRPO(**GROUPS, ratio="sequence", normalisation="sequence"),
    "gspo-token": GRPO(**GROUPS, ratio="sequence", normalisation="token"),
    "cispo": GRPO(**GROUPS, ratio="cispo"),
    "no-reference": GRPO(**GROUPS, kl_coef=0.0),
    "ppo-kl-in-the-loss": PPO(kl=KLControl(place="loss"), entropy_coef=0.01, whiten_rewards=True),
    "ppo-plain": PPO(whiten_advantages=False, critic=Critic(bootstrap_truncated=True)),
    "rloo-clipped": RLOO(**GROUPS, clip_low=0.01, clip_high=0.01),
    **{f"grpo-{name}": replace(GRPO.preset(name), group_size=2) for name in GRPO.presets},
}


def updates_by_size(assembly: Assembly) -> list[tuple[Metrics, dict[str, torch.Tensor]]]:
    """Metrics and gradients of the same update, split into micro-batches of all, one and three rows, and by tokens."""
    assembly.run.begin()
    batch: Batch = next(iter(assembly.trainer.source.collect(assembly.trainer.policy)))
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():  # so that ratios differ from one and the reference from the policy
        for parameter in assembly.policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise) * parameter.requires_grad)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        named = assembly.policy.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    trainer = assembly.trainer
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.learning_rate = 0.0  # the same weights for every split
    results = []
    for rows, tokens in ((None, 8192), (1, 8192), (3, 8192), (None, 40)):
        trainer.config = replace(trainer.config, micro_batch_size=rows, micro_batch_tokens=tokens, max_grad_norm=None)
        gradients.clear()
        results.append((trainer.update(batch), dict(gradients)))
    return results


def assert_independent_of_split(assembly: Assembly) -> None:
    (whole, gradients), *others = updates_by_size(assembly)
    names = [name for name in whole if name.startswith(("loss/", "policy/", "value/"))]
    assert whole["optim/skipped"] == 0 and whole["optim/grad_norm"] > 0 and any(n.startswith("loss/") for n in names)
    scale = max(float(g.abs().max()) for g in gradients.values())
    for metrics, other in others:
        assert metrics["optim/grad_norm"] == pytest.approx(whole["optim/grad_norm"], rel=1e-5)
        for name in names:
            # Means of signed numbers may cancel to nearly nothing, hence the absolute part.
            assert metrics[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
        assert other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("setting", ALL_SETTINGS + PARTIAL_SETTINGS + SEQ2SEQ_SETTINGS, ids=str)
def test_every_method(setting: Setting, tmp_path: Path) -> None:
    changes = {"minibatch_size": None} if setting.on_policy else {}
    assert_independent_of_split(assemble(setting, tmp_path / "run", algorithm=setting.with_algorithm(**changes)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str, tmp_path: Path) -> None:
    algorithm = VARIANTS[name]
    setting = Setting(algorithm.name, False, "llama")
    assert setting.method in METHODS
    assert_independent_of_split(assemble(setting, tmp_path / "run", algorithm=algorithm))


RATED = [
    {"prompt": item["prompt"], "completion": text, "rating": float(3 * place - row)}
    for row, item in enumerate(JUDGED[:4])
    for place, text in enumerate(item["completions"][: 1 + row % 2])
]
JUDGEMENTS: dict[str, tuple[RewardModeling, list[dict[str, Any]]]] = {
    "pairs with margins and ties": (
        RewardModeling(margin=0.5, label_smoothing=0.1),
        [
            {"chosen": "a cat sat on a mat.", "rejected": "oh!"},
            {"chosen": "no, no.", "rejected": "it is so, my friend.", "tie": True},
            {"chosen": "we ran", "rejected": "a dog", "margin": 1.5},
            {"chosen": "oh", "rejected": "no"},
        ],
    ),
    "ratings": (RewardModeling(), RATED),
    "differences": (
        RewardModeling(),
        [
            {"prompt": "a", "completions": item["completions"][:2], "difference": len(item["prompt"]) - 5}
            for item in JUDGED
        ],
    ),
    "several numbers of completions, by annotators": (
        RewardModeling(varied_k=True, annotator_weights={"a": 0.5, "b": 2.0}),
        [
            {
                "completions": item["completions"][: 2 + row % 2],
                "choice": row % 2,
                "annotator": "ab"[row // 3],
            }
            for row, item in enumerate(JUDGED)
        ],
    ),
}


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_every_kind_of_judgement(name: str, tmp_path: Path) -> None:
    algorithm, data = JUDGEMENTS[name]
    setting = Setting("reward-model", False, "llama")
    assembly = assemble(setting, tmp_path / "run", algorithm=algorithm, data=data, normalise=None)
    assert_independent_of_split(assembly)


BF16_SPLIT = 0.03
"""Relative difference in bf16, which rounds every operation by up to 0.4 %, of losses, gradient and its norm."""


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=str)
def test_every_method_in_bf16_up_to_its_rounding(setting: Setting, tmp_path: Path) -> None:
    changes = {"minibatch_size": None} if setting.on_policy else {}
    algorithm = setting.with_algorithm(**changes)
    assembly = assemble(setting, tmp_path / "run", algorithm=algorithm, trainer={"precision": "bf16"})
    (whole, gradients), *others = updates_by_size(assembly)
    names = [name for name in whole if name.startswith("loss/")]
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    for metrics, other in others:
        assert metrics["optim/grad_norm"] == pytest.approx(whole["optim/grad_norm"], rel=BF16_SPLIT)
        for name in names:
            assert metrics[name] == pytest.approx(whole[name], rel=BF16_SPLIT, abs=0.02), name
        difference = torch.cat([(other[name] - g).flatten() for name, g in gradients.items()])
        assert float(difference.norm()) < BF16_SPLIT * norm
