"""Correctness before speed: every provider against fp64, on the inputs that are timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.family import Errors, Family, Provider

# A provider may err this many times as much as eager PyTorch in the same dtype, or as one rounding of its output.
MULTIPLE = 4


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def worst(*errors: float) -> float:
    """The largest; NaN counts as infinite."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Largest error of an element, relative to that element; infinite for NaN or another shape."""
    if result.shape != truth.shape:
        return math.inf
    return worst(((result.double() - truth).abs() / truth.abs()).max().item())


def allowed_errors(family: Family, yardstick: Errors, provider: Provider, dtype: torch.dtype) -> Errors:
    """What a provider may err.

    Args:
        family: says what one rounding of each kind of result is.
        yardstick: errors of eager PyTorch in the dtype of the inputs.
        provider: says whether it stores results in that dtype.
        dtype: of the inputs.
    """
    roundings = family.roundings(dtype, dtype if provider.rounds_results else torch.float32)
    return {kind: MULTIPLE * max(error, roundings[kind]) for kind, error in yardstick.items()}


def find_problem(errors: Errors, allowed: Errors) -> str | None:
    """What exceeds the allowed errors, or None. NaN exceeds, and nothing is within a limit that is not finite."""
    for kind, limit in allowed.items():
        if not math.isfinite(limit):
            return f"unknown {kind}: eager PyTorch has no finite error to go by"
        if not errors[kind] <= limit:
            return f"wrong {kind}: relative error {errors[kind]:.1e}, allowed {limit:.1e}"
    return None
