from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tropism.errors import ModelError
from tropism.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tropism.training.state import load_optimizer_state, load_trainable_state, optimizer_state, trainable_state


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(6.0).view(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    assert optimizer_state(model, optimizer) == {}
    for _ in range(3):
        step(model, optimizer)
    saved = Checkpoint(
        state={}, tensors={"policy": trainable_state(model), "optimizer": optimizer_state(model, optimizer)}
    )
    write_checkpoint(tmp_path / "x", saved)
    step(model, optimizer)
    read = read_checkpoint(tmp_path / "x")
    other, fresh = model_and_optimizer()
    load_trainable_state(other, read.tensors["policy"])
    load_optimizer_state(other, fresh, read.tensors["optimizer"])
    step(other, fresh)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_weights_of_another_model_are_refused() -> None:
    model, _ = model_and_optimizer()
    tensors = trainable_state(model)
    assert set(tensors) == {"0.weight", "1.weight", "1.bias"}
    with pytest.raises(ModelError, match=r"1\.bias"):
        load_trainable_state(model, {name: value for name, value in tensors.items() if name != "1.bias"})
