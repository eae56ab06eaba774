"""Training only the top of a model: which weights those are, freezing the rest, and parting a tied head."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tropism.errors import ModelError

logger = logging.getLogger("tropism")


def train_last_layers(model: PreTrainedModel, layers: int) -> None:
    """Let exactly the top of ``model`` be trained, in place: gradients on there, off everywhere else.

    The top is the last ``layers`` transformer blocks (of the decoder, where there is an encoder) and whatever the model
    computes after them: the final norm, a projection behind it, and the output embedding. A weight that is also used
    below stays frozen, so that an output embedding tied to the input embedding does. Nothing below the first trained
    block needs a gradient, so autograd records nothing there. What is trained is logged.

    With ``layers`` 0 the top is what follows the blocks alone. There a tied output embedding would leave next to
    nothing to train, so it becomes a matrix of its own that starts as a copy (``untie``).

    Args:
        layers: number of blocks, 0 to all of them (the input embeddings stay frozen even then).

    Raises:
        ModelError: no such number of blocks, the family keeps its blocks in no list that can be told, nothing would be
            trained, or the model uses reentrant gradient checkpointing.
    """
    blocks = transformer_blocks(model)
    family = type(model).__name__
    if not 0 <= layers <= len(blocks):
        raise ModelError(
            f"train_layers is {layers}, and {family} has {len(blocks)} transformer blocks; choose 1 to {len(blocks)}, "
            "0 for the output head alone, or leave train_layers out to train all weights"
        )
    _refuse_reentrant_checkpointing(model)
    untied = layers == 0 and is_tied(model)
    if untied:
        untie(model)
    # Switching checkpointing on makes transformers ask for gradients of the embeddings, and so of every block.
    model.disable_input_require_grads()
    before, after = _around(model, blocks)
    lower = list(blocks)[: len(blocks) - layers]
    below = {id(p) for block in lower for p in block.parameters()}
    below |= {id(p) for module in before for p in module.parameters(recurse=False)}
    top = [p for block in list(blocks)[len(lower) :] for p in block.parameters()]
    top += [p for module in after for p in module.parameters(recurse=False)]
    if all(id(parameter) in below for parameter in top):
        raise ModelError(
            f"train_layers is {layers}, and nothing of {family} is left to train: what it computes after its "
            "transformer blocks is also used below them. Choose 1 or more, or leave train_layers out"
        )
    model.requires_grad_(False)
    for parameter in top:
        parameter.requires_grad_(id(parameter) not in below)
    logger.info("%s", _what_is_trained(model, layers, blocks, after, untied=untied))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output embedding is the input embedding's matrix."""
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    return inputs is not None and outputs is not None and outputs.weight is inputs.weight


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Give ``model``, in place, an output embedding of its own that starts as a copy of the input embedding.

    Its logits stay what they were. The configuration says so (``tie_word_embeddings`` false), so that the model is
    saved with both matrices and plain transformers loads both.

    Raises:
        ModelError: the family reads more than tying from that entry of its configuration: T5 also the scale of its
            logits, BART that encoder and decoder share their input embedding.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"the output embedding of {type(model).__name__} is tied to its input embedding by an entry of its "
            "configuration on which more depends, so it cannot be trained by itself: choose train_layers of 1 or more, "
            "or leave it out"
        )
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in _configurations(model.config):
        config.tie_word_embeddings = False
    # What transformers would tie again when it saves or adapts the live model.
    names = [name for name, parameter in model.named_parameters() if parameter is head.weight]
    for name in names:
        model.all_tied_weights_keys.pop(name, None)


def _configurations(config: PreTrainedConfig) -> Iterable[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configurations(value)


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks, first to last: the one list of as many modules as the model has layers.

    Of a model with an encoder those of its decoder. Lists inside such a list (the experts of a block) do not count.

    Raises:
        ModelError: there is none, or more than one.
    """
    body, number = _stack(model)
    lists = {
        name: module
        for name, module in body.named_modules()
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


def _stack(model: PreTrainedModel) -> tuple[nn.Module, int]:
    """What holds the blocks that end in the output embedding, and their number."""
    config: Any = model.config
    if not config.is_encoder_decoder:
        return model.base_model, int(config.get_text_config().num_hidden_layers)
    layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    return model.get_decoder(), int(layers or config.num_hidden_layers)


def _what_is_trained(
    model: PreTrainedModel, layers: int, blocks: nn.ModuleList, after: Iterable[nn.Module], *, untied: bool
) -> str:
    """One sentence for the log: parts by name, numbers of weights, and what became of a tied output embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    parts = []
    if layers:
        weights = _count(p for block in list(blocks)[len(blocks) - layers :] for p in block.parameters())
        parts.append(f"the last {layers} of {len(blocks)} blocks {names[id(blocks)]} ({weights:,} weights)")
    for module in dict.fromkeys(after):
        weights = _count(module.parameters(recurse=False))
        if weights:
            parts.append(f"{names[id(module)]} ({weights:,} weights)")
    everything, trained = sum(p.numel() for p in model.parameters()), _count(model.parameters())
    said = f"trained: {', '.join(parts)}; together {trained:,} of {everything:,} weights, the others stay frozen"
    if untied:
        head: Any = model.get_output_embeddings()
        return (
            f"{said}. The output embedding was tied to the input embedding; it is a matrix of its own now, a copy of "
            f"{head.weight.numel():,} weights, and the input embedding stays frozen"
        )
    if is_tied(model):
        return f"{said}. The output embedding is tied to the input embedding, and stays frozen with it"
    return said


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters if p.requires_grad}.values())


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
        decoded = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **decoded)
    finally:
        for handle in handles:
            handle.remove()
    return before, after
