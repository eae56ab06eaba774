"""Low-rank adapters: which layers get one, how it starts, and the frozen second adapter that serves as reference."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tropism.errors import ModelError
from tropism.foreign.view import ADAPTER_CONFIG, ModelView

REFERENCE_ADAPTER = "reference"
"""Name of the frozen copy that ``add_reference_adapter`` makes."""

_READ = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
_NEEDLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Of adapter_config.json: how the adapter began, and what its weights say better. None of it is needed to go on."""
_MOST_UNHELD = 1024
"""The rank up to which memory is taken whatever the weight files hold."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""``init_lora_weights`` that leave the base model as it is."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank adapter: W x becomes W x + (alpha / rank) B A x with B = 0 at first (https://arxiv.org/abs/2106.09685).

    It has no dropout: ratios and KL compare log-probs of different forward passes, which dropout would make differ on
    equal weights.
    """

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float | None = None
    """Scale numerator; None is 2 * rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Which linear layers: "all-linear" (every one but the output embedding, whatever the family calls it), or names
    such as ("q_proj", "v_proj") that end a layer's full name."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"LoRA rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ModelError(f"LoRA alpha is {self.alpha}; it must be positive (None takes 2 * rank)")
        if not self.targets:
            raise ModelError('LoRA targets are empty; name linear layers or leave "all-linear"')

    @property
    def scale(self) -> float:
        """alpha / rank, what the product B A x is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


def add_lora(
    model: PreTrainedModel | PeftModel, lora: LoRA, *, seed: int, task: str | None = "language", but: str | None = None
) -> PeftModel:
    """``model`` with a fresh trainable adapter around its linear layers; everything else is frozen.

    The adapter starts as exactly nothing (B = 0), so the outputs are those of ``model`` bit for bit. Its weights are
    float32 whatever the model's dtype, and depend on ``seed`` alone: the global random state is neither read nor moved.

    Args:
        task: PEFT's name for what the model does, "language" for that of a language model of its kind; None for models
            that PEFT shall not know anything about.
        but: full name of a layer that gets none.

    Raises:
        ModelError: a target names no linear layer, or the model has an adapter already.
    """
    if isinstance(model, PeftModel):
        raise ModelError("the model has an adapter already, and training goes on with it; leave lora out")
    targets = [name for name in _target_layers(model, lora.targets) if name != but]
    transposed = {isinstance(model.get_submodule(name), Conv1D) for name in targets}
    config = LoraConfig(
        task_type=_task_of(model) if task == "language" else task,
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=True in transposed,
    )
    # PEFT draws on the CPU from the global generator and moves the result to the layer's device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted.eval()


def _task_of(model: PreTrainedModel) -> str:
    """PEFT's name for what a language model does."""
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def saved_adapter(view: ModelView) -> LoraConfig:
    """The LoRA adapter that a folder holds, with the layers that its weights name.

    Only numbers and switches are taken from adapter_config.json. On the word of other keys PEFT would import modules,
    and search names by patterns that take forever.

    Raises:
        ModelError: it is no LoRA adapter, or more than one; names the key.
    """
    file, settings = view.folder / ADAPTER_CONFIG, view.config
    base = settings.get("base_model_name_or_path")
    more = [key for key, value in settings.items() if value and key not in (*_READ, *_NEEDLESS)]
    more = [key for key in more if not (key == "bias" and settings[key] == "none")]
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        more.append("init_lora_weights")
    if settings.get("peft_type") != "LORA" or more:
        raise ModelError(
            f"{view.folder} holds more than a LoRA adapter ({', '.join(more[:5]) or 'its peft_type'}); merge it into "
            "its base with PEFT's merge_and_unload() and give the merged folder"
        )
    if not base or not isinstance(base, str):
        raise ModelError(f"{file} does not name base_model_name_or_path; add it")
    for key in ("rank_pattern", "alpha_pattern"):
        for name in settings.get(key) or ():
            if not re.fullmatch(r"[\w.]+", name):
                raise ModelError(f"{file}: {key} has the pattern {name!r:.80}; write the layer's name instead")
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            lora_dropout=0.0,
            **{key: settings[key] for key in _READ if settings.get(key) is not None},
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file} is no LoRA configuration: {error}") from error


def load_adapter(base: PreTrainedModel, adapter: LoraConfig, view: ModelView) -> PeftModel:
    """``base`` with the adapter's weights on it, trainable.

    Raises:
        ModelError: the weights are no LoRA weights, or do not fit.
    """
    file = view.folder / view.weight_files[0]
    weights: dict[str, Any] = load_peft_weights(str(view.path), device="cpu")
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?A(\.weight)?")
    ranks = {match[1]: value.shape[0] for key, value in weights.items() if (match := pattern.fullmatch(key))}
    if not ranks:
        raise ModelError(f"{file} holds no LoRA weights")
    rank = max(adapter.r, *(adapter.rank_pattern or {"": 0}).values())
    if rank > max(_MOST_UNHELD, *ranks.values()):
        raise ModelError(f"{view.folder / ADAPTER_CONFIG} asks for the rank {rank}, which {file.name} does not have")
    adapter = copy.deepcopy(adapter)
    adapter.target_modules = sorted(ranks)
    adapter.task_type = _task_of(base)
    # PEFT draws first weights before they are replaced; the global random state stays where it is.
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, adapter)
    assert isinstance(model, PeftModel)
    result: Any = set_peft_model_state_dict(model, weights)
    missing = [key for key in result.missing_keys if ".lora_" in key]
    if missing or result.unexpected_keys:
        raise ModelError(
            f"{file} does not fit the adapter: "
            f"{', '.join([*missing, *result.unexpected_keys][:3])} is missing on one side"
        )
    return model.eval()


def add_reference_adapter(model: PeftModel) -> None:
    """Add a frozen copy of the active adapter under the name "reference"; the active adapter stays as it is.

    Needed where training starts from an adapter: switching adapters off would give the base model, which is not what
    training started from.

    Raises:
        ModelError: the model has an adapter of that name already.
    """
    active = model.active_adapter
    if REFERENCE_ADAPTER in model.peft_config:
        raise ModelError(f"the model has an adapter named {REFERENCE_ADAPTER!r} already")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[active]))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{REFERENCE_ADAPTER}." in name:
                parameter.copy_(parameters[name.replace(f".{REFERENCE_ADAPTER}.", f".{active}.")])
    model.set_adapter(active)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    model.eval()


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the model's linear layers (``nn.Linear``, and GPT-2's ``Conv1D``) without the output embedding."""
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and name
    ]


def _target_layers(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    layers = linear_layers(model)
    if targets == "all-linear":
        return layers
    chosen: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        matches = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matches:
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            close = get_close_matches(target, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ModelError(
                f"LoRA target {target!r} is no linear layer of {type(model).__name__}, "
                f"which has {', '.join(known)} (the output embedding gets no adapter){hint}"
            )
        chosen.update(matches)
    return [name for name in layers if name in chosen]
