"""Reward models in folders: the body that training starts from, and the trained model as a plain classifier."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from tropism.errors import ModelError
from tropism.foreign.pretrained import load_pretrained
from tropism.foreign.reward_facts import FILE, OFFSET, RewardFacts
from tropism.foreign.view import ADAPTER_CONFIG
from tropism.models.loading import (
    DEMO,
    LoadedModel,
    ModelConfig,
    attention_options,
    device_named,
    dtype_named,
    folder_or_hub_id,
    load_failure,
    load_model,
)
from tropism.models.modules import base_model, disable_dropout, with_weights, zero_dropout
from tropism.models.reward_model import RewardModel
from tropism.models.saving import merged_weights, save_plain, tensors_of
from tropism.models.special_tokens import SpecialTokens

logger = logging.getLogger("tropism")

PAD = "<|pad|>"
"""The token that models without one, or with eos for it, get."""


def load_reward_body(source: Any, *, seed: int) -> LoadedModel:
    """A sequence classifier with one output around any body: a causal language model, an encoder, or a reward model.

    What the files do not hold of its head depends on ``seed`` alone; ``RewardModel.start_head`` draws its last layer.

    Args:
        source: what ``load_model`` takes; of a pair the model may be a sequence classifier, which is trained in place,
            or a causal language model, which stays as it is.

    Raises:
        ModelError: nothing usable is there, or an adapter.
    """
    own = True
    if isinstance(source, LoadedModel):
        model, tokenizer, name, own = source.model, source.tokenizer, source.source, False
    elif isinstance(source, tuple):
        model, tokenizer = source
        name, own = str(getattr(model, "name_or_path", "") or type(model).__name__), False
    else:
        config = source if isinstance(source, ModelConfig) else ModelConfig(name=str(source))
        model, tokenizer, name = (*_from_files(config, seed), config.name)
    if isinstance(model, PeftModel):
        raise ModelError("a reward model cannot start from an adapter; merge it into its base first")
    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            "a reward model starts from a hub id, a folder, a .gguf file, ModelConfig, LoadedModel or (model, "
            f"tokenizer), not {source!r:.200}"
        )
    _refuse_encoder_decoder(model.config, name)
    if model.can_generate():
        model = _with_head(model, seed, own=own)
        tokenizer = tokenizer if own else copy.deepcopy(tokenizer)  # which may get a pad token
    _give_pad(model, tokenizer)
    disable_dropout(model)
    model.eval()
    bos = tokenizer.bos_token_id
    tokens = SpecialTokens(pad_id=int(tokenizer.pad_token_id), eos_ids=(), bos_id=None if bos is None else int(bos))
    return LoadedModel(model=model, tokenizer=tokenizer, tokens=tokens, source=name)


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder is a trained reward model's."""
    return RewardFacts.read(Path(folder)) is not None


def load_reward_model(
    source: str | Path | ModelConfig,
) -> tuple[RewardModel, PreTrainedTokenizerBase, RewardFacts]:
    """A trained reward model. Gain and bias are in its head, and what that cannot hold in ``bias``.

    Args:
        source: its model folder, or a hub id.

    Raises:
        ModelError: there is none, or a damaged one.
    """
    config = source if isinstance(source, ModelConfig) else ModelConfig(name=str(source))
    facts = RewardFacts.read(_folder_of_facts(config))
    if facts is None:
        raise ModelError(f"{config.name} holds no reward model ({FILE}); give a run's model folder")
    loaded = load_reward_body(config, seed=0)
    model = RewardModel(loaded.model)
    model.rescale(gain=1.0, bias=facts.offset)
    return model, loaded.tokenizer, facts


@torch.no_grad()
def save_reward_model(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, facts: RewardFacts
) -> RewardFacts:
    """Write a folder that ``AutoModelForSequenceClassification`` loads with no custom code; returns its facts.

    Its logits are the scores where the head has a bias. Where it has none they differ by a constant, which config.json
    names as ``tropism_reward_offset``.

    Args:
        facts: gain, bias and offset are those of ``model``, whatever is said here.
    """
    live: Any = model.model
    base: Any = base_model(live)
    weights = merged_weights(live) if isinstance(live, PeftModel) else tensors_of(base)
    gain, bias = model.gain.item(), model.bias.item()
    weight_name, bias_name = f"{model.head_name}.weight", f"{model.head_name}.bias"
    weights[weight_name] = (weights[weight_name].float() * gain).to(weights[weight_name].dtype)
    offset = bias
    if bias_name in weights:
        weights[bias_name] = (weights[bias_name].float() * gain + bias).to(weights[bias_name].dtype)
        offset = 0.0
    plain = with_weights(base, weights)
    written = replace(facts, gain=gain, bias=bias, offset=offset)
    settings = {OFFSET: offset, "id2label": {0: "reward"}, "label2id": {"reward": 0}}
    save_plain(plain, tokenizer, folder, settings=settings, beside=written.write)
    return written


