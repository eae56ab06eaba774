"""From what a recipe says of device and precision to the processes that run it."""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tropism.config import Recipe
from tropism.models.packed import cpu_multiplies

logger = logging.getLogger("tropism")


def accelerator_for(recipe: Recipe) -> Accelerator:
    """Device and precision of a recipe."""
    AcceleratorState._reset_state()  # a process may run several recipes, each with its own precision
    name = recipe.model.device if hasattr(recipe.model, "device") and isinstance(recipe.model.device, str) else "auto"
    precision = recipe.trainer.precision
    on_cuda = name != "cpu" and torch.cuda.is_available()
    if precision == "auto":
        # Asked without emulation, as for the type of the weights: emulated bf16 brings no speed.
        fast = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if fast else "fp32"
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=name == "cpu" or not torch.cuda.is_available(),
        log_with=list(recipe.trainer.tracking) or None,
        project_dir=recipe.run or "runs",
    )
    if precision == "bf16" and accelerator.device.type == "cpu" and not cpu_multiplies(torch.bfloat16):
        capability = torch.backends.cpu.get_cpu_capability()
        if accelerator.is_main_process:
            logger.warning(
                "precision is bf16, but this CPU (%s) has no bf16 arithmetic: it is emulated, which rounds like bf16 "
                "and brings no speed. Leave precision at auto unless you want to see what rounding does",
                capability,
            )
    return accelerator
