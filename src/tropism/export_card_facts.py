"""What a model card may say of where a model came from: names of files and models, never paths, and no secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.errors import TropismError
from tropism.foreign.gguf_header import read_gguf_header
from tropism.models.loading import DEMO
from tropism.redaction import redact
from tropism.safe_yaml import read_yaml

RECIPE = "recipe.yaml"
DEMO_BASE, DEMO_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILE = re.compile(r"\.(txt|jsonl?|csv|tsv|parquet|ya?ml|gguf|py|safetensors|arrow)(\.gz)?$", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w:/.<~-])~?/(?:[\w.@+-]+/)*[\w.@+-]+")
"""A path from the root or a home folder in the middle of a sentence; no address, no closing tag."""
_ANCESTORS = 20
"""Runs that are followed back, each of which began with the model of the one before."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run, or a model, started from."""

    shown: str
    """Its name, for people."""
    hub_id: str | None
    """Of the model on the hub at the beginning of everything; None where that is not known."""
    licence: str | None
    """Of that model, where its files say so."""


def origin_of(name: Any) -> Origin | None:
    """Of a model by the name that a recipe has for it; None of one that was given from Python."""
    shown, hub_id, licence = "", None, None
    for _ in range(_ANCESTORS):
        name = name.get("name") if isinstance(name, Mapping) else name
        if not isinstance(name, str) or name.startswith("<"):
            break
        shown = shown or _shown_model(name)
        if name == DEMO:
            hub_id, licence = DEMO_BASE, licence or DEMO_LICENCE
            break
        path = Path(name).expanduser()
        licence = licence or _licence(name, path)
        if path.name == "model" and (path.parent / RECIPE).is_file():
            name = read_yaml(path.parent / RECIPE).get("model")
            continue
        hub_id = _base_of_folder(path) if path.exists() else hub_name(name)
        break
    return Origin(shown=shown, hub_id=hub_id, licence=licence) if shown else None


def hub_name(name: str) -> str | None:
    """A name that can only be one of the hub; None of what is, was or looks like a file or folder of this machine."""
    path = Path(name).expanduser()
    inside = path.parent != Path(".") and path.parent.is_dir()
    if not _HUB_ID.fullmatch(name) or _FILE.search(name) or path.exists() or inside:
        return None
    return name


def public_name(name: str) -> str:
    """The last part of a path, and of ``file.py:function``; other texts as they are."""
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).name}:{function}"
    looks_local = name.startswith(("/", "~", "./", "../", "\\")) or name.count("/") > 1 or bool(_FILE.search(name))
    if "\n" in name or "://" in name or not ("/" in name or "\\" in name):
        return name
    if looks_local or _exists(name):
        return Path(name.replace("\\", "/")).name or name
    return name


def public_values(value: Any) -> Any:
    """Plain data with ``public_name`` of every text in it."""
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, Mapping):
        return {key: public_values(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [public_values(entry) for entry in value]
    return value


def public_text(text: str) -> str:
    """A text in which paths from the root or a home folder are their last parts, and secrets are none."""
    for folder in (Path.cwd(), Path.home()):  # whose names may hold blanks, at which a path seems to end
        if folder != folder.parent:
            text = text.replace(f"{folder}/", "")
    return _PATH.sub(lambda match: match[0].rpartition("/")[2], redact(text))


def data_names(recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a recipe's data is called, in words, and which of it is on the hub."""
    words, on_hub = [], []
    for field, role in (("data", "trained on"), ("eval_data", "evaluated on")):
        value = recipe.get(field)
        details = dict(value) if isinstance(value, Mapping) else {"path": value}
        path = details.get("path")
        if not isinstance(path, str):
            continue
        hub_id = hub_name(path)
        name = path.strip("<>") if path.startswith("<") else f"`{public_name(path)}`"
        parts = [str(details[key]) for key in ("subset", "split", "revision") if details.get(key) and hub_id]
        fraction = details.get("eval_fraction")
        held = f", {float(fraction):.0%} of it held out" if isinstance(fraction, int | float) and fraction else ""
        words.append(f"{role}: {name}{f' ({chr(44).join(parts)})' if parts else ''}{held}")
        if hub_id is not None and hub_id not in on_hub:
            on_hub.append(hub_id)
    return words, on_hub


def _shown_model(name: str) -> str:
    path = Path(name).expanduser()
    if name == DEMO:
        return DEMO_BASE
    if path.name == "model" and (path.parent / RECIPE).is_file():
        return f"the run {path.parent.resolve().name}"
    return public_name(name) if not path.exists() else path.resolve().name


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _base_of_folder(folder: Path) -> str | None:
    """What the card of an earlier export names; cards of others name what *they* were made from, which is not it."""
    if not (folder / "tropism_export.json").is_file():
        return None
    base = _front_matter(folder / "README.md").get("base_model")
    return base if isinstance(base, str) else None


def _licence(name: str, path: Path) -> str | None:
    """Of a model, from its card or its GGUF header on this machine."""
    if path.suffix == ".gguf" and path.is_file():
        try:
            found = read_gguf_header(path).settings.get("general.license")
        except TropismError:
            return None
    elif path.is_dir():
        found = _front_matter(path / "README.md").get("license")
    else:
        found = _front_matter(_cached_card(name)).get("license")
    return found if isinstance(found, str) and re.fullmatch(r"[\w .+-]{1,60}", found) else None


def _cached_card(name: str) -> Path | None:
    """The card of a hub model, where its files were downloaded with it; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "README.md")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _front_matter(card: Path | None) -> Mapping[str, Any]:
    """What a model card says at its top; empty where there is none, or none that can be read."""
    if card is None or not card.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(card) or {}
    except Exception:  # whatever the parser of YAML makes of the files of others
        return {}