def facts_of_source(source: Any) -> RewardFacts | None:
    """What the folder of a trained reward model says; None of any other source, and of models given from Python.

    Args:
        source: what ``load_reward_body`` takes.
    """
    if isinstance(source, LoadedModel | tuple):
        return None
    config = source if isinstance(source, ModelConfig) else ModelConfig(name=str(source))
    if config.name == DEMO or config.name.endswith(".gguf"):
        return None
    return RewardFacts.read(_folder_of_facts(config))


def _folder_of_facts(config: ModelConfig) -> Path:
    """The folder with reward_model.json: the model's own, or the hub's cache of it."""
    folder = Path(config.name).expanduser()
    if folder.exists():
        return folder
    name = folder_or_hub_id(config.name, folder)
    try:
        found = cached_file(name, FILE, revision=config.revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ModelError(load_failure(name, error)) from error
    return folder if found is None else Path(found).parent


def _from_files(config: ModelConfig, seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    path = Path(config.name).expanduser()
    if config.quantization is not None:
        raise ModelError("reward models are loaded with their weights as they are; leave quantization out")
    if config.name == DEMO or path.suffix == ".gguf":
        loaded = load_model(config)
        return loaded.model, loaded.tokenizer
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        raise ModelError(f"{path} is an adapter; a reward model cannot start from one: merge it into its base first")
    if config.trust_remote_code:
        raise ModelError("reward models do not run the code of a model's authors; leave trust_remote_code out")
    device = device_named(config.device)
    source = folder_or_hub_id(config.name, path)

    def prepare(details: PreTrainedConfig) -> None:
        _refuse_encoder_decoder(details, source)
        judges = any(kind.endswith("ForSequenceClassification") for kind in details.architectures or [])
        if judges and details.num_labels != 1:
            raise ModelError(
                f"{source} is a classifier with {details.num_labels} labels, and a reward model has one score; give "
                "the model that it was trained from"
            )
        zero_dropout(details)
        details.num_labels = 1

    try:
        # What the files lack is drawn from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, tokenizer, missing = load_pretrained(
                source,
                AutoModelForSequenceClassification,
                revision=config.revision,
                prepare=prepare,
                dtype=dtype_named(config.dtype, device),
                **attention_options(config),
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(load_failure(source, error)) from error
    _refuse_missing(model, missing, source)
    model.to(device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def _refuse_encoder_decoder(details: PreTrainedConfig, source: str) -> None:
    if details.is_encoder_decoder:
        raise ModelError(
            f"{source} is an encoder-decoder ({details.model_type}); a reward model is an encoder or a causal LM"
        )


def _refuse_missing(model: Any, missing: list[str], source: str) -> None:
    """Only what stands on top of the body may be new, and of a trained reward model nothing."""
    if missing and RewardFacts.read(Path(source)) is not None:
        raise ModelError(f"the reward model in {source} is damaged: it has no weights for {', '.join(missing[:5])}")
    prefix = f"{model.base_model_prefix}."
    lost = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
    if lost:
        raise ModelError(f"{source} does not hold all weights of a {type(model).__name__}: {', '.join(lost[:5])}")
    pooler = [name for name in missing if ".pooler." in name]
    if pooler:
        logger.warning("%s has no pooler, so that it starts from random weights: %s", source, ", ".join(pooler))


def _with_head(model: Any, seed: int, *, own: bool) -> Any:
    """A sequence classifier around the body of a causal language model; around a copy of it unless it is our own."""
    details = type(model.config).from_dict(model.config.to_dict())
    details.num_labels = 1
    details._attn_implementation = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            classifier = AutoModelForSequenceClassification.from_config(details, dtype=model.dtype)
        except ValueError as error:
            raise ModelError(f"{type(model).__name__} has no form with a score: {error}") from error
    weights = model.base_model.state_dict()
    weights = weights if own else {name: tensor.clone() for name, tensor in weights.items()}
    classifier.base_model.load_state_dict(weights, assign=True)
    classifier.name_or_path = classifier.config.name_or_path = model.name_or_path
    return classifier.to(model.device)


def _give_pad(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token of its own: plain classifiers find the last token of a row by comparing ids with the pad's.

    A new token takes a free row of the embedding, or one that is added. Pads go to the right, where families that count
    positions from the first column are not misled.
    """
    tokenizer.padding_side = "right"
    pad = tokenizer.pad_token_id
    if pad is None or pad in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
        pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    embeddings = model.get_input_embeddings()
    if pad >= embeddings.weight.shape[0]:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(pad + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[pad:].zero_()
    model.config.get_text_config().pad_token_id = pad
