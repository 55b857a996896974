"""Reference log-probs that were kept are those of the model as it is now, whatever it was that changed it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from test_ref_cache import precomputed, sums_of
from tiny_model import make_model
from torch import nn


def scaled(module: nn.Module, args: Any, out: Any) -> Any:
    return out * module.factor


def hook_of_a_layer(model: Any, factor: float) -> None:
    model.model.layers[0].mlp.factor = factor
    model.model.layers[0].mlp.register_forward_hook(scaled)


def hook_without_gradients(model: Any, factor: float) -> None:
    model.model.norm.factor = factor
    model.model.norm.register_forward_hook(torch.no_grad()(scaled))


def forward_of_the_model(model: Any, factor: float) -> None:
    own = model.forward

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return own(inputs_embeds=self.get_input_embeddings()(input_ids) * factor, **kwargs)

    model.forward = MethodType(forward, model)


def attribute(model: Any, factor: float) -> None:
    model.model.norm.variance_epsilon *= 1e5 * factor


def attribute_of_a_tensor(model: Any, factor: float) -> None:
    model.model.layers[1].self_attn.scaling = torch.tensor(0.3) * factor


CHANGES = [hook_of_a_layer, hook_without_gradients, forward_of_the_model, attribute, attribute_of_a_tensor]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_in_no_key_is_seen(
    change: Callable[[Any, float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sums(factor: float, **options: Any) -> np.ndarray:
        model = make_model()
        change(model, factor)
        return np.array(sums_of(precomputed(tmp_path, model=model, **options)[0].train_dataset))

    first, second = sums(2.0), sums(3.0)
    said = capsys.readouterr().out
    assert said.count("rows computed; kept in") == said.count("computed again, since those that were kept are not") == 1
    np.testing.assert_array_equal(second, sums(3.0, ref_cache_dir="none"))
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_array_equal(second, sums(3.0))
    assert "rows read from" in capsys.readouterr().out


def test_rounding_is_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other batches and layouts, in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"per_device_train_batch_size": 3}, {"padding_free": True}, {"prefix_sharing": True}):
            precomputed(tmp_path, model=make_model().to(dtype), **options)
    said = capsys.readouterr().out
    assert "again" not in said
    assert said.count("rows read from") >= 2
