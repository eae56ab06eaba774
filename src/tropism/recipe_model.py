"""From what a recipe says of the model to a policy: adapter, value head, and what of it is trained."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from tropism.config import TRAIN_AN_ADAPTER, Recipe
from tropism.errors import ConfigError
from tropism.generation import make_conditioner, q_heads_of, slots_for
from tropism.models.conditioning import RewardSlots
from tropism.models.freezing import train_last_layers
from tropism.models.heads import ValueHead
from tropism.models.loading import LoadedModel, load_model
from tropism.models.lora import add_lora, add_reference_adapter
from tropism.models.modules import base_model
from tropism.models.policy import Policy
from tropism.models.q_heads import QHeads
from tropism.models.quantization import is_quantized
from tropism.models.reward_files import facts_of_source, load_reward_body
from tropism.models.reward_model import RewardModel
from tropism.models.trunk import FrozenTrunk
from tropism.targets.conditioner import Conditioner

logger = logging.getLogger("tropism")


def reward_model_of(recipe: Recipe) -> tuple[LoadedModel, RewardModel]:
    """A reward model around the body that the recipe names; exactly what is trained has gradients."""
    loaded = load_reward_body(recipe.model, seed=recipe.seed)
    network: Any = loaded.model
    bare = RewardModel(network)
    facts = facts_of_source(recipe.model)
    if facts is None:
        bare.start_head(seed=recipe.seed)
    else:  # training goes on from what its head has learned
        bare.rescale(gain=1.0, bias=facts.offset)
    if recipe.lora is None:
        _train_everything(network)
        return loaded, bare
    adapted = add_lora(network, recipe.lora, seed=recipe.seed, task=None, but=bare.head_name)
    bare.head.requires_grad_(True)
    model = RewardModel(adapted)
    model.rescale(gain=bare.gain.item(), bias=bare.bias.item())
    return replace(loaded, model=adapted), model


def _train_everything(model: Any) -> None:
    """All weights get gradients, with a warning where their type loses small updates."""
    model.requires_grad_(True)
    if next(model.parameters()).dtype != torch.float32:
        logger.warning(
            "weights are trained in %s: small updates are lost to rounding; set model.dtype to float32", model.dtype
        )


def policy_of(recipe: Recipe) -> tuple[LoadedModel, Policy]:
    """The model with its adapter and heads; exactly what is trained has gradients."""
    loaded = load_model(recipe.model)
    model: Any = loaded.model
    if isinstance(model, PeftModel):
        if recipe.lora is not None:
            raise ConfigError("the model is an adapter already and training goes on with it; leave lora out")
        if recipe.train_layers is not None:
            raise ConfigError("the model is an adapter, and training goes on with it alone; leave train_layers out")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{model.active_adapter}." in name)
        if "reference" not in model.peft_config:
            add_reference_adapter(model)
    elif recipe.lora is not None:
        model = add_lora(model, recipe.lora, seed=recipe.seed)
    elif is_quantized(model):
        raise ConfigError(f"{loaded.source} has quantised weights, {TRAIN_AN_ADAPTER}")
    else:
        _train_everything(model)
    head = None
    if recipe.algorithm.needs_value_head:
        # Not hidden_size: some families (OPT) project their hidden states before the vocabulary.
        width = loaded.model.get_output_embeddings().weight.shape[1]
        head = ValueHead(width).to(next(model.parameters()).device)
    slots = _slots_of(recipe, loaded)
    q_heads = _q_heads_of(recipe, loaded) if recipe.algorithm.needs_q_heads else None
    # First, as it refuses a family that cannot be used.
    policy = Policy(model, value_head=head, q_heads=q_heads, conditioning=slots)
    if policy.encoder_decoder:
        _check_prompt_is_read_only(recipe)
    if recipe.train_layers is not None:
        train_last_layers(model, recipe.train_layers)
        FrozenTrunk.attach(policy, recipe.train_layers)
    return replace(loaded, model=model), policy


def _check_prompt_is_read_only(recipe: Recipe) -> None:
    """Refuses a method that learns the prompt's tokens, which an encoder does not predict."""
    method = recipe.algorithm
    why = (
        f"the model is an encoder-decoder, whose encoder predicts no tokens, so {method.name} cannot learn the prompt: "
    )
    if getattr(method, "completion_only", True) is False:
        raise ConfigError(f"{why}leave algorithm.completion_only out")
    if getattr(method, "prompt_loss_weight", 0.0) > 0:
        raise ConfigError(f"{why}set algorithm.prompt_loss_weight to 0")


def conditioner_of(recipe: Recipe, loaded: LoadedModel) -> Conditioner | None:
    """What stands before prompts; None for methods that ask for nothing. Of a conditioned model it goes on."""
    config = recipe.algorithm.conditioning
    if config is None:
        if loaded.conditioning is not None:
            raise ConfigError(
                f"{loaded.source} is a model that is asked for rewards ({loaded.conditioning.mechanism}), and "
                f"{recipe.algorithm.name} would train it without. Write it out at one target first: "
                "tropism export RUN --target-reward R --out DIR"
            )
        return None
    conditioner = make_conditioner(config, loaded)
    if loaded.conditioning is not None:
        loaded.conditioning.check(config)
        loaded.conditioning.restore(conditioner, None)
    conditioner.knows_open |= recipe.algorithm.leaves_open
    return conditioner


def _q_heads_of(recipe: Recipe, loaded: LoadedModel) -> QHeads:
    """Fresh heads, or those of a model that has some already, with which training goes on."""
    count = recipe.algorithm.q_head_count
    heads = q_heads_of(loaded, count=count, seed=recipe.seed)
    if len(heads.q) != count:
        raise ConfigError(
            f"{loaded.source} was trained with {len(heads.q)} Q heads, and algorithm.two_qs asks for {count}; leave it "
            "as it was, or start from the model before"
        )
    return heads


def _slots_of(recipe: Recipe, loaded: LoadedModel) -> RewardSlots | None:
    config = recipe.algorithm.conditioning
    if config is None or config.mechanism == "text":
        return None
    slots = slots_for(config, loaded)
    if loaded.conditioning is not None:
        loaded.conditioning.check(config)
        loaded.conditioning.restore(make_conditioner(config, loaded), slots)
    else:
        slots.start(base_model(loaded.model).get_input_embeddings(), seed=recipe.seed, ones=config.direction == "ones")
    return slots
