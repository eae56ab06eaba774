"""Base models in 8 or 4 bits (bitsandbytes), under a LoRA adapter: loading, exact passes, and weights to export.

4 bits are QLoRA's NF4 with double quantisation (https://arxiv.org/abs/2305.14314). 8 bits are one scale per row of a
matrix, of the weights alone: bitsandbytes' own product (LLM.int8) rounds what goes in to 8 bits as well, and treats its
large columns by what else is in the batch, so that a completion would depend on its neighbours, and sampling and
training would disagree by some hundredths of a nat. Here a layer's weights are unpacked for its product alone.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import types
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tropism.errors import ModelError

logger = logging.getLogger("tropism")

Quantization = Literal["8bit", "4bit"]

INSTALL = 'pip install "tropism[bitsandbytes]"'
DEVICES = ("cuda", "cpu", "xpu")
"""What bitsandbytes has kernels for that are known here."""
_LARGEST_INT8 = 127.0


def check_quantization(quantization: str | None) -> None:
    """Refuse other names.

    Raises:
        ModelError: names the two there are.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise ModelError(
            f"quantization is {quantization!r}; choose 8bit or 4bit, or leave it out for weights as they are"
        )


def check_quantizable(name: str, path: Path, device: torch.device) -> None:
    """Whether a source can be loaded quantised, before anything of it is read.

    Raises:
        ModelError: it is a GGUF file, bitsandbytes is missing, or has no kernels for the device.
    """
    if name == "demo" or path.suffix == ".gguf":
        what = "the demo model is a GGUF file" if name == "demo" else f"{path} is a GGUF file"
        raise ModelError(
            f"quantization packs the weights of a Hugging Face folder or hub id, and {what}: give the model's folder "
            "or hub id instead, or leave quantization out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization needs the package bitsandbytes, which is not installed; {INSTALL}")
    if device.type not in DEVICES:
        raise ModelError(
            f"quantization is for CUDA devices (and, slowly, CPUs), not for {device.type}; leave it out, or set device"
        )
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # built for other drivers, say
        raise ModelError(f"bitsandbytes is installed but cannot be imported: {error}; {INSTALL}") from error


def check_family(details: PreTrainedConfig, skeleton: nn.Module, source: str) -> None:
    """Whether a family keeps its weights where they can be packed, by its configuration and a model without memory.

    Raises:
        ModelError: the weights are packed already, or most of them lie in no linear layer (mixtures of experts).
    """
    if getattr(details, "quantization_config", None) is not None:
        raise ModelError(
            f"the weights of {source} are quantised already; leave quantization out, and train lora on them as they are"
        )
    matrices = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear | Conv1D))
    others = sum(p.numel() for p in skeleton.parameters() if p.dim() > 2)
    if others > matrices:
        raise ModelError(
            f"{type(skeleton).__name__} keeps {others:,} weights in no linear layer (experts, say), which bitsandbytes "
            f"leaves as they are, beside {matrices:,} that it packs; leave quantization out"
        )


def quantized_options(quantization: Quantization | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Further arguments of ``from_pretrained``; none where nothing is packed.

    Args:
        dtype: of the layers that are not packed, and of the products.
    """
    if quantization is None:
        return {}
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if device.type == "cpu":
        logger.warning(
            "quantised weights are unpacked for every pass, which is slow on a CPU: it saves memory and costs time. "
            "Leave model.quantization out where the weights fit"
        )
    place = f"cuda:{torch.cuda.current_device()}" if device == torch.device("cuda") else str(device)
    return {"quantization_config": config, "device_map": {"": place}}


def prepare_quantized(model: PreTrainedModel) -> None:
    """Let packed layers compute the same in sampling and in training, in place, and freeze them.

    What peft's ``prepare_model_for_kbit_training`` does beside has no use here. Norms stay in the model's own type:
    they are frozen, and families compute them in float32 inside. Gradients of the embeddings' output are needed by
    reentrant checkpointing alone.
    """
    for module in model.modules():
        if is_8bit(module):
            module.forward = types.MethodType(_forward_8bit, module)
        elif is_4bit(module):
            # On CPUs with bf16 units it lays weights out anew once nobody asks for gradients, and has none ever after.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.requires_grad_(False)


def is_8bit(module: nn.Module) -> bool:
    """Whether a layer's weights are packed in 8 bits."""
    return type(module).__name__ == "Linear8bitLt"


def is_4bit(module: nn.Module) -> bool:
    """Whether a layer's weights are packed in 4 bits."""
    return type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weights are packed by bitsandbytes, so that no optimizer can train them."""
    return is_8bit(module) or is_4bit(module)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has packed layers."""
    return any(is_packed(module) for module in model.modules())


@torch.no_grad()
def unpacked_weight(module: nn.Module) -> Tensor:
    """[out, in] float32 what a packed layer multiplies with."""
    layer: Any = module
    if is_8bit(module):
        return _unpacked(layer.weight.data, _scales(layer))
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.float().view(layer.out_features, layer.in_features)


def plain_weight(module: nn.Module, change: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of a packed layer as the family's own layer has it, on the CPU, with ``change`` [out, in] added."""
    weight = unpacked_weight(module).cpu()
    weight = weight if change is None else weight + change.float().cpu()
    transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
    return (weight.T if transposed else weight).to(dtype).contiguous()


def _scales(layer: Any) -> Tensor:
    """[out] largest absolute weight of each row, kept in one place until bitsandbytes' own pass, in another after."""
    scales: Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return scales


def _unpacked(packed: Tensor, scales: Tensor) -> Tensor:
    """[out, in] float32 from int8 weights and the scale of each row."""
    return packed.float().mul_((scales.float() / _LARGEST_INT8)[:, None])


def _forward_8bit(layer: Any, x: Tensor) -> Tensor:
    """x W^T + b with the weights of an 8-bit layer; takes the place of its ``forward``."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    product: Tensor = _Product8bit.apply(x.to(dtype), layer.weight.data, _scales(layer), bias)  # type: ignore[no-untyped-call]
    return product


class _Product8bit(torch.autograd.Function):
    """Keeps the packed weights for the backward pass, not the unpacked ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return linear(x, _unpacked(packed, scales).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        (into,) = gradients
        return into @ _unpacked(packed, scales).to(into.dtype), None, None, None


def skeleton_of(details: PreTrainedConfig, kind: Any) -> nn.Module:
    """A model of this configuration without memory."""
    bare = copy.deepcopy(details)
    if getattr(bare, "quantization_config", None) is not None:
        del bare.quantization_config
    with torch.device("meta"):
        skeleton: nn.Module = kind.from_config(bare)
    return skeleton
