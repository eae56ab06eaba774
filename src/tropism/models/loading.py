"""Loading language models: from a hub id, a folder, a LoRA adapter folder, a GGUF file or objects in memory.

What comes out is always the same: a plain transformers model (or a PEFT model, for an adapter) in eval mode without any
dropout, its tokenizer, and the special tokens as ids. Nothing in a model folder can run code or reach outside that
folder unless ``trust_remote_code`` was given explicitly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tropism.errors import ModelError
from tropism.foreign.gguf_header import read_gguf_header
from tropism.foreign.pretrained import check_size, load_pretrained, load_tokenizer, reported, set_name
from tropism.foreign.view import ADAPTER_CONFIG, CONFIG, adapter_view, file_view, model_view
from tropism.models.conditioning_files import SavedConditioning, read_conditioning, refuse_lost_slots
from tropism.models.demo_model import demo_model_path
from tropism.models.lora import load_adapter, saved_adapter
from tropism.models.modules import AutoLanguageModel, base_model, disable_dropout, with_weights, zero_dropout
from tropism.models.q_head_files import SavedQHeads, read_q_heads
from tropism.models.quantization import (
    Quantization,
    check_family,
    check_quantizable,
    check_quantization,
    prepare_quantized,
    quantized_options,
    skeleton_of,
)
from tropism.models.seq2seq import decoder_prefix, is_encoder_decoder
from tropism.models.special_tokens import SpecialTokens, special_tokens
from tropism.texts import tell_decoder_prefix

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The name that stands for the demo model."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which language model to load, and how."""

    name: str
    """A hub id, a local folder, a .gguf file, or the word "demo" (SmolLM2-135M-Instruct from a package)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. auto: bfloat16 on CUDA devices that compute in it, float32 elsewhere. Training all weights of a
    bfloat16 model loses small updates to rounding: choose float32 there; LoRA weights are float32 always."""
    device: str = "auto"
    """auto takes cuda, then mps, then cpu; or a name such as cpu or cuda:1."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; pin a commit to get the same weights every time."""
    trust_remote_code: bool = False
    """Run Python code that the model's authors ship with the weights. Only ever set this by hand, in Python or on the
    command line, for models whose code you have read."""
    attention: str | None = None
    """Attention implementation of transformers (eager, sdpa, flash_attention_2, ...); None lets it choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. Takes effect where the model
    is in train mode."""
    quantization: Quantization | None = None
    """8bit or 4bit (NF4, double quantisation): the base model's weights packed by bitsandbytes, for an adapter (lora)
    to be trained on. None: weights as they are."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ModelError('the model has no name; give a hub id, a folder, a .gguf file or "demo"')
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ModelError(f"dtype is {self.dtype!r}; choose auto, float32, bfloat16 or float16")
        check_quantization(self.quantization)

    def of_export(self, folder: str | Path) -> ModelConfig:
        """How to load what a run that began with this model has exported: plain weights, even of packed ones."""
        return replace(self, name=str(folder), revision=None, quantization=None)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A language model ready for training or sampling."""

    model: PreTrainedModel | PeftModel
    """In eval mode, without dropout; a PeftModel where it was loaded from an adapter folder."""
    tokenizer: PreTrainedTokenizerBase
    tokens: SpecialTokens
    source: str
    """What it was loaded from; enough to load it again unless it came as objects."""
    conditioning: SavedConditioning | None = None
    """Of a model that can be asked for a reward: how it is told."""
    q_heads: SavedQHeads | None = None
    """Of a model that values its tokens (ilql): where its heads are."""


ModelSource = str | Path | ModelConfig | LoadedModel | tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]
"""Everything that ``load_model`` takes."""


def load_model(source: ModelSource) -> LoadedModel:
    """The model, tokenizer and special tokens of any kind of source.

    Args:
        source: a hub id, folder, .gguf file or "demo", as a string or in a ``ModelConfig``; a pair (model, tokenizer),
            whose dropout is switched off in place and which otherwise stays as it is; or a ``LoadedModel``, returned
            unchanged.

    Raises:
        ModelError: nothing usable is there, the model writes no text, or tokenizer and model do not fit.
    """
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, str | Path):
        source = ModelConfig(name=str(source))
    if isinstance(source, ModelConfig):
        model, tokenizer = _load(source)
        name = source.name
        conditioning = read_conditioning(name, base_model(model).config, revision=source.revision)
        q_heads = read_q_heads(name, base_model(model).config, revision=source.revision)
    else:
        model, tokenizer = _checked_pair(source)
        name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        conditioning = q_heads = None
        refuse_lost_slots(name, base_model(model).config)
    disable_dropout(model)
    model.eval()
    tokens = special_tokens(model, tokenizer)
    base = base_model(model)
    tell_decoder_prefix(tokenizer, decoder_prefix(base) if is_encoder_decoder(base) else None)
    return LoadedModel(
        model=model, tokenizer=tokenizer, tokens=tokens, source=name, conditioning=conditioning, q_heads=q_heads
    )


