"""What training changes, as named tensors, whole ones also where weights are sharded: these, and Adam's moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tropism.errors import ModelError


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; one that is sharded over processes is gathered, and they call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable_state(policy: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name; with them frozen ones that follow others.

    Sharded ones are gathered one by one: all processes call this together, and the first alone gets them.
    """
    _scatter(policy)
    return _gathered((name, p.detach()) for name, p in _changed(policy))


def load_trainable_state(policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained weights back in place; of sharded ones each process takes its part.

    Raises:
        ModelError: the names are not those of this policy.
    """
    _scatter(policy)
    own = dict(_changed(policy))
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ModelError(
            f"the checkpoint is of another model, or other weights of it were trained: {len(odd)} weights differ, for "
            f"instance {odd[0]}. Go on with the same model, lora and train_layers as before"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(_laid_out_as(parameter, tensors[name]))


def _changed(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What training changes: what has gradients, and what a policy names as its ``followers``."""
    followers: frozenset[str] = getattr(policy, "followers", frozenset())
    return ((name, p) for name, p in policy.named_parameters() if p.requires_grad or name in followers)


def optimizer_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as ``<weight>::<moment>``; sharded ones as in ``trainable_state``."""
    _scatter(policy)
    return _gathered(
        (f"{name}::{key}", value if isinstance(value, Tensor) else torch.tensor(value))
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    )


def load_optimizer_state(policy: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimizer_state``; an empty mapping is the state before the first update."""
    _scatter(policy)
    parameters = dict(policy.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("::")
        parameter = parameters[name]
        if key != "step":
            optimizer.state[parameter][key] = _laid_out_as(parameter, value).clone()
            continue
        # A fused optimizer counts steps where the weights are, any other on the CPU.
        device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter][key] = value.to(device, copy=True)


def _scatter(policy: nn.Module) -> None:
    """An abandoned pass may have left some units of a sharded policy whole, on this process and not on another."""
    if isinstance(policy, FSDPModule):
        policy.reset_iter_state()


def _gathered(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in named:
        full = whole(tensor)
        if full is tensor:
            state[name] = tensor
        elif dist.get_rank() == 0:
            state[name] = full.cpu()  # one after the other, so that no device holds them all
    return state


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor where the parameter is; of a sharded parameter this process's part, without asking the others."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
