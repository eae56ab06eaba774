"""What is done to a model in memory: unwrapping it, switching dropout off, other weights, another forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)


class AutoLanguageModel:
    """The Auto class of language models: that of encoder-decoders where the configuration says so, or the causal."""

    @staticmethod
    def of(config: PreTrainedConfig) -> Any:
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> Any:
        return cls.of(config).from_config(config, **options)

    @classmethod
    def from_pretrained(cls, source: str, *, config: PreTrainedConfig, **options: Any) -> Any:
        return cls.of(config).from_pretrained(source, config=config, **options)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside an adapter model, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A block in which ``module`` computes ``forward``; then it has again what it was given before, if anything.

    A forward of its own is what an outer block or a library that wraps modules has given it. That of its class is not
    put into it: a copy of the module would go on computing with the weights of the first.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout of ``model`` in place: layers, functional dropout, layer drop, and its configuration.

    Ratios and KL compare log-probs of different forward passes; dropout would make them differ on equal weights.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        zero_dropout(config)


def zero_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout rate of ``config`` and its sub-configurations to 0, in place."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            zero_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


def _tie(plain: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Tie what is one tensor in ``weights``. The configuration alone would tie T5 v1.1's two embeddings, too."""
    wanted: dict[str, str] = plain.get_expanded_tied_weights_keys(all_submodels=True)

    def are_one(first: str, second: str) -> bool:
        one, other = weights.get(first), weights.get(second)
        return one is None or other is None or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)

    plain.all_tied_weights_keys = {name: source for name, source in wanted.items() if are_one(name, source)}
    plain.tie_weights(recompute_mapping=False)


def with_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A new plain model of the same class and configuration that holds ``weights`` themselves, not copies of them."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.name_or_path = model.config.name_or_path
    for attribute in ("quantization_config", "distributed_config"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    config._attn_implementation = model.config._attn_implementation
    # Buffers are computed by the constructor (rotary frequencies and the like); only parameters are left out.
    with init_empty_weights(include_buffers=False):
        plain = type(model)(config)
    plain.load_state_dict(weights, assign=True)
    _tie(plain, weights)
    if model.can_generate():
        plain.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    plain.eval()
    return plain
