"""Whatever scores a model for a while leaves each of its modules in the mode that it had."""

from __future__ import annotations

import pytest
from tiny_model import make_model
from torch import nn

from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.packed_attention import packing_problem


def half_frozen() -> tuple[nn.Module, dict[str, bool]]:
    """A model in training mode with a part that is not, and the mode of each module."""
    model = make_model().train()
    model.model.layers[0].eval()
    return model, modes_of(model)


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_modes_come_back() -> None:
    model, modes = half_frozen()
    with evaluating(model):
        assert not any(modes_of(model).values())
    assert modes_of(model) == modes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes_of(model) == modes


def test_the_check_of_packing_keeps_modes() -> None:
    model, modes = half_frozen()
    packing_problem(model)
    assert modes_of(model) == modes
