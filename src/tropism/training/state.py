"""What training changes, as named tensors: weights, and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tropism.errors import ModelError


def trainable_state(policy: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def load_trainable_state(policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained weights back in place.

    Raises:
        ModelError: the names are not those of this policy.
    """
    own = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ModelError(
            f"the checkpoint is of another model, or other weights of it were trained: {len(odd)} weights differ, for "
            f"instance {odd[0]}. Go on with the same model, lora and train_layers as before"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def optimizer_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as ``<weight>::<moment>``."""
    state: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}::{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


def load_optimizer_state(policy: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimizer_state``; an empty mapping is the state before the first update."""
    parameters = dict(policy.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("::")
        parameter = parameters[name]
        # A fused optimizer counts steps where the weights are, any other on the CPU.
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        device = torch.device("cpu") if on_cpu else parameter.device
        optimizer.state[parameter][key] = value.to(device, copy=True)
