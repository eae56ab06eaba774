from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tropism.training.config import OptimizerConfig, TrainerConfig
from tropism.training.optimizer import build_optimizer, default_learning_rate, rate_factor


class Tiny(nn.Module):
    """Named as a policy is: the language model, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        self.value_head = nn.Linear(3, 1)
        self.model[1].bias.requires_grad_(False)


def names_by_group(policy: Tiny, optimizer: torch.optim.Optimizer) -> list[tuple[set[str], float, float]]:
    name_of = {id(p): name for name, p in policy.named_parameters()}
    return [({name_of[id(p)] for p in g["params"]}, g["weight_decay"], g["rate"]) for g in optimizer.param_groups]


def test_decay_acts_on_matrices_of_the_language_model_and_heads_have_their_own_rate() -> None:
    policy = Tiny()
    config = TrainerConfig(optimizer=OptimizerConfig(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-5))
    optimizer = build_optimizer(policy, config, head_rate=10.0)
    assert names_by_group(policy, optimizer) == [
        ({"model.0.weight"}, 0.1, 1.0),
        ({"model.0.bias", "model.1.weight"}, 0.0, 1.0),
        ({"value_head.weight", "value_head.bias"}, 0.0, 10.0),
    ]
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-5


def test_groups_without_weights_are_left_out() -> None:
    policy = Tiny()
    policy.value_head.requires_grad_(False)
    optimizer = build_optimizer(policy, TrainerConfig())
    assert len(optimizer.param_groups) == 2


def test_default_learning_rate() -> None:
    assert default_learning_rate(135_000_000, adapters=False) == pytest.approx(1e-5)
    assert default_learning_rate(540_000_000, adapters=False) == pytest.approx(0.5e-5)
    assert default_learning_rate(135_000_000, adapters=True) == pytest.approx(2e-4)
    assert default_learning_rate(1_000, adapters=False) == 1e-3
    assert default_learning_rate(0, adapters=True) == 1e-3


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 0, [1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]),
        ("cosine", 4, [0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_schedules(schedule: str, warmup: int, expected: list[float]) -> None:
    config = TrainerConfig(schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    found = [rate_factor(config, step=step, total_steps=4) for step in range(4)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_is_never_negative_beyond_the_end(schedule: str) -> None:
    config = TrainerConfig(schedule=schedule)  # type: ignore[arg-type]
    assert rate_factor(config, step=9, total_steps=4) == pytest.approx(0.0)
