"""What a recipe that others wrote may not decide: that code comes with the model and is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tropism.errors import ConfigError


def refuse_trust(mapping: Mapping[str, Any], where: str) -> None:
    """Refuse a recipe from a file that lets the model's authors run code; only who starts the run may do that.

    Args:
        mapping: the recipe as plain values.
        where: names the file.

    Raises:
        ConfigError: says how to allow it.
    """
    model = mapping.get("model")
    if isinstance(model, Mapping) and model.get("trust_remote_code"):
        raise ConfigError(
            f"{where}: model.trust_remote_code: a file cannot allow a model's code to run. If you have read that code "
            "and trust it, give --model.trust_remote_code true on the command line, or "
            "model=tropism.ModelConfig(..., trust_remote_code=True) in Python"
        )
