"""Numbers that are not finite are refused where they appear, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tropism.errors import NumericsError


def require_finite(tensors: Mapping[str, Tensor | None], where: str) -> None:
    """Refuse NaN and infinite numbers.

    Args:
        tensors: name -> tensor with rows, in the order in which they come about; None is passed over.
        where: the end of the message.

    Raises:
        NumericsError: names the first tensor that holds one, its first such row and the number.
    """
    for name, tensor in tensors.items():
        if tensor is None or bool(tensor.isfinite().all()):
            continue
        place = tuple(torch.nonzero(~tensor.isfinite())[0].tolist())
        token = f", token {place[1]}" if len(place) > 1 else ""
        raise NumericsError(f"{name} of completion {place[0]}{token} is {float(tensor[place])} {where}")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a number that is not finite."""
    return next((name for name, tensor in tensors.items() if not _finite(tensor)), None)


def require_finite_weights(model: nn.Module) -> None:
    """See that loaded weights can be trained at all.

    Raises:
        NumericsError: names the first that holds a number that is not finite.
    """
    bad = first_not_finite({name: p.detach() for name, p in model.named_parameters()})
    if bad is not None:
        raise NumericsError(
            f"the weight {bad} of the loaded model holds numbers that are not finite; its file is broken, or it was "
            "trained until it diverged. Load another one"
        )


def _finite(tensor: Tensor) -> bool:
    # A sum is one pass without copies; only where it is not finite does it take a look at every number.
    if not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float64).isfinite()):
        return True
    return bool(tensor.isfinite().all())
