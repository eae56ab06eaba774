"""Every field of the recipe with its type, default and docstring."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from tropism.schema import field_docs


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One field as the help shows it."""

    name: str
    """Dotted."""
    type: str
    default: str
    """Text of the default; empty where the field is required."""
    value: str | None
    """Text of the value that a recipe gives it; None without a recipe."""
    doc: str


def entries(cls: type[Any], prefix: str, instance: Any = None) -> Iterator[Entry]:
    """The fields of a configuration class, those of configurations inside it in their place.

    Args:
        prefix: put before every name, with its dot.
        instance: whose values are shown beside the defaults.
    """
    docs, hints = field_docs(cls), get_type_hints(cls)
    for f in fields(cls):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(instance, f.name, None)
        inner = hints[f.name]
        if is_dataclass(inner) and isinstance(inner, type) and default is not MISSING:
            yield from entries(inner, f"{prefix}{f.name}.", value)
            continue
        yield Entry(
            name=prefix + f.name,
            type=type_text(hints[f.name]),
            default="" if default is MISSING else value_text(default),
            value=None if instance is None else value_text(value),
            doc=" ".join(docs.get(f.name, "").split()),
        )


def show_entries(out: Console, shown: Iterator[Entry] | Sequence[Entry]) -> None:
    """Two parts per field: a line with name, type and value, and its docstring indented below."""
    for entry in shown:
        line = Text.assemble((f"  --{entry.name}", "bold"), "  ", (entry.type, "cyan"), "  ")
        default = f"default {entry.default}" if entry.default else "required"
        if entry.value is None or entry.value == entry.default:
            line.append(f"[{default}]", "dim")
        else:
            line.append(entry.value, "green")
            line.append(f"  [{default}]", "dim")
        out.print(line)
        out.print(Padding(Text(entry.doc), (0, 0, 0, 6)))


def show_recipe_help(out: Console, recipe: Any) -> None:
    """All sections of the recipe; with a recipe its values, and of the methods only its own."""
    for title, cls, prefix, instance in _sections(recipe):
        out.print(Text(f"\n{title}", "bold underline"))
        for paragraph in [line for line in (cls.__doc__ or "").split("\n\n")[:1] if line]:
            out.print(Padding(Text(" ".join(paragraph.split()), "italic"), (0, 0, 0, 2)))
        shown = [entry for entry in entries(cls, prefix, instance) if prefix or "." not in entry.name]
        show_entries(out, shown)


def _sections(recipe: Any) -> Iterator[tuple[str, type[Any], str, Any]]:
    """Title, class, prefix and instance of each section."""
    from tropism.algorithms import ALGORITHMS
    from tropism.config import Recipe
    from tropism.data.config import DataConfig, Preparation
    from tropism.models.loading import ModelConfig
    from tropism.models.lora import LoRA
    from tropism.rewards import RewardConfig, RewardTerm
    from tropism.rollouts.config import Sampling
    from tropism.training.config import TrainerConfig

    def part(name: str, cls: type[Any]) -> Any:
        value = getattr(recipe, name, None)
        return value if isinstance(value, cls) else None

    yield "The recipe", Recipe, "", recipe
    for name, method in ALGORITHMS.items():
        if recipe is None or recipe.algorithm.name == name:
            yield f"algorithm: {name}", method, "algorithm.", part("algorithm", method)
    yield "model", ModelConfig, "model.", part("model", ModelConfig)
    data = part("data", DataConfig)
    yield "data (and eval_data)", DataConfig, "data.", data
    yield "data.prepare (and eval_data.prepare)", Preparation, "data.prepare.", getattr(data, "prepare", None)
    yield "reward", RewardConfig, "reward.", part("reward", RewardConfig)
    terms = getattr(part("reward", RewardConfig), "terms", {"NAME": None})
    for name, term in terms.items():
        yield f"reward term {name}", RewardTerm, f"reward.terms.{name}.", term
    yield "sampling", Sampling, "sampling.", part("sampling", Sampling)
    yield "lora", LoRA, "lora.", part("lora", LoRA)
    yield "trainer", TrainerConfig, "trainer.", part("trainer", TrainerConfig)


def type_text(hint: Any) -> str:
    """A type as a reader of recipes calls it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    names = {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null"}
    if hint in names:
        return names[hint]
    if origin in (tuple, list, Sequence):
        items = [type_text(argument) for argument in arguments if argument is not Ellipsis]
        return f"[{', '.join(items)}{', ...' if Ellipsis in arguments or origin is not tuple else ''}]"
    if origin in (dict, Mapping) or is_dataclass(hint):
        return "mapping"
    if hint is Any:
        return "text or mapping"
    return "function" if "Callable" in str(hint) else str(getattr(hint, "__name__", hint))


def value_text(value: Any) -> str:
    """A value as a recipe would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {value_text(entry)}" for key, entry in value.items()) + "}"
    if is_dataclass(value):
        return str(getattr(value, "name", "see below")) or "see below"
    return str(value) if str(value) else '""'
