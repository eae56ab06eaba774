"""Weights sharded over processes by torch's FSDP2: each process keeps a part of every weight.

The transformer blocks are gathered one after the other while they compute. Everything else (embeddings, last norm,
output embedding) is gathered for the length of ``Policy.forward``, which uses the output embedding's matrix by itself.
Sampling has steps of its own on every process, so it needs all weights whole at once, see ``gathered``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tropism.errors import ConfigError, ModelError
from tropism.models.freezing import transformer_blocks


def shard(policy: Any, *, classes: Collection[str] | None = None) -> None:
    """Shard all weights of a ``Policy`` over all processes, in place; they call this together.

    Everybody starts from the weights of the first process. Parameters become ``DTensor``s, so that optimizers have to
    be made afterwards; names stay as they are.

    Args:
        classes: names of the classes of modules that are gathered one by one; None takes the transformer blocks.

    Raises:
        ConfigError: weights of this model cannot be sharded.
    """
    _check(policy)
    blocks = _blocks(policy, classes)
    for parameter in policy.parameters():
        parameter.data = parameter.data.contiguous()
    for tensor in (*policy.parameters(), *policy.buffers()):
        dist.broadcast(tensor.data, src=0)
    mesh = init_device_mesh(policy.device.type, (dist.get_world_size(),))
    # Heads are fp32 whatever the model is, and the trained weights of one unit need the same type.
    heads = [policy.value_head.linear] if policy.value_head is not None else []
    heads += policy.q_heads.parts() if policy.q_heads is not None else []
    # All are scattered again after their forward pass: what is left whole after a pass without gradients would be
    # stale once the optimizer has stepped.
    for unit in (*blocks, *heads, policy):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    _first_pass(policy)


def is_sharded(policy: nn.Module) -> bool:
    """Whether the weights are shards at this moment; not inside ``gathered``."""
    return any(isinstance(parameter, DTensor) for parameter in policy.parameters())


def gather(policy: Any) -> None:
    """Make all weights whole on every process until ``scatter``; they call this together. Then nothing is exchanged."""
    if isinstance(policy, FSDPModule):
        policy.set_reshard_after_forward(False)
        for unit in _units(policy):
            unit.unshard()


def scatter(policy: Any) -> None:
    """Leave only this process's part of the weights in memory; needs no other process."""
    if isinstance(policy, FSDPModule):
        policy.set_reshard_after_forward(True)
        # Not reshard alone: FSDP notes the order of passes and prefetches by it in the next backward pass, and passes
        # of sampling differ from process to process.
        policy.reset_iter_state()


@contextmanager
def gathered(policy: Any) -> Iterator[None]:
    """A block in which all weights are whole; all processes enter it together. Weights that are whole stay so."""
    if not is_sharded(policy):
        yield
        return
    gather(policy)
    try:
        yield
    finally:
        scatter(policy)


def _units(policy: Any) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def _check(policy: Any) -> None:
    model = policy.language_model
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ConfigError(f"sharded weights need torch 2.13 or newer, and this is {torch.__version__}; upgrade torch")
    if _units(policy):
        raise ConfigError(
            "the weights of this model are sharded already, by an earlier run of this process; load the model anew"
        )
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            "quantised weights cannot be sharded; load the model in bfloat16, or launch without --use_fsdp"
        )
    trained = {parameter.dtype for parameter in policy.model.parameters() if parameter.requires_grad}
    if len(trained) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in trained))
        raise ConfigError(
            f"sharded weights that are trained need one type, and these have {names}; set model.dtype to float32"
        )


def _blocks(policy: Any, classes: Collection[str] | None) -> Sequence[nn.Module]:
    model = policy.language_model
    if classes:
        found = [module for module in model.modules() if type(module).__name__ in classes]
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no module of class {' or '.join(classes)}; leave out "
                "--fsdp_transformer_layer_cls_to_wrap, and its transformer blocks are taken"
            )
        return found
    try:
        return list(transformer_blocks(model))
    except ModelError as error:
        raise ConfigError(
            f"the transformer blocks of {type(model).__name__} cannot be told, so its weights cannot be sharded: name "
            "their class by --fsdp_transformer_layer_cls_to_wrap, or launch without --use_fsdp"
        ) from error


@torch.no_grad()
def _first_pass(policy: Any) -> None:
    """FSDP takes the module that computes first for the outermost one; sampling would make it a block."""
    one = torch.ones(1, dtype=torch.long, device=policy.device)
    policy(prompt_ids=one[None] - 1, prompt_lengths=one, completion_ids=one[None] - 1, completion_lengths=one)
