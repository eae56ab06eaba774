"""Small networks on top of a language model's hidden states."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Value of the state before each completion token: a linear map of the hidden state, in fp32.

    Starts at zero (weights and bias), as in lm-human-preferences: the first advantages are then the plain returns and
    no random critic disturbs the shared trunk.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # Without torch's own start values, for which it would draw from the global generator.
        self.linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, hidden_size, 1, dtype=torch.float32))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...]. Runs in fp32 whatever the precision of the trunk."""
        with torch.autocast(hidden.device.type, enabled=False):
            return cast(Tensor, self.linear(hidden.float()).squeeze(-1))
