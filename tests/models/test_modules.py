from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tropism.models.modules import replaced_forward


def test_another_forward_for_a_block() -> None:
    layer = nn.Linear(2, 2)
    given = torch.ones(1, 2)
    plain = layer(given)
    with replaced_forward(layer, lambda x: x + 1):
        assert layer(given).tolist() == [[2.0, 2.0]]
        with replaced_forward(layer, lambda x: x * 5):
            assert layer(given).tolist() == [[5.0, 5.0]]
        assert layer(given).tolist() == [[2.0, 2.0]]
    assert torch.equal(layer(given), plain)


def test_a_forward_of_its_own_comes_back_after_an_error() -> None:
    layer = nn.Linear(2, 2)

    def own(x: Tensor) -> Tensor:
        return x - 1

    layer.forward = own  # type: ignore[method-assign]
    with pytest.raises(RuntimeError), replaced_forward(layer, lambda x: x):
        raise RuntimeError
    assert vars(layer)["forward"] is own


def test_a_copy_computes_with_its_own_weights_afterwards() -> None:
    layer = nn.Linear(2, 2)
    with replaced_forward(layer, lambda x: x):
        pass
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.fill_(3.0)
    assert other(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]
