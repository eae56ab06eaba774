"""Which tokens of a prompt drive a completion, and which pieces of a text drive a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tropism.attribution.completions import attribute_completion
    from tropism.attribution.rewards import attribute_reward
    from tropism.evaluation.attribution_files import Attribution

__all__ = ["Attribution", "attribute_completion", "attribute_reward"]

_PLACES = {
    "Attribution": "tropism.evaluation.attribution_files",
    "attribute_completion": "tropism.attribution.completions",
    "attribute_reward": "tropism.attribution.rewards",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
