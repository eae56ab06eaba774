"""The numbers of a run that its memory estimate is made of, read off the objects that will run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tropism.errors import ConfigError
from tropism.training.config import TrainerConfig
from tropism.training.machine_memory import MachineMemory, machine_memory
from tropism.training.memory_estimate import (
    Architecture,
    Load,
    MemoryEstimate,
    estimate_memory,
    readable,
    suggestions,
)
from tropism.training.processes import Processes
from tropism.training.scoring import MOST_KEPT_BYTES

logger = logging.getLogger("tropism")

WARN_ABOVE = 0.85
"""Share of the available memory beyond which a run is warned of."""
COMPOSED_ACTIVATIONS = ("gelu_new", "gelu_fast", "quick_gelu", "gelu_python_tanh")
"""Activations that transformers computes step by step, each step kept for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """What a run needs on one device, and what there is."""

    estimate: MemoryEstimate
    machine: MachineMemory | None
    """None where the system does not say."""
    changes: Sequence[tuple[str, int]]
    """Settings that lower the need, with the bytes needed then; empty where the run fits with room to spare."""

    def line(self) -> str:
        """The estimate, and what is available, in one line."""
        there = "" if self.machine is None else f"; available: {readable(self.machine.available)}"
        return self.estimate.line() + there

    def facts(self) -> dict[str, Any]:
        """Bytes, for environment.json."""
        estimate, machine = self.estimate, self.machine
        return {
            "peak": estimate.peak,
            "phase": estimate.phase,
            "lasting": dict(estimate.lasting),
            "phases": {name: dict(parts) for name, parts in estimate.phases.items()},
            "available": None if machine is None else machine.available,
            "total": None if machine is None else machine.total,
        }

    def advice(self) -> str:
        """The settings to change, one clause each."""
        listed = [f"{text} (needs {readable(need)})" for text, need in self.changes]
        return f"Change one or more of: {'; '.join(listed)}" if listed else "Choose a smaller model"

    def check(self, *, tell: bool = True) -> None:
        """Log the estimate, warn where the run may not fit, and stop one that cannot, whatever else the machine does.

        Args:
            tell: whether this process does the logging.

        Raises:
            ConfigError: weights, gradients, optimizer, reference and KV cache alone exceed what exists.
        """
        estimate, machine = self.estimate, self.machine
        if machine is not None and estimate.certain > machine.total:
            raise ConfigError(
                "the run cannot fit into memory: weights, gradients, optimizer, reference and KV cache alone need "
                f"{readable(estimate.certain)}, the whole run about {readable(estimate.peak)}, and there are "
                f"{readable(machine.total)} in all. {self.advice()}"
            )
        if tell:
            logger.info("memory: %s", self.line())
        if tell and machine is not None and estimate.peak > WARN_ABOVE * machine.available:
            logger.warning(
                "memory may not suffice: the run needs about %s, and %s are available. %s",
                readable(estimate.peak),
                readable(machine.available),
                self.advice(),
            )


def memory_of_run(
    policy: Any, reference: Any, rows: Rows, trainer: TrainerConfig, processes: Processes
) -> MemoryReport:
    """The estimate for a run that is built and not yet started, beside what the machine has.

    Args:
        policy: a ``Policy``, with what is trained chosen. reference: a ``Reference``, or None.
    """
    reduced = processes.accelerator.mixed_precision != "no"
    load = load_of(policy, reference, rows, trainer, reduced=reduced, processes=processes.count)
    # Launchers tell how many of the processes are on this machine.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
    machine = machine_memory(policy.device, held=load.weights + load.reference, sharing=sharing)
    return memory_report(architecture_of(policy), load, machine)


def memory_report(architecture: Architecture, load: Load, machine: MachineMemory | None) -> MemoryReport:
    """The estimate beside what there is; settings to change only where it is tight."""
    estimate = estimate_memory(architecture, load)
    goal = math.inf if machine is None else WARN_ABOVE * machine.available
    changes = suggestions(architecture, load, goal) if estimate.peak > goal else ()
    return MemoryReport(estimate=estimate, machine=machine, changes=changes)


