"""Writing models: as a plain Hugging Face folder that loads without this library, or as a LoRA adapter folder."""

from __future__ import annotations

import copy
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tropism.errors import ModelError
from tropism.models.modules import AutoLanguageModel, base_model, with_weights
from tropism.models.quantization import is_packed, plain_weight
from tropism.models.seq2seq import is_encoder_decoder
from tropism.storage import flush, writing

logger = logging.getLogger(__name__)


def save_plain(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write ``model`` and ``tokenizer`` as a folder that the Auto class of its kind loads with no custom code.

    An active adapter is merged into a copy of the layers it changes; the live model keeps its weights bit for bit.
    Quantised weights are written as the numbers they stand for, in the model's dtype. The folder appears under its name
    only once it is complete, and then replaces an older one.

    Args:
        settings: further entries of config.json.
        beside: writes further files into the folder.

    Raises:
        ModelError: the weights are quantised by something else than bitsandbytes.
    """
    base = base_model(model)
    weights = merged_weights(model) if isinstance(model, PeftModel) else plain_tensors(base)
    plain = with_weights(base, weights)
    if plain.can_generate():
        plain.generation_config = _valid_generation_config(plain.generation_config)
    for name, value in (settings or {}).items():
        setattr(plain.config, name, value)
    with replacing(Path(folder)) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if beside is not None:
            beside(temporary)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the active adapter alone, as a folder that PEFT loads on the base model it names."""
    with replacing(Path(folder)) as temporary:
        # PEFT would otherwise ask the hub whether the base model's vocabulary has grown.
        model.save_pretrained(str(temporary), selected_adapters=[model.active_adapter], save_embedding_layers=False)
        saved = temporary / str(model.active_adapter)
        if saved.is_dir():
            for file in saved.iterdir():
                file.rename(temporary / file.name)
            saved.rmdir()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``module.state_dict()``, which would scatter sharded weights that have been made whole."""
    tensors: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        buffers = {n: b for n, b in part.named_buffers(recurse=False) if n not in part._non_persistent_buffers_set}
        own = {**dict(part.named_parameters(recurse=False)), **buffers}
        tensors |= {f"{path}.{name}" if path else name: tensor.detach() for name, tensor in own.items()}
    return tensors


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """``tensors_of`` a model; packed layers as the numbers they stand for, on the CPU, in the model's dtype.

    Raises:
        ModelError: they are packed by something else than bitsandbytes.
    """
    packed = {name: module for name, module in model.named_modules() if is_packed(module)}
    if getattr(model, "is_quantized", False) and not packed:
        raise ModelError(
            "a quantised model can be written as a plain folder where bitsandbytes has packed it, and this one was "
            "packed by something else; save the adapter, and load it on the model in bfloat16"
        )
    weights = {f"{name}.weight": plain_weight(module, None, model.dtype) for name, module in packed.items()}
    return {**tensors_of(model), **weights}


@torch.no_grad()
def merged_weights(model: PeftModel) -> dict[str, Tensor]:
    """State dict of the base model with the active adapter merged in.

    Weights that no adapter touches are the live tensors themselves; merged ones are new, on the CPU, computed in
    float32 and rounded once to the layer's dtype.

    Raises:
        ModelError: an adapter that is more than a sum lies on packed weights.
    """
    base = base_model(model)
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    weights = {
        key: value
        for key, value in plain_tensors(base).items()
        if not any(key.startswith(f"{name}.") for name in adapted)
    }
    for name, layer in adapted.items():
        if is_packed(layer.get_base_layer()):
            weights |= {f"{name}.{key}": value for key, value in _merged_packed(layer, model, base.dtype).items()}
            continue
        dtypes = {key: value.dtype for key, value in tensors_of(layer.get_base_layer()).items()}
        merged = copy.deepcopy(layer).cpu().float()  # type: ignore[attr-defined]
        merged.merge(safe_merge=True, adapter_names=[model.active_adapter])
        for key, value in tensors_of(merged.get_base_layer()).items():
            weights[f"{name}.{key}"] = value.to(dtypes[key])
    return weights


def _merged_packed(layer: Any, model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weight and bias of a packed layer with the active adapter's product added."""
    adapter = model.active_adapter
    if layer.lora_variant.get(adapter) is not None or layer.lora_bias.get(adapter):
        raise ModelError(
            "the adapter on quantised weights is more than a product that is added (DoRA, or biases), so it cannot be "
            "merged into them; save the adapter, and load it on the model in bfloat16"
        )
    inner = layer.get_base_layer()
    return {**tensors_of(inner), "weight": plain_weight(inner, layer.get_delta_weight(adapter), dtype)}


@torch.no_grad()
def verify_plain(model: PreTrainedModel | PeftModel, folder: str | Path, ids: Tensor) -> float:
    """Largest absolute difference of logits between ``model`` and what ``folder`` loads as, on the same device.

    Args:
        ids: [B, L] token ids without padding; an encoder-decoder reads them in both halves.
    """
    live = base_model(model)
    loaded: Any = AutoLanguageModel.from_pretrained(
        str(folder),
        config=AutoConfig.from_pretrained(str(folder), trust_remote_code=False),
        dtype=live.dtype,
        attn_implementation=live.config._attn_implementation,
        trust_remote_code=False,
    )
    ids = ids.to(live.device)
    loaded.to(live.device).eval()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if is_encoder_decoder(live):
        given["decoder_input_ids"] = ids
    was_training = model.training
    model.eval()
    expected = model(**given).logits
    model.train(was_training)
    found = loaded(**given).logits
    return float((expected.float() - found.float()).abs().max())


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new sibling folder to write into, renamed to ``folder`` at the end; after an error nothing has changed.

    Raises:
        StorageError: it cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file; give the name of a folder to write the model to")
    token = secrets.token_hex(4)
    temporary, old = (folder.with_name(f".{folder.name}.{token}.{kind}") for kind in ("new", "old"))
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            if folder.exists():
                folder.rename(old)
            try:
                temporary.rename(folder)
            except BaseException:
                if old.exists():
                    old.rename(folder)
                raise
            flush(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Fields of a generation config beside ``*_token_id`` that name tokens."""


def _valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    """``config`` if transformers agrees to write it, else the nearest it agrees to.

    Published models come with combinations that it refuses to save, most often a temperature without ``do_sample``.
    """
    sampled = copy.deepcopy(config)
    sampled.do_sample = True
    tokens = {
        name: value
        for name, value in config.to_dict().items()
        if value is not None and (name.endswith("_token_id") or name in TOKEN_LISTS)
    }
    for candidate in (config, sampled):
        try:
            candidate.validate(strict=True)
        except ValueError:
            continue
        return candidate
    logger.warning("the model's generation config is invalid; only its special tokens are saved")
    return GenerationConfig(**tokens)
