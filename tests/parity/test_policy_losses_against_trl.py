"""The losses of GRPO, its variants and RLOO on one batch, against the loss functions of TRL's trainers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from given_numbers import MASK, NEW, OLD, REFERENCE, Numbers, built, policy_batch
from tropism.algorithms import GRPO, RLOO, AlgorithmConfig

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.parity

ADVANTAGES = torch.tensor([1.0, -2.0])


def trl_loss(trainer: str, logprobs: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What TRL's trainer makes of these log-probs; everything around its formula is left out."""
    kind = getattr(trl, trainer)
    if not hasattr(kind, "_compute_loss"):
        pytest.skip(f"this version of trl computes the loss of {trainer} elsewhere")
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(2, 3), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(cpu=True),
        _metrics={"eval": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        max_completion_length=4,
        **{"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, **settings},
    )
    inputs = {
        "prompt_ids": torch.ones(2, 1, dtype=torch.long),
        "prompt_mask": torch.ones(2, 1, dtype=torch.long),
        "completion_ids": torch.ones(2, 3, dtype=torch.long),
        "completion_mask": MASK.long(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": OLD,
        "old_logps": (OLD * MASK).sum(1),
        "ref_per_token_logps": REFERENCE,
        "num_items_in_batch": MASK.sum(),
    }
    loss: torch.Tensor = kind._compute_loss(stub, None, inputs)
    return loss


def our_loss(config: AlgorithmConfig, logprobs: torch.Tensor) -> torch.Tensor:
    batch = policy_batch(advantages=ADVANTAGES[:, None] * MASK)
    method = built(config)
    sums, _ = method.loss(Numbers(logprobs), batch)
    weights = method.weight(batch)
    return torch.stack([value / weights[name] for name, value in sums.items()]).sum()


CASES: dict[str, tuple[AlgorithmConfig, str, dict[str, Any]]] = {
    "sequence": (GRPO(normalisation="sequence", kl_coef=0.3), "GRPOTrainer", {"loss_type": "grpo", "beta": 0.3}),
    "token": (GRPO(normalisation="token", kl_coef=0.3), "GRPOTrainer", {"loss_type": "bnpo", "beta": 0.3}),
    "constant": (GRPO(normalisation="constant", kl_coef=0.0), "GRPOTrainer", {"loss_type": "dr_grpo"}),
    "dapo": (GRPO(kl_coef=0.0, clip_high=0.28), "GRPOTrainer", {"loss_type": "dapo", "epsilon_high": 0.28}),
    # TRL's bound is the cap itself, ours is how far it lies above one.
    "cispo": (
        GRPO(kl_coef=0.0, ratio="cispo", clip_high=0.2),
        "GRPOTrainer",
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    "gspo": (
        GRPO(kl_coef=0.0, ratio="sequence", normalisation="sequence", clip_low=0.01, clip_high=0.01),
        "GRPOTrainer",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.01, "epsilon_high": 0.01},
    ),
    "rloo": (RLOO(clip_low=0.05, clip_high=0.2), "RLOOTrainer", {"epsilon_low": 0.05}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name: str) -> None:
    config, trainer, settings = CASES[name]
    results = []
    for ours in (True, False):
        logprobs = NEW.clone().requires_grad_()
        loss = our_loss(config, logprobs) if ours else trl_loss(trainer, logprobs, **settings)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        results.append((loss.detach(), gradient))
    (our_value, our_gradient), (their_value, their_gradient) = results
    torch.testing.assert_close(our_value, their_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient * MASK, rtol=1e-5, atol=1e-6)
