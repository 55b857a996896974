"""What a divergence must be to be registered, checked on a grid of log ratios in fp64."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dil_kernels.losses.divergence import FUNCTIONS, LARGEST_U_OF_H, Divergence, Elementwise


def check_divergence(divergence: Divergence) -> None:
    """The checks that `dil_kernels.register_divergence` describes.

    Raises:
        ValueError: one fails.
    """
    own = divergence.defaults()
    _check_arguments_stay(divergence, own)
    if divergence.h is not None:
        low, high = _range_of_generator(divergence, own)
        problem = (
            f"divergence {divergence.name!r}: what is derived from h cancels in fp64 outside log ratios of "
            f"[{low:g}, {high:g}]; give A and P instead"
        )
        if low > -8.0 or high < 8.0:
            raise ValueError(problem)
        if low > -40.0 or high < 40.0:
            warnings.warn(problem, stacklevel=3)
    if divergence.separable:
        _check_on_grid(divergence, own)
        _check_logarithms(divergence, own)
        for name in ("A", "P") if divergence.h is None else ():
            _check_no_jump(divergence, name, functools.partial(divergence.term, name, own=own))
    else:
        _check_pair(divergence, own)


def _check_arguments_stay(divergence: Divergence, own: tuple[float, ...]) -> None:
    """Every function of the loss is elementwise, and none writes to its arguments: they are those of the caller."""
    for name in FUNCTIONS:
        function = getattr(divergence, name)
        if function is None:
            continue
        arguments = [torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) for _ in range(1 + (name == "pair"))]
        before = [argument.clone() for argument in arguments]
        returned = function(*arguments, *own)
        if not isinstance(returned, Tensor) or (name != "pair" and returned.shape != before[0].shape):
            found = list(returned.shape) if isinstance(returned, Tensor) else f"a {type(returned).__name__}"
            raise ValueError(
                f"divergence {divergence.name!r}: {name} must return a tensor of the shape of its argument, "
                f"{list(before[0].shape)}, got {found}"
            )
        if returned.dtype != torch.float64:
            raise ValueError(f"divergence {divergence.name!r}: {name} returns {returned.dtype} of float64")
        if not all(map(torch.equal, arguments, before)):
            raise ValueError(f"divergence {divergence.name!r}: {name} changes its argument in place")


def _check_no_jump(divergence: Divergence, what: str, f: Callable[[Tensor], Tensor]) -> None:
    """The increments of f over small cells are the integrals of its derivative; kinks are allowed."""
    cells = 2**12
    u = torch.linspace(-8.0, 8.0, cells + 1, dtype=torch.float64)
    step = 16.0 / cells
    with torch.enable_grad():
        x = u.clone().requires_grad_()
        value = f(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
    value, ends = value.detach(), torch.stack([slope[:-1], slope[1:]])
    beyond = torch.maximum(ends.amin(0) - value.diff() / step, value.diff() / step - ends.amax(0))
    # By the mean value theorem the quotient lies between slopes of the cell; those inside it differ from its ends by
    # about as much as the next cells do.
    spread = (ends[0] - ends[1]).abs()
    spread = torch.nn.functional.max_pool1d(spread[None], 3, stride=1, padding=1)[0]
    rounding = 1e-12 * torch.maximum(value[:-1].abs(), value[1:].abs()).clamp(min=1.0) / step
    if bool((beyond > spread + rounding).any()):
        at = u[int((beyond - spread - rounding).argmax())]
        raise ValueError(f"divergence {divergence.name!r}: {what} jumps near a log ratio of {at:.3g}")


def _check_on_grid(divergence: Divergence, own: tuple[float, ...]) -> None:
    u = torch.linspace(-8.0, 8.0, 65, dtype=torch.float64)
    dA, dP = divergence.term("dA", u, own), divergence.term("dP", u, own)
    if divergence.bregman and not bool((dA > 0).all()):
        raise ValueError(f"divergence {divergence.name!r}: A'(u) must be > 0 everywhere (h strictly convex)")
    if divergence.bregman and not torch.allclose(dP, u.exp() * dA, rtol=1e-6, atol=1e-12):
        raise ValueError(f"divergence {divergence.name!r} breaks P'(u) = e^u A'(u): A and P do not share one h")
    for name, given in (("A", dA), ("P", dP)):
        with torch.enable_grad():
            x = u.clone().requires_grad_()
            (grad,) = torch.autograd.grad(divergence.term(name, x, own).sum(), x)
        if not torch.allclose(given, grad, rtol=1e-6, atol=1e-12):
            raise ValueError(f"divergence {divergence.name!r}: d{name} is not the derivative of {name}")


def _check_logarithms(divergence: Divergence, own: tuple[float, ...]) -> None:
    u = torch.linspace(-LARGEST_U_OF_H, LARGEST_U_OF_H, 601, dtype=torch.float64)
    for name in ("A", "P", "dP"):
        if getattr(divergence, f"log_{name}") is None:
            continue
        term = divergence.term(name, u, own)
        large = (term > 1e30) & term.isfinite()  # smaller ones may differ by a constant that no overflow sees
        given = divergence.term(f"log_{name}", u, own)[large]
        if not torch.allclose(given, term[large].log(), rtol=1e-9, atol=1e-6):
            raise ValueError(f"divergence {divergence.name!r}: log_{name} is not the logarithm of {name}")


def _check_pair(divergence: Divergence, own: tuple[float, ...]) -> None:
    assert divergence.pair is not None
    u_w, u_l = torch.tensor([[0.5, -1.0], [-0.25, 2.0]], dtype=torch.float64)
    with torch.enable_grad():
        has_gradient = divergence.pair(u_w.clone().requires_grad_(), u_l.clone().requires_grad_(), *own).requires_grad
    if not has_gradient:
        raise ValueError(f"divergence {divergence.name!r}: pair has no gradient (a detach, or numbers of Python)")
    both = divergence.pair(u_w, u_l, *own)
    each = [divergence.pair(u_w[i : i + 1], u_l[i : i + 1], *own) for i in range(2)]
    if both.shape != (2,) or not torch.allclose(both, torch.cat([loss.reshape(1) for loss in each])):
        raise ValueError(f"divergence {divergence.name!r}: pair must be elementwise, the loss of each pair on its own")
    for fixed in (-1.0, 0.0, 0.5):
        _check_no_jump(divergence, "pair", functools.partial(_slice_of_pair, divergence.pair, own, fixed, False))
        _check_no_jump(divergence, "pair", functools.partial(_slice_of_pair, divergence.pair, own, fixed, True))


def _slice_of_pair(pair: Elementwise, own: tuple[float, ...], fixed: float, of_rejected: bool, u: Tensor) -> Tensor:
    """The loss of a pair over one log ratio, the other one fixed."""
    other = torch.full_like(u, fixed)
    return pair(other, u, *own) if of_rejected else pair(u, other, *own)


def _range_of_generator(divergence: Divergence, own: tuple[float, ...]) -> tuple[float, float]:
    """The log ratios around 0, at most +-40, up to which A and P are the integrals of dA and dP, to 1e-4."""
    step = 0.125
    nodes = 0.5 + 0.5 * torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=torch.float64)  # Gauss-Legendre
    weights = torch.tensor([5.0, 8.0, 5.0], dtype=torch.float64) / 18.0
    reach = []
    for signed in (-step, step):
        u = signed * torch.arange(321, dtype=torch.float64)
        within = u[:-1, None] + signed * nodes
        good = torch.ones(320, dtype=torch.bool)
        for name in ("A", "P"):
            integral = signed * (divergence.term(f"d{name}", within, own) @ weights).cumsum(0)
            value = divergence.term(name, u, own)
            good &= (value[1:] - value[0] - integral).abs() <= 1e-4 * integral.abs().clamp(min=1.0)
        reach.append(float(u[int(good.long().cumprod(0).sum())]))
    return reach[0], reach[1]
