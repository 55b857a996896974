"""The one rule for what is exact enough: no worse than eager PyTorch in the same dtype, up to a small factor.

Errors are against the fp64 oracle, as the largest over a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0  # times the error of eager PyTorch on the same inputs in the same dtype
FLOOR = 2.0  # units in the last place of the largest true value, where eager happens to be luckier than it can promise


def assert_as_exact_as_eager(
    actual: Tensor, eager: Tensor, truth: Tensor, what: str, *, magnitude: float = 0.0, unresolved: float = 0.0
) -> None:
    """Also: non-finite values must be the same ones.

    Args:
        actual, eager, truth: what is tested, eager PyTorch in the same dtype, and the fp64 oracle.
        what: the name of the tensor.
        magnitude: the size of the rounded terms whose sum the result is; the last place of the larger one of these and
            of the result counts.
        unresolved: what the fp64 oracle itself cannot tell from 0.
    """
    actual, eager, truth = actual.detach().cpu(), eager.detach().cpu(), truth.detach().cpu()
    eps = torch.finfo(actual.dtype).eps
    actual64, eager64, truth64 = actual.double(), eager.double(), truth.double()
    torch.testing.assert_close(
        actual64.isnan(), truth64.isnan(), msg=f"{what}: NaN where the truth is not, or the reverse"
    )
    finite = truth64.isfinite()
    assert torch.equal(actual64[~finite & ~truth64.isnan()], truth64[~finite & ~truth64.isnan()]), (
        f"{what}: infinities differ"
    )
    if not finite.any():
        return
    error = (actual64 - truth64)[finite].abs().max().item()
    eager_error = (eager64 - truth64)[finite].nan_to_num(0.0).abs().max().item()
    scale = truth64[finite].abs().max().item()
    smallest = torch.finfo(actual.dtype).tiny
    allowed = FACTOR * eager_error + FLOOR * eps * max(scale, magnitude) + unresolved + smallest
    assert error <= allowed, f"{what}: error {error:.3e} > {allowed:.3e} (eager {eager_error:.3e}, scale {scale:.3e})"
