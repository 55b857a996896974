"""The definition of every density-ratio loss, in log-ratio space.

A Bregman divergence with generator ``h`` fits the density ratio ``r = pi_theta / pi_ref`` to data. With the log ratio
``u = log r``, ``A(u) = h'(e^u)`` and ``P(u) = e^u h'(e^u) - h(e^u)``, the loss of one pair (DIL, arXiv 2503.05079,
eq. 19, with the reference expectation taken as ``alpha`` chosen + ``1 - alpha`` rejected) is

    L = -A(u_w) + alpha P(u_w) + (1 - alpha) P(u_l)

Every entry satisfies ``P'(u) = e^u A'(u)``. `csrc/divergences.h` holds the same math for the compiled backend; a test
ties the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # exact everywhere; softplus turns linear above 20

DEFAULT_DPO_BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One loss over the log ratios of a preference pair.

    A separable loss is given by ``A`` and ``P`` (elementwise torch functions of ``u``, any floating dtype and shape); a
    loss that couples the two responses is given by ``pair(u_w, u_l, beta)`` instead.

    Attributes:
        name: the ``loss_type`` by which it is chosen.
        source: where the formula stands.
        A: ``u -> h'(e^u)``.
        P: ``u -> e^u h'(e^u) - h(e^u)``, up to a constant.
        pair: ``(u_w, u_l, beta) -> loss``, for a loss that is not separable.
    """

    name: str
    source: str
    A: Callable[[Tensor], Tensor] | None = None
    P: Callable[[Tensor], Tensor] | None = None
    pair: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.A is None) != (self.P is None) or (self.A is None) == (self.pair is None):
            raise ValueError(f"divergence {self.name!r} needs either both A and P (separable) or pair (coupled)")

    @property
    def separable(self) -> bool:
        """Whether each response's gradient depends on that response alone."""
        return self.pair is None

    @property
    def takes_beta(self) -> bool:
        """Whether the loss has a beta."""
        return self.pair is not None

    def loss(self, u_w: Tensor, u_l: Tensor, *, beta: float = DEFAULT_DPO_BETA, alpha: float = 0.0) -> Tensor:
        """Loss of each pair, from chosen log ratios ``u_w`` and rejected log ratios ``u_l`` (same shape)."""
        if self.pair is not None:
            return self.pair(u_w, u_l, beta)
        assert self.A is not None
        assert self.P is not None
        loss = -self.A(u_w)
        if alpha != 0.0:
            loss = loss + alpha * self.P(u_w)
        if alpha != 1.0:
            loss = loss + (1.0 - alpha) * self.P(u_l)
        return loss


_REGISTRY: dict[str, Divergence] = {}


def divergence_names() -> list[str]:
    """Every ``loss_type`` that exists, in the order of registration."""
    return list(_REGISTRY)


def get_divergence(loss_type: str) -> Divergence:
    """The divergence registered under ``loss_type``; a ``ValueError`` that lists what exists otherwise."""
    try:
        return _REGISTRY[loss_type]
    except (KeyError, TypeError):
        raise ValueError(f"unknown loss_type {loss_type!r}; available: {', '.join(_REGISTRY)}") from None


def resolve_options(loss_type: str, beta: float | None, alpha: float) -> tuple[Divergence, float]:
    """Check the options of a loss against what it uses.

    Returns:
        The divergence and the beta to use (`DEFAULT_DPO_BETA` where none is given; meaningless for a separable loss).

    Raises:
        ValueError: unknown loss, an option that the loss does not use, or a value out of range.
    """
    divergence = get_divergence(loss_type)
    if beta is not None:
        if not divergence.takes_beta:
            raise ValueError(f"beta={beta} was given, but loss_type={loss_type!r} has no beta; leave it None")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be a finite number > 0, got {beta}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if alpha != 0.0 and not divergence.separable:
        raise ValueError(f"alpha={alpha} was given, but loss_type={loss_type!r} is not separable; leave it 0")
    return divergence, DEFAULT_DPO_BETA if beta is None else float(beta)


def register_divergence(divergence: Divergence) -> Divergence:
    """Make a loss available by name wherever a ``loss_type`` is taken.

    A separable divergence is checked on a grid of log ratios in fp64: ``P'(u) = e^u A'(u)`` and ``A'(u) > 0`` (``h``
    strictly convex). One that is not in the compiled list is evaluated by autograd on per-sequence log ratios.

    Args:
        divergence: the loss; its name must be new.

    Returns:
        The same divergence.

    Raises:
        ValueError: the name is taken, or the check fails.
    """
    if divergence.name in _REGISTRY:
        raise ValueError(f"divergence {divergence.name!r} is already registered")
    if divergence.A is not None and divergence.P is not None:
        with torch.enable_grad():
            u = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64, requires_grad=True)
            (dA,) = torch.autograd.grad(divergence.A(u).sum(), u)
            (dP,) = torch.autograd.grad(divergence.P(u).sum(), u)
        if not torch.allclose(dP, u.detach().exp() * dA, rtol=1e-6, atol=1e-9):
            raise ValueError(f"divergence {divergence.name!r} breaks P'(u) = e^u A'(u): A and P do not share one h")
        if not bool((dA > 0).all()):
            raise ValueError(f"divergence {divergence.name!r}: A'(u) must be > 0 everywhere (h strictly convex)")
    _REGISTRY[divergence.name] = divergence
    return divergence


register_divergence(
    Divergence(
        name="lsif",  # h(r) = (r - 1)^2 / 2
        source="DIL (arXiv 2503.05079) eq. 24",
        A=lambda u: u.exp(),
        P=lambda u: 0.5 * (2.0 * u).exp(),
    )
)
register_divergence(
    Divergence(
        name="ukl",  # h(r) = r log r - r
        source="DIL (arXiv 2503.05079) table 1",
        A=lambda u: 1.0 * u,
        P=lambda u: u.exp(),
    )
)
register_divergence(
    Divergence(
        name="bce",  # h(r) = r log r - (1 + r) log(1 + r)
        source="DIL (arXiv 2503.05079) table 1",
        A=lambda u: logsigmoid(u),
        P=lambda u: -logsigmoid(-u),
    )
)
register_divergence(
    Divergence(
        name="dpo",
        source="DIL (arXiv 2503.05079) eq. 27; DPO (arXiv 2305.18290) eq. 7",
        pair=lambda u_w, u_l, beta: -logsigmoid(beta * (u_w - u_l)),
    )
)
