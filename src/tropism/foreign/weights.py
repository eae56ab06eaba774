"""Weight files: what can be known of them before anything in them is read."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tropism.errors import ModelError

_INTEGERS = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"}


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """The size of a set of weight files."""

    tensors: int
    """How many there are; 0 where a pickled file does not say."""
    elements: int
    """Numbers in all tensors together; of a pickled file an upper bound."""


def check_weights(files: Mapping[str, Path], *, folder: Path, quantised: bool) -> WeightFacts:
    """Refuse weight files that are cut off, overlap, claim more than they hold, or are no floats.

    Args:
        files: name in the folder, which ends in .safetensors or .bin -> where the file is.
        folder: for messages.
        quantised: whether weights may be whole numbers, which stand for floats in a way that the configuration says.

    Raises:
        ModelError: names the file and what is wrong.
    """
    tensors = elements = 0
    for name, path in files.items():
        if name.endswith(".safetensors"):
            facts = _check_safetensors(path, folder / name, quantised=quantised)
        else:
            facts = _check_pickled(path, folder / name)
        tensors += facts.tensors
        elements += facts.elements
    return WeightFacts(tensors=tensors, elements=elements)


def _check_safetensors(path: Path, shown: Path, *, quantised: bool) -> WeightFacts:
    """The library checks header, offsets and sizes when it opens a file; the header can be trusted from there on."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{shown} is damaged: {error}") from error
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        if name.endswith(".weight") and entry["dtype"] in _INTEGERS and not quantised:
            raise ModelError(
                f"{shown}: the weight {name} holds whole numbers ({entry['dtype']}), though config.json says nothing "
                "of a quantisation; it is no model, or its quantization_config is missing"
            )
    return WeightFacts(tensors=len(tensors), elements=sum(prod(entry["shape"]) for entry in tensors.values()))


def _check_pickled(path: Path, shown: Path) -> WeightFacts:
    """A pickled file is an archive without compression; one that unpacks to more than itself is a bomb.

    What it holds is unpickled later by ``torch.load(weights_only=True)``, which makes tensors and calls nothing.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{shown} is damaged: {error}") from error
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ModelError(f"{shown} is a compressed archive, which PyTorch never writes; it is damaged or hostile")
        if sum(entry.file_size for entry in entries) > size:
            raise ModelError(f"{shown} is damaged or hostile: it unpacks to more bytes than it takes")
    return WeightFacts(tensors=0, elements=size)