def _checked_pair(source: Any) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    match source:
        case (PreTrainedModel() | PeftModel() as model, PreTrainedTokenizerBase() as tokenizer):
            if base_model(model).get_output_embeddings() is None:
                raise ModelError(
                    f"{type(base_model(model)).__name__} has no output embedding, so it writes no text; give a model "
                    "of AutoModelForCausalLM or AutoModelForSeq2SeqLM"
                )
            return model, tokenizer
    raise ModelError(
        "a model is a hub id, a folder, a .gguf file, ModelConfig, LoadedModel or (model, tokenizer), "
        f"not {source!r:.200}"
    )


def _load(config: ModelConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    device = device_named(config.device)
    dtype = dtype_named(config.dtype, device)
    path = Path(config.name).expanduser()
    model: PreTrainedModel | PeftModel
    if config.quantization is not None:
        check_quantizable(config.name, path, device)
    if config.name == DEMO:
        model, tokenizer = _load_gguf(demo_model_path(), config, dtype)
        set_name(model, DEMO)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}{_closest(path)}")
        model, tokenizer = _load_gguf(path, config, dtype)
    elif path.is_dir() and (path / ADAPTER_CONFIG).exists():
        return _load_adapter(path, config)
    else:
        model, tokenizer = _load_pretrained(folder_or_hub_id(config.name, path), config, dtype)
    model.config.use_cache = True
    if config.quantization is None:
        model.to(device)  # type: ignore[arg-type]
    else:  # it was packed where it is
        prepare_quantized(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def folder_or_hub_id(name: str, path: Path) -> str:
    if path.is_dir():
        if (path / CONFIG).exists():
            return str(path.resolve())
        inside = path / "model"
        found = sorted(path.glob("*.gguf"))
        hint = f"; give the file: {found[0]}" if found else ""
        hint = f"; its model is in {inside}" if (inside / "config.json").is_file() else hint
        raise ModelError(
            f"the folder {path} holds no config.json or adapter_config.json, so it is no model folder{hint}"
        )
    if path.exists():
        raise ModelError(f"{path} is a file, but no .gguf file; give the model's folder")
    is_hub_id = name.count("/") <= 1 and "\\" not in name and not name.startswith((".", "/", "~"))
    if not is_hub_id or (path.parent.is_dir() and path.parent != Path(".")):
        raise ModelError(f"there is no folder {path}{_closest(path)}")
    return name


def _load_pretrained(
    source: str, config: ModelConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    def prepare(details: PreTrainedConfig) -> None:
        _check_kind(details, source)
        zero_dropout(details)
        if config.quantization is not None:
            check_family(details, skeleton_of(details, AutoLanguageModel), source)

    load = _load_trusted if config.trust_remote_code else load_pretrained
    try:
        model, tokenizer, missing = load(
            source,
            AutoLanguageModel,
            revision=config.revision,
            prepare=prepare,
            dtype=dtype,
            **attention_options(config),
            **quantized_options(config.quantization, dtype, device_named(config.device)),
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(load_failure(source, error)) from error
    if missing:
        raise ModelError(
            f"{source} does not hold all weights of a {type(model).__name__}: {', '.join(missing[:5])} would be "
            "random; give a folder that was saved from a language model"
        )
    return model, tokenizer


def _load_trusted(
    source: str, kind: Any, *, revision: str | None, prepare: Callable[[PreTrainedConfig], None], **options: Any
) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """As ``load_pretrained`` does, but with whatever code the folder asks for; its files must be sound all the same."""
    where = {"revision": revision, "trust_remote_code": True}
    with model_view(source, revision=revision, settings=False) as view, reported(f"the model {source}", **view.names):
        details = AutoConfig.from_pretrained(source, **where)
        prepare(details)
        tokenizer = AutoTokenizer.from_pretrained(source, config=details, **where)
        model, info = kind.from_pretrained(source, config=details, output_loading_info=True, **where, **options)
    return model, tokenizer, sorted(info["missing_keys"])


def _check_kind(details: PreTrainedConfig, source: str) -> None:
    own = "AutoModelForSeq2SeqLM" in (getattr(details, "auto_map", None) or {})
    if details.is_encoder_decoder and not own and type(details) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{source} is an encoder-decoder ({details.model_type}) that does not go from text to text; give a model "
            "of AutoModelForSeq2SeqLM (T5, BART and their kin) or a causal LM"
        )
    for kind in details.architectures or []:
        if kind.endswith(("ForMaskedLM", "Classification", "ForQuestionAnswering")):
            raise ModelError(f"{source} is a {kind}; a causal LM is needed, or an encoder-decoder")


def load_failure(source: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if Path(source).is_dir():
        return f"the model folder {source} cannot be loaded: {reason}"
    return (
        f"{source} is no local folder, and loading it from the hub failed: {reason}\n"
        "With network access, check the id (and unset HF_HUB_OFFLINE; `hf auth login` for a private model). "
        'Without, give a local model folder, a .gguf file, or "demo" for the model that comes in a package.'
    )


def _load_gguf(path: Path, config: ModelConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file as a plain model. transformers refuses to save what it read from GGUF, so the model is rebuilt."""
    try:
        import gguf
    except ImportError:
        raise ModelError('reading GGUF files needs the package gguf; pip install "tropism[gguf]"') from None
    path = path.resolve()
    header = read_gguf_header(path)
    # Recent releases keep the weights packed on devices that have a kernel for that, which cannot be trained.
    quantization = getattr(transformers, "GgufConfig", None)
    packed = {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    # What lies beside the file is none of its business: transformers would read configurations and adapters there.
    with (
        file_view(path) as link,
        reported(f"the GGUF file {path}", temporary=link.parent, real=path.parent),
        _parsed_once(gguf),
    ):
        folder = str(link.parent)
        options: dict[str, Any] = {"gguf_file": link.name, "trust_remote_code": False}
        details = AutoConfig.from_pretrained(folder, **options)
        if details.is_encoder_decoder:
            raise ModelError(f"{path} holds an encoder-decoder; give its Hugging Face folder or hub id instead")
        check_size(AutoModelForCausalLM, details, header.weights, str(path))
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=details, dtype=dtype, **options, **packed, **attention_options(config)
        )
        zero_dropout(model.config)
        plain = with_weights(model, model.state_dict())
    set_name(plain, str(path))
    tokenizer.name_or_path = str(path)
    return plain, tokenizer


@contextmanager
def _parsed_once(gguf: Any) -> Iterator[None]:
    """One reader for a file whose header transformers parses for tokenizer, configuration and weights: seconds each."""
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _load_adapter(folder: Path, config: ModelConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A LoRA adapter on its base model; the adapter is trainable, and training goes on from it.

    The base is whatever the adapter names: a hub id, or a folder or file, which is loaded with the checks of any model.
    """
    folder = folder.resolve()
    with adapter_view(folder) as view:
        adapter = saved_adapter(view)
        base, tokenizer = _load(replace(config, name=str(adapter.base_model_name_or_path)))
        if isinstance(base, PeftModel):
            raise ModelError(f"the base model of the adapter {folder} is an adapter itself; merge that one first")
        with reported(f"the adapter {folder} on {adapter.base_model_name_or_path}", **view.names):
            model = load_adapter(base, adapter, view)
    if (folder / "tokenizer_config.json").exists():
        with model_view(str(folder), revision=None, weights=False) as view:
            tokenizer = load_tokenizer(view, base.config, str(folder))
    return model, tokenizer


def attention_options(config: ModelConfig) -> dict[str, str]:
    return {} if config.attention is None else {"attn_implementation": config.attention}


def device_named(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device is {name!r}; choose auto, cpu, cuda, cuda:N or mps") from None
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ModelError(f"device is {name!r}, but PyTorch finds no such device here; choose auto or cpu")
    return device


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    fast_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast_bfloat16 else torch.float32


def _closest(path: Path) -> str:
    """A hint that names the most similar neighbour of a path that does not exist."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    close = get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; the closest is {path.parent / close[0]}" if close else ""
