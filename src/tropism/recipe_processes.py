"""From what a recipe says of device and precision, and a launcher of processes, to the processes that run it."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    disable_fsdp_ram_efficient_loading,
)
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.models.packed import cpu_multiplies
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.models.reward_model import RewardModel
from tropism.models.sharding import shard
from tropism.training.processes import Processes

logger = logging.getLogger("tropism")


def accelerator_for(recipe: Recipe) -> Accelerator:
    """Device and precision of a recipe.

    Raises:
        ConfigError: the launcher asks for sharded weights in a way that is not supported, or for several processes and
            has started one.
    """
    _refuse_one_for_many()
    plugin = sharding()
    if plugin is not None:
        disable_fsdp_ram_efficient_loading()  # or transformers leaves the weights of all other processes empty
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
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience())],
    )
    if plugin is not None and accelerator.parallelism_config is not None:
        raise ConfigError(
            "weights are sharded over all processes; launch without --use_parallelism_config (tensor, context and "
            "expert parallelism are not supported)"
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


def processes_for_measuring(device: str = "auto") -> Processes:
    """The processes that a launcher started to measure something, each with a whole model; one without a launcher.

    Args:
        device: of a model, as in ``ModelConfig``.

    Raises:
        ConfigError: the launcher asks for sharded weights, or for several processes and has started one.
    """
    _refuse_one_for_many()
    if sharding() is not None:
        raise ConfigError("each process measures with a whole model; launch without --use_fsdp")
    AcceleratorState._reset_state()
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    return Processes(Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=patience())]))


def patience() -> timedelta:
    """How long processes wait for each other: an hour, or TROPISM_PROCESS_TIMEOUT minutes.

    Raises:
        ConfigError: that is no number of minutes.
    """
    minutes = os.environ.get("TROPISM_PROCESS_TIMEOUT", "60")
    try:
        waiting = timedelta(minutes=float(minutes))
    except (ValueError, OverflowError):
        waiting = timedelta(0)
    if waiting <= timedelta(0):
        raise ConfigError(f"TROPISM_PROCESS_TIMEOUT is {minutes!r}; set it to a positive number of minutes")
    return waiting


def _refuse_one_for_many() -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process and says nothing.

    Raises:
        ConfigError: this is one.
    """
    counts = ("WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    by_accelerate = {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if by_accelerate and not any(name in os.environ for name in counts):
        raise ConfigError(
            "accelerate launch --cpu started a single process, although it was asked for several: it needs mpirun for "
            "more. Use torchrun --nproc_per_node N -m tropism.cli train ..., or accelerate launch --multi_gpu, which "
            "starts them on CPUs, too"
        )


def prepared(policy: Policy | RewardModel, reference: Reference | None, accelerator: Accelerator) -> Any:
    """The policy as the trainer calls it: sharded over the processes where the launcher says so, otherwise replicated.

    With it a reference that is a copy is sharded. Optimizers have to be made afterwards.

    Raises:
        ConfigError: the weights of this model cannot be sharded, or not with this method.
    """
    plugin = sharding()
    if plugin is None or accelerator.num_processes == 1:
        # Not wrapped for several processes: the trainer adds up gradients by itself, after the last backward pass.
        return accelerator.prepare_model(policy, device_placement=False, evaluation_mode=True)
    if isinstance(policy, RewardModel):
        raise ConfigError("the weights of reward models cannot be sharded; launch without --use_fsdp")
    if policy.reference_logits is not None and reference is not None and reference.kind == "copy":
        raise ConfigError(
            "the exact KL to the reference needs its output embedding whole, and a copy of the model is sharded with "
            "it: train an adapter (lora), set kl_coef to 0, or launch without --use_fsdp"
        )
    classes = plugin.transformer_cls_names_to_wrap
    shard(policy, classes=classes)
    if reference is not None and reference.kind == "copy":
        shard(reference.frozen, classes=classes)
    return policy


def sharding() -> FullyShardedDataParallelPlugin | None:
    """How ``accelerate launch --use_fsdp`` asks for weights to be sharded; None where it does not.

    Raises:
        ConfigError: it asks for something that is not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":  # asked before the plugin, which has needs of its own for version 1
        raise ConfigError("sharded weights need FSDP2; add --fsdp_version 2 to --use_fsdp")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"accelerate cannot use the FSDP options that it was launched with: {error}") from error
    refused = {
        "--fsdp_offload_params: leave it out": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "--fsdp_reshard_after_forward false: leave it out": plugin.reshard_after_forward is False,
        "--fsdp_activation_checkpointing: set model.gradient_checkpointing instead": plugin.activation_checkpointing,
        "--fsdp_auto_wrap_policy SIZE_BASED_WRAP: use TRANSFORMER_BASED_WRAP": (
            plugin.auto_wrap_policy is size_based_auto_wrap_policy
        ),
        "ignored modules: leave them out": plugin.ignored_modules is not None,
    }
    for option, asked in refused.items():
        if asked:
            raise ConfigError(f"sharded weights do not go together with {option}")
    return plugin
