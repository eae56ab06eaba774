"""What a conditioned model's folder holds beside the plain Hugging Face files: its mechanism, scales and slots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from tropism.errors import ConfigError, ModelError
from tropism.foreign.json_files import read_object
from tropism.foreign.paths import file_inside
from tropism.foreign.weights import check_weights
from tropism.models.conditioning import RewardSlots
from tropism.targets.conditioner import Conditioner
from tropism.targets.config import Conditioning

FACTS = "conditioning.json"
SLOTS = "conditioning.safetensors"
MARK = "reward_conditioning"
"""Key of config.json that names the mechanism; transformers carries it along and does nothing with it."""


@dataclass(frozen=True, kw_only=True)
class SavedConditioning:
    """What a folder says of the rewards that its model can be asked for."""

    facts: Mapping[str, Any]
    """As ``Conditioner.to_dict`` wrote them."""
    tensors: Mapping[str, Tensor]
    """State of the slots; empty for the mechanism ``text``."""
    where: str

    @property
    def mechanism(self) -> str:
        return str(self.facts["mechanism"])

    def config(self) -> Conditioning:
        """How the model is told.

        Raises:
            ModelError: the file is damaged.
        """
        names = {f.name for f in fields(Conditioning)}
        given = {name: self.facts[name] for name in names & self.facts.keys()}
        try:
            return Conditioning(**{**given, "targets": tuple(given["targets"])})
        except (ConfigError, KeyError, TypeError) as error:
            raise ModelError(f"{self.where}/{FACTS} is damaged: {error}") from error

    def restore(self, conditioner: Conditioner, slots: RewardSlots | None) -> None:
        """Put what was saved into those of the model.

        Raises:
            ModelError: it does not fit them.
        """
        try:
            conditioner.load_dict(self.facts)
            if slots is not None:
                slots.load_state_dict(dict(self.tensors))
                bad = next((name for name, value in self.tensors.items() if not bool(value.isfinite().all())), None)
                if bad is not None:
                    raise ConfigError(f"{bad} in {SLOTS} is not finite; train again from an earlier checkpoint")
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise ModelError(f"what {self.where} holds of its rewards does not fit its model: {error}") from error

    def check(self, asked: Conditioning) -> None:
        """Whether training can go on with ``asked``.

        Raises:
            ConfigError: the model was told in another way; names the field.
        """
        own = self.config()
        for name in own.used:
            before, now = getattr(own, name), getattr(asked, name)
            if before != now:
                raise ConfigError(
                    f"{self.where} was trained with {name} {before!r}, and algorithm.{name} is {now!r}; leave it "
                    "as it was, or start from the model before"
                )


def write_conditioning(folder: Path, facts: Mapping[str, Any], slots: RewardSlots | None) -> None:
    """Write both files into a folder that is being made."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if slots is not None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in slots.state_dict().items()}
        save_file(tensors, folder / SLOTS)


def refuse_lost_slots(name: str, config: Any) -> None:
    """Whether a model that came as an object, without the files beside it, is complete.

    Raises:
        ModelError: it was loaded from a folder that holds slots, too.
    """
    if getattr(config, MARK, None) is not None:
        raise ModelError(
            f"{name} is told rewards ({getattr(config, MARK)}) by slots that are no part of the model object: give the "
            f"folder it was loaded from instead, or take it as a plain model by `del model.config.{MARK}`"
        )


def read_conditioning(source: str, config: Any, *, revision: str | None = None) -> SavedConditioning | None:
    """What a model folder or hub repository holds of it; None where its config.json does not name a mechanism.

    Raises:
        ModelError: the files are missing or damaged.
    """
    mechanism = getattr(config, MARK, None)
    if mechanism is None:
        return None
    folder = Path(source)
    if not folder.is_dir():
        found = cached_file(source, FACTS, revision=revision, _raise_exceptions_for_missing_entries=False)
        if mechanism != "text":
            cached_file(source, SLOTS, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise ModelError(f"{source} is told rewards ({mechanism}), but holds no {FACTS}; save it anew")
        folder = Path(found).parent
    facts = file_inside(folder, FACTS)
    slots = file_inside(folder, SLOTS)
    if facts is None or (slots is None and mechanism != "text"):
        raise ModelError(
            f"{folder} says that its model is told rewards ({mechanism}), but {FACTS if facts is None else SLOTS} is "
            "missing; copy the whole folder"
        )
    tensors = {}
    if slots is not None:
        check_weights({SLOTS: slots}, folder=folder, quantised=False)
        tensors = load_file(slots)
    content = read_object(facts)
    missing = [
        name
        for name in ("mechanism", "targets", "scalers", "edges", "seen", "default", "knows_open")
        if name not in content
    ]
    if missing or content["mechanism"] != mechanism:
        raise ModelError(
            f"{folder / FACTS} is damaged: {missing[0] if missing else 'mechanism'} is not what it must be"
        )
    return SavedConditioning(facts=content, tensors=tensors, where=str(folder))
