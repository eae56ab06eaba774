"""Training only the last transformer blocks: which weights those are, and freezing the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tropism.errors import ModelError


def train_last_layers(model: PreTrainedModel, layers: int) -> None:
    """Let exactly the top of ``model`` be trained, in place: gradients on there, off everywhere else.

    The top is the last ``layers`` transformer blocks and whatever the model computes after them: the final norm, a
    projection behind it, and the output embedding. A weight that is also used below stays frozen, so that an output
    embedding tied to the input embedding does. Nothing below the first trained block needs a gradient, so autograd
    records nothing there.

    Args:
        layers: number of blocks, at least 1 and at most all of them (the input embeddings stay frozen even then).

    Raises:
        ModelError: no such number of blocks, the family keeps its blocks in no list that can be told, or the model uses
            reentrant gradient checkpointing.
    """
    blocks = transformer_blocks(model)
    family = type(model).__name__
    if not 1 <= layers <= len(blocks):
        raise ModelError(
            f"train_layers is {layers}, and {family} has {len(blocks)} transformer blocks; choose 1 to {len(blocks)}, "
            "or leave train_layers out to train all weights"
        )
    _refuse_reentrant_checkpointing(model)
    # Switching checkpointing on makes transformers ask for gradients of the embeddings, and so of every block.
    model.disable_input_require_grads()
    before, after = _around(model, blocks)
    lower = list(blocks)[: len(blocks) - layers]
    below = {id(p) for block in lower for p in block.parameters()}
    below |= {id(p) for module in before for p in module.parameters(recurse=False)}
    model.requires_grad_(False)
    top = [p for block in list(blocks)[len(lower) :] for p in block.parameters()]
    top += [p for module in after for p in module.parameters(recurse=False)]
    for parameter in top:
        parameter.requires_grad_(id(parameter) not in below)


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks, first to last: the one list of as many modules as the model has layers.

    Lists inside such a list (the experts of a block) do not count.

    Raises:
        ModelError: there is none, or more than one.
    """
    number = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    }
    outermost = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if len(outermost) != 1:
        found = f" ({', '.join(outermost)})" if outermost else ""
        raise ModelError(
            f"train_layers cannot tell the transformer blocks of {type(model).__name__}: {len(outermost)} lists{found} "
            f"have as many modules as the model has layers ({number}). Leave train_layers out, or train with lora"
        )
    return next(iter(outermost.values()))


def _refuse_reentrant_checkpointing(model: PreTrainedModel) -> None:
    """Reentrant checkpointing gives a block no gradients unless its input requires them, and here it does not."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            options = getattr(module._gradient_checkpointing_func, "keywords", {})
            if options.get("use_reentrant") is not False:
                raise ModelError(
                    "train_layers does not work with reentrant gradient checkpointing; switch it on by "
                    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
                )


@torch.no_grad()
def _around(model: PreTrainedModel, blocks: nn.ModuleList) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules outside the blocks that a forward pass over two tokens enters before the last block ends, and after it.

    Order of use decides, as names and order of registration differ: OPT registers its final norm before its blocks.
    """
    inside = {id(module) for module in blocks.modules()}
    before: list[nn.Module] = [model.get_input_embeddings()]
    after: list[nn.Module] = []
    now = before

    def enter(module: nn.Module, _: Any) -> None:
        now.append(module)

    def leave_last_block(*_: Any) -> None:
        nonlocal now
        now = after

    handles = [m.register_forward_pre_hook(enter) for m in model.modules() if id(m) not in inside]
    handles.append(blocks[-1].register_forward_hook(leave_last_block))
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return before, after
