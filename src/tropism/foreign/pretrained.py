"""Models of the Auto classes from folders that others wrote, by the one way that every part of the library takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from tropism.errors import ModelError
from tropism.foreign.view import CONFIG, ModelView, model_view
from tropism.foreign.weights import WeightFacts

_SLACK = 10_000_000
_MOST_BUFFERED = 2**28


def load_pretrained(
    source: str,
    kind: Any,
    *,
    revision: str | None = None,
    prepare: Callable[[PreTrainedConfig], None] | None = None,
    **options: Any,
) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """A model and its tokenizer, with transformers' own classes alone, whatever the folder asks for.

    Args:
        source: a folder or hub id.
        kind: the Auto class.
        revision: branch, tag or commit of a hub model.
        prepare: called with the configuration, to refuse or change it before the model is made.
        options: further arguments of ``kind.from_pretrained``.

    Returns:
        The model, the tokenizer, and the names of weights that the files do not hold.

    Raises:
        ModelError: names the folder or file that is damaged, hostile or no such model.
        OSError: a hub model that cannot be downloaded.
    """
    with model_view(source, revision=revision) as view:
        name = str(view.folder) if Path(source).is_dir() else source
        with reported(f"the model folder {view.folder}", **view.names):
            details = configuration(view, name)
            if prepare is not None:
                prepare(details)
            check_size(kind, details, view.weights, str(view.folder / CONFIG))
        tokenizer = load_tokenizer(view, details, name)
        with reported(f"{', '.join(view.weight_files[:3])} in the model folder {view.folder}", **view.names):
            with _without_load_report():
                model, info = kind.from_pretrained(
                    str(view.path),
                    config=details,
                    output_loading_info=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,  # looked at below, where the error can say which
                    **options,
                )
            check_shapes(info["mismatched_keys"], view)
    set_name(model, name)
    return model, tokenizer, sorted(info["missing_keys"])


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Transformers tells what the files lack as if it were a fault; here it is returned, and the caller judges it."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(view: ModelView, details: PreTrainedConfig, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a view, which remembers ``name`` as where it came from.

    Raises:
        ModelError: there is none, or its files are damaged.
    """
    with reported(f"the tokenizer (tokenizer.json and its like) in {view.folder}", **view.names):
        tokenizer = AutoTokenizer.from_pretrained(str(view.path), config=details, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(f"{view.folder} holds a {type(tokenizer).__name__} instead of a tokenizer")
    view.restore_paths(tokenizer, name)
    return tokenizer


def configuration(view: ModelView, name: str) -> PreTrainedConfig:
    """The configuration of a view, of transformers' own class for the model's type.

    Raises:
        ModelError: there is none, or transformers has no such class.
    """
    kind = view.config.get("model_type")
    if not view.config:
        raise ModelError(f"{view.folder} holds no {CONFIG}, or an empty one, so it is no model folder")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{name} is of the type {kind!r:.80}, which this transformers does not know; upgrade transformers, or pass "
            "trust_remote_code=True if the model ships its own code and you trust it"
        )
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(view.config))
    config.name_or_path = name  # some families' tokenizers are told apart by it
    return config


def check_size(kind: Any, details: PreTrainedConfig, weights: WeightFacts, shown: str) -> None:
    """Refuse a configuration of a model much larger than its weight files, before memory is taken for it.

    The model is made without memory (on the device "meta") and its numbers are counted.

    Raises:
        ModelError: names the configuration.
    """
    bare = copy.deepcopy(details)
    packed = 16 if getattr(bare, "quantization_config", None) is not None else 2
    if packed > 2:
        del bare.quantization_config
    with torch.device("meta"):
        skeleton = kind.from_config(bare)
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    buffered = sum(buffer.numel() for buffer in skeleton.buffers())
    if needed > packed * weights.elements + _SLACK:
        raise ModelError(
            f"{shown} describes a model of {needed:,} weights, but the weight files hold {weights.elements:,}; the "
            "folder is damaged or mixed from several models"
        )
    if buffered > _MOST_BUFFERED:
        raise ModelError(f"{shown} describes a model with tables of {buffered:,} entries, more than any model needs")


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]], view: ModelView) -> None:
    """Refuse weights of other shapes than the configuration asks for.

    Args:
        mismatched: name, shape in the file and shape in the model of each.

    Raises:
        ModelError: names one of them.
    """
    for name, held, wanted in sorted(mismatched, key=lambda entry: entry[0])[:1]:
        raise ModelError(
            f"{view.folder}: {', '.join(view.weight_files[:3])} holds {name} with the shape {list(held)}, but {CONFIG} "
            f"describes {list(wanted)}; the folder is damaged or mixed from several models"
        )


def set_name(model: Any, name: str) -> None:
    """Where a model came from, which an adapter that is saved later names as its base."""
    model.name_or_path = name
    model.config.name_or_path = name


@contextmanager
def reported(what: str, *, temporary: Path, real: Path) -> Iterator[None]:
    """A block that reads files of others: whatever it raises becomes a ModelError that names ``what``.

    Messages about the folder ``temporary`` that the block reads come to speak of ``real``, which it stands for.
    Libraries written in Rust report their own failures by an exception that is no ``Exception``; it counts too.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if type(error).__name__ == "UnpicklingError":
            reason = "it holds more than plain tensors, or is damaged. Get its weights as safetensors"
        reason = reason.replace(str(temporary), str(real))
        raise ModelError(f"{what} cannot be loaded: {reason:.500}") from error