def architecture_of(policy: Any) -> Architecture:
    """Sizes of a policy's language model; what a family does not say follows from what it does."""
    config, model = policy.config, policy.language_model
    hidden = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    inner = _first(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim")
    activation = _first(config, "hidden_activation", "hidden_act", "activation_function", "dense_act_fn")
    gated = any("gate" in name.rpartition(".")[2] for name, _ in model.named_modules())
    gated = gated or getattr(config, "is_gated_act", False)
    return Architecture(
        hidden_size=hidden,
        intermediate_size=int(inner or 4 * hidden),
        layers=_layers(policy),
        cached_layers=policy.cached_layers if getattr(policy, "encoder_decoder", False) else None,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or hidden // heads),
        vocabulary=_vocabulary(model),
        mlp_tensors=4 if gated else 5 if activation in COMPOSED_ACTIVATIONS else 2,
        eager_attention=model.config._attn_implementation == "eager",
    )


def _vocabulary(model: Any) -> int:
    """Logits of a token; none of a model that scores whole texts."""
    output = model.get_output_embeddings()
    return 0 if output is None else int(output.weight.shape[0])


def _first(config: Any, *names: str) -> Any:
    """The first of these fields that a configuration fills."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one step of a run computes on, over all processes."""

    count: int
    """Rows of one optimizer step."""
    mean_tokens: float
    """Of a row, prompt and completion."""
    longest_tokens: int
    trained_share: float
    """Share of the tokens that are completion tokens."""
    sampled: int = 0
    """Completions sampled in one collect; 0 for methods that sample nothing."""
    prompts: int = 0
    """Different prompts among them."""
    longest_prompt: int = 0
    max_new_tokens: int = 0
    sampling_batch_size: int = 64
    repeated: bool = False
    """Whether the rows of a step are passed several times, so that frozen blocks are computed once for all passes."""


def rows_of(
    items: Sequence[Any], config: Any, sampling: Any, *, prompts_per_step: int, held_out: int, before: int = 0
) -> Rows:
    """Rows of a method that samples (every completion taken to be as long as it may be), or of one that learns texts.

    Args:
        items: the prompts of the data, or its texts.
        config: the method's. sampling: how it samples.
        held_out: prompts that evaluation answers, one completion each.
        before: tokens that stand before every prompt, or text, and are not in it: those that ask for rewards.
    """
    if config.reads == "comparisons":
        return _rows_of_comparisons(items, prompts_per_step)
    if config.reads == "pairs":
        return _rows_of_pairs(items, prompts_per_step)
    if config.reads != "prompts":
        return _rows_of_texts(items, prompts_per_step, before)
    lengths, new = [before + len(prompt.ids) for prompt in items], sampling.max_new_tokens
    size = config.step_size(prompts_per_step, len(items))
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    return Rows(
        count=size.batch,
        mean_tokens=mean + new,
        longest_tokens=longest + new,
        trained_share=new / (mean + new),
        sampled=max(size.completions, held_out),
        prompts=max(size.prompts, held_out),
        longest_prompt=longest,
        max_new_tokens=new,
        sampling_batch_size=sampling.batch_size,
        repeated=getattr(config, "num_epochs", 0) + config.needs_reference > 1,
    )


def _rows_of_texts(texts: Sequence[Any], batch_size: int, before: int) -> Rows:
    lengths = [before + len(text.prompt_ids) + len(text.completion_ids) for text in texts]
    learned = sum(len(text.completion_ids) for text in texts)
    return Rows(
        count=batch_size,
        mean_tokens=sum(lengths) / len(lengths),
        longest_tokens=max(lengths),
        trained_share=learned / sum(lengths),
    )


def _rows_of_pairs(pairs: Sequence[Any], batch_size: int) -> Rows:
    """A pair is computed whole, its prompt once for each completion."""
    prompts = [len(pair.prompt_ids) for pair in pairs]
    completions = [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    lengths = [2 * prompt + both for prompt, both in zip(prompts, completions, strict=True)]
    return Rows(
        count=batch_size,
        mean_tokens=sum(lengths) / len(lengths),
        longest_tokens=max(lengths),
        trained_share=sum(completions) / sum(lengths),
    )


def _rows_of_comparisons(items: Sequence[Any], batch_size: int) -> Rows:
    """An item is computed whole, so that all of its texts make one row."""
    lengths = [max(map(len, item.ids)) * len(item.ids) for item in items]
    return Rows(
        count=batch_size, mean_tokens=sum(lengths) / len(lengths), longest_tokens=max(lengths), trained_share=1.0
    )


def load_of(policy: Any, reference: Any, rows: Rows, trainer: TrainerConfig, *, reduced: bool, processes: int) -> Load:
    """What a run asks of one device.

    Args:
        policy: a ``Policy``, with what is trained chosen. reference: a ``Reference``, or None.
        reduced: whether forward and backward run under bf16 autocast.
        processes: each takes its share of the rows.
    """
    frozen = getattr(reference, "frozen", None)
    q_heads = getattr(policy, "q_heads", None)
    # A head keeps its inner layer, of twice the width; what they all read counts once.
    of_heads = [] if q_heads is None else list(q_heads.parameters())
    weights, trained = _storages(_tensors(policy)), [p for p in policy.parameters() if p.requires_grad]
    of_reference = {} if frozen is None else _storages(_tensors(frozen))
    weight_size = policy.dtype.itemsize
    packed, kept = _packed_bytes(policy, 2 if reduced else weight_size)
    sharded = isinstance(policy, FSDPModule)
    whole = sum(p.numel() * p.element_size() for p in policy.parameters()) if sharded else 0
    adapted = [m for m in policy.model.modules() if hasattr(m, "get_base_layer")]
    matrices = sum(p.numel() for p in policy.language_model.parameters() if p.dim() == 2 and p.is_floating_point())
    return Load(
        weights=sum(weights.values()),
        trained=sum(_here(p).numel() * p.element_size() for p in trained),
        largest=max((p.numel() * p.element_size() for p in trained), default=0),
        reference=sum(size for place, size in of_reference.items() if place not in weights),
        # Sharded weights are whole while the policy samples, and two layers and the embeddings while it computes.
        packed=packed + whole,
        packed_kept=0 if sharded else kept,
        cast=(2 * matrices if reduced and weight_size > 2 else 0)
        + (_gathered_bytes(policy) if sharded else _unpacked_bytes(policy)),
        weight_size=weight_size,
        compute_size=2 if reduced else weight_size,
        adapter_rank=max((max(m.r.values()) for m in adapted if isinstance(getattr(m, "r", None), dict)), default=0),
        trained_layers=_trained_layers(policy),
        gradient_checkpointing=policy.recomputes_activations,
        value_heads=int(policy.value_head is not None) + (0 if q_heads is None else 3 + 2 * len(q_heads.q)),
        head_weights=_bytes(of_heads),
        head_trained=_bytes(p for p in of_heads if p.requires_grad),
        update_tokens=round(-(-rows.count // processes) * rows.mean_tokens),
        row_tokens=rows.longest_tokens,
        trained_share=rows.trained_share,
        micro_batch_tokens=min(
            trainer.micro_batch_tokens, (trainer.micro_batch_size or rows.count) * rows.longest_tokens
        ),
        chunk_bytes=policy.chunk_size * 4 * _vocabulary(policy.language_model),
        sampled_rows=-(-rows.sampled // processes),
        sampled_prompts=-(-rows.prompts // processes),
        prompt_tokens=rows.longest_prompt,
        max_new_tokens=rows.max_new_tokens,
        sampling_batch_size=rows.sampling_batch_size,
        trunk=_trunk_bytes(policy, rows) if processes == 1 else 0,
        on_host=policy.device.type != "cuda",
        # The first process gathers weights and moments to save them.
        merges=max(
            sum(_numbers(m.get_base_layer()) * 4 for m in adapted),
            3 * sum(p.numel() * p.element_size() for p in trained) if sharded else 0,
        ),
    )


def _is_packed(module: Any) -> bool:
    """Whether a linear layer keeps its weights in integers."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def _unpacked_bytes(policy: Any) -> int:
    """Quantised layers are unpacked one at a time, to float32 and then to the model's type."""
    size = 4 + int(policy.dtype.itemsize)
    return max((_numbers(module) * size for module in policy.model.modules() if _is_packed(module)), default=0)


def _numbers(layer: Any) -> int:
    """Entries of a layer's matrix, however it is packed."""
    return int(layer.in_features * layer.out_features if _is_packed(layer) else layer.weight.numel())


def _trunk_bytes(policy: Any, rows: Rows) -> int:
    """What frozen blocks give for the rows of a step, where it is kept."""
    trunk = getattr(policy, "trunk", None)
    if trunk is None or not trunk.usable or not rows.repeated:
        return 0
    tokens = rows.sampled * rows.max_new_tokens + rows.prompts * rows.longest_prompt
    size = int(tokens * trunk.width * policy.dtype.itemsize)
    return size if size <= MOST_KEPT_BYTES else 0


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(_here(p).numel() * p.element_size() for p in parameters)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes, so that what is shared counts once."""
    storages = [_here(tensor).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _here(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered_bytes(policy: Any) -> int:
    """Sharded weights that are whole at a time in a pass: two of the largest layer, and what is in no layer."""
    layers: list[Any] = [m for m in policy.modules() if isinstance(m, FSDPModule) and m is not policy]
    sizes: list[int] = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    everything: int = sum(p.numel() * p.element_size() for p in policy.parameters())
    return everything - sum(sizes) + 2 * max(sizes, default=0)


def _layers(policy: Any) -> int:
    """Layers of the transformer; of an encoder-decoder those of both halves."""
    layers = int(policy.config.num_hidden_layers)
    return layers + policy.cached_layers if getattr(policy, "encoder_decoder", False) else layers


def _trained_layers(policy: Any) -> int:
    """Layers that gradients pass through: all from the lowest with a trained weight on."""
    layers = _layers(policy)
    if getattr(policy, "encoder_decoder", False):
        if any(parameter.requires_grad for parameter in policy.halves.encoder.parameters()):
            return layers
        layers = policy.cached_layers
    if policy.language_model.get_input_embeddings().weight.requires_grad:
        return layers
    numbers = [
        int(next(part for part in name.split(".") if part.isdigit()))
        for name, p in policy.model.named_parameters()
        if p.requires_grad and any(part.isdigit() for part in name.split("."))
    ]
    return layers - min(numbers, default=layers)


def _packed_bytes(policy: Any, size: int) -> tuple[int, int]:
    """Copies of the linear layers that sampling makes, and those of frozen layers, which are made once and kept.

    On the CPU every layer is laid out anew; elsewhere only adapters are merged, and other precisions converted.
    """
    model, device = policy.model, policy.device.type
    inside = {id(c) for m in model.modules() if hasattr(m, "get_base_layer") for c in m.modules() if c is not m}
    packed = kept = 0
    for module in model.modules():
        adapted = hasattr(module, "get_base_layer")
        layer: Any = module.get_base_layer() if adapted else module
        if id(module) in inside or type(layer).__name__ not in ("Linear", "Conv1D"):
            continue
        if device != "cpu" and not adapted and layer.weight.element_size() == size:
            continue
        packed += layer.weight.numel() * size
        if not any(p.requires_grad for p in module.parameters()):
            kept += layer.weight.numel() * size
    return packed, kept
