"""Measuring on a few tokens whether a model computes the same in two ways: gradients, and what rounding allows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Beside others, kernels sum in another order. The logits of 15 models of 2 to 30 layers, in fp32, then differed by 0.3
# to 1.2 times what they do when every embedding is rounded once more.
ROUNDINGS = 8.0
PRECISIONS = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # of matrix products in fp32, as torch.backends names them
LARGEST_COPY = 2**30  # parameters


def probe_ids(vocab_size: int, count: int) -> list[int]:
    """Token ids all over the vocabulary, but for the first, whose embedding is 0 where it is for padding."""
    return [(index + 1) * vocab_size // (count + 1) for index in range(count)]


@contextlib.contextmanager
def embeddings_as_leaves(model: Any, rounded: float = 0.0) -> Iterator[list[Tensor]]:
    """Collect the input embeddings of each call, for gradients with respect to them.

    Args:
        model: whose calls these are.
        rounded: how much each embedding is to change, up or down, as rounding would change it.
    """
    embedded: list[Tensor] = []

    def as_leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.detach()
        if rounded:
            signs = 1 - 2 * torch.randint(2, output.shape, generator=torch.Generator().manual_seed(0))
            dtype = torch.promote_types(output.dtype, torch.float32)
            changed = (changed * (1 + rounded * signs.to(output.device, dtype))).to(output.dtype)
        embedded.append(changed.requires_grad_())
        return changed.clone()  # which the model may change in place

    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        yield embedded
    finally:
        handle.remove()


def tolerances(model: Any, truth: dict[str, Tensor], again: Callable[[float], dict[str, Tensor]]) -> dict[str, float]:
    """How far results may be from the truth, in parts of its largest: what rounding makes of them, and some more.

    Args:
        model: that computes.
        truth: results by name.
        again: computes them with embeddings that are rounded so much.
    """
    rounding = coarsest_rounding(model)
    rounded = again(rounding)
    return {name: ROUNDINGS * max(rounding, difference(rounded[name], value)) for name, value in truth.items()}


def difference(actual: Tensor, truth: Tensor) -> float:
    """The largest difference, in parts of the largest of the truth."""
    expected = truth.detach().double()
    return float(((actual.detach().double() - expected).abs().max() / expected.abs().max()).item())


def is_rounding(change: float, model: nn.Module) -> bool:
    """Whether logits that should be equal differ (relatively) by no more than rounding allows; NaN is more."""
    return change <= ROUNDINGS * coarsest_rounding(model)


def coarsest_rounding(model: nn.Module) -> float:
    """Of the dtypes that the model computes in; norms and rotary embeddings are in fp32 where the rest is in fp64."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    dtypes.add(torch.float32)
    device_type = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device_type):
        dtypes.add(torch.get_autocast_dtype(device_type))
    return max(PRECISIONS.get(matmul_precision(device_type), 0.0), *(torch.finfo(dtype).eps for dtype in dtypes))


def matmul_precision(device_type: str) -> str:
    """How matrix products in fp32 are computed on a device: ieee, tf32 or bf16."""
    backend: Any = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    precision = str(backend.matmul.fp32_precision)
    return "ieee" if precision == "none" else precision


def in_fp32(model: Any) -> Any:
    """A copy whose weights are in fp32, of a model with coarser ones and at most 2^30 parameters; else the model."""
    parameters = list(model.parameters())
    coarse = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
    plain = all(type(parameter.data) is Tensor and parameter.is_floating_point() for parameter in parameters)
    if not coarse or not plain or sum(parameter.numel() for parameter in parameters) > LARGEST_COPY:
        return model
    try:
        return copy.deepcopy(model).float()
    except torch.OutOfMemoryError:
        return model


def weights_are_whole(model: nn.Module) -> bool:
    """Whether they are here, and not split over processes."""
    return not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())
