from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tropism.training.config import OptimizerConfig, TrainerConfig
from tropism.training.optimizer import build_optimizer, can_fuse, default_learning_rate, rate_factor
from tropism.training.state import load_optimizer_state, load_trainable_state, optimizer_state, trainable_state


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


def step(policy: Tiny, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One update; its gradients depend on its number alone, and are zero here and there, where eps decides."""
    generator = torch.Generator().manual_seed(number)
    for p in policy.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = gradient * (gradient > 0) if p.requires_grad else None
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (number + 1) * group["rate"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_fused_optimizer_is_plain_adamw(resumed: bool) -> None:
    config = TrainerConfig(optimizer=OptimizerConfig(weight_decay=0.1))
    torch.manual_seed(0)
    policy, plain = Tiny(), Tiny()
    plain.load_state_dict(policy.state_dict())
    optimizer = build_optimizer(policy, config, head_rate=3.0)
    assert optimizer.defaults["fused"] is True
    groups = [{"params": [plain.model[0].weight], "weight_decay": 0.1, "rate": 1.0}]
    rest = [plain.model[0].bias, plain.model[1].weight]
    groups += [{"params": rest, "weight_decay": 0.0, "rate": 1.0}]
    groups += [{"params": list(plain.value_head.parameters()), "weight_decay": 0.0, "rate": 3.0}]
    reference = torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)
    for number in range(5):
        if resumed and number == 2:
            weights = {name: value.clone() for name, value in trainable_state(policy).items()}
            moments = {name: value.clone() for name, value in optimizer_state(policy, optimizer).items()}
            policy = Tiny()
            optimizer = build_optimizer(policy, config, head_rate=3.0)
            load_trainable_state(policy, weights)
            load_optimizer_state(policy, optimizer, moments)
        step(policy, optimizer, number)
        step(plain, reference, number)
    for (name, one), other in zip(policy.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)


def test_a_step_raises_the_version_of_every_weight_it_changes() -> None:
    policy = Tiny()
    optimizer = build_optimizer(policy, TrainerConfig())
    for number in range(2):
        before = {name: p._version for name, p in policy.named_parameters()}
        step(policy, optimizer, number)
        after = {name: p._version for name, p in policy.named_parameters()}
        assert {name for name in before if after[name] > before[name]} == before.keys() - {"model.1.bias"}


def test_what_can_be_fused() -> None:
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert can_fuse([single]) and not can_fuse([half]) and not can_fuse([single, half]) and not can_fuse([])
    policy = Tiny().bfloat16()
    assert not build_optimizer(policy, TrainerConfig()).defaults["fused"]
