"""The reference: the policy as it was before training, for log-probs only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from tropism.errors import ModelError
from tropism.models.policy import Policy


class Reference:
    """The policy as it was before training, for log-probs only; heads are no part of it.

    A fresh adapter switched off; the frozen second adapter named "reference" when training started from an adapter; a
    frozen copy otherwise. The copy is of what is trained alone: weights that are frozen by the time the reference is
    made, and buffers, are the policy's own tensors, so that with frozen layers it costs the memory of the others only.
    """

    ADAPTER = "reference"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        adapters = getattr(policy.model, "peft_config", None)
        self.kind: Literal["disabled", "adapter", "copy"]
        if adapters is None:
            self.kind = "copy"
            frozen = _copy_of_trained(policy.model).requires_grad_(False)
            self.frozen = Policy(frozen, chunk_size=policy.chunk_size).eval()
            if policy.trunk is not None:
                policy.trunk.share_with(self.frozen)
        else:
            self.kind = "adapter" if self.ADAPTER in adapters else "disabled"

    @contextmanager
    def active(self) -> Iterator[Policy]:
        """A policy that computes as the reference, inside the block.

        Raises:
            ModelError: weights that the reference shares with the policy are trained by now.
        """
        model: Any = self.policy.model
        if self.kind == "copy":
            if any(parameter.requires_grad for parameter in self.frozen.parameters()):
                raise ModelError(
                    "weights that were frozen when the reference was made, and that it shares with the policy, are "
                    "trained now; make the reference after choosing what is trained"
                )
            yield self.frozen
        elif self.kind == "disabled":
            with model.disable_adapter():
                yield self.policy
        else:
            trained = model.active_adapter
            model.set_adapter(self.ADAPTER, inference_mode=True)
            try:
                yield self.policy
            finally:
                model.set_adapter(trained)

    def projection(self) -> Callable[[Tensor], Tensor]:
        """The reference's own vocabulary projection, [..., H] -> [..., V], which needs no ``active`` block.

        Raises:
            ModelError: the output embedding has an adapter, so that policy and reference differ in it.
        """
        if self.kind == "copy":
            return self.frozen.logits
        head: nn.Module = self.policy.language_model.get_output_embeddings()
        if not {name for name, _ in head.named_parameters()} <= {"weight", "bias"}:
            raise ModelError(
                "the output embedding has an adapter, and the exact KL to the reference needs it without: leave it out "
                "of the LoRA targets, or set kl_coef to 0"
            )
        return self.policy.logits


def _copy_of_trained(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that has its own trained parameters and shares every other tensor with it."""
    shared: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    shared += model.buffers()
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
