"""A loss as a density-ratio divergence, in log-ratio space.

A Bregman divergence with generator ``h`` fits the density ratio ``r = pi_theta / pi_ref`` to data. With the log ratio
``u = log r``, ``A(u) = h'(e^u)`` and ``P(u) = e^u h'(e^u) - h(e^u)``, the loss of one pair (DIL, arXiv 2503.05079,
eq. 19, with the reference expectation taken as ``alpha`` chosen + ``1 - alpha`` rejected) is

    L = chosen_weight [-A(u_w) + alpha P(u_w)] + rejected_weight (1 - alpha) P(u_l)

where ``P'(u) = e^u A'(u)``. `dil_kernels.losses.scalar` combines the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dil_kernels.checks import check_number

Elementwise = Callable[..., Tensor]
PARAMETER_NAMES = ("beta", "power")  # the keywords that functions with a loss_type have
LARGEST_U_OF_H = 300.0  # a loss given by h alone sees ratios from e^-300 to e^300: their squares are finite in fp64


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The own parameter of a loss, a keyword of every function that takes a ``loss_type``.

    Attributes:
        name: "beta" or "power".
        default: taken where none is given.
        minimum: the least value.
        exclusive: whether `minimum` itself is left out.
    """

    name: str
    default: float
    minimum: float
    exclusive: bool = False

    def __post_init__(self) -> None:
        if self.name not in PARAMETER_NAMES:
            raise ValueError(f"a parameter must be named one of {', '.join(PARAMETER_NAMES)}, got {self.name!r}")

    def check(self, value: float) -> float:
        """The value as a float; a ``ValueError`` if it is out of range, a ``TypeError`` if it is no number."""
        check_number(self.name, value)
        if not (self.minimum <= value < math.inf) or (self.exclusive and value == self.minimum):
            bound = f"{'>' if self.exclusive else '>='} {self.minimum:g}"
            raise ValueError(f"{self.name} must be a finite number {bound}, got {value}")
        return float(value)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One loss over the log ratios of chosen and rejected responses.

    A separable loss is given by ``A`` and ``P``, or by ``h`` alone, which is then differentiated; a loss that couples
    the two responses by ``pair`` instead. All are elementwise torch functions of any floating dtype and shape. A loss
    with a parameter takes its value as the last argument of each.

    Attributes:
        name: the ``loss_type`` by which it is chosen.
        source: where the formula stands.
        A: ``u -> h'(e^u)``.
        P: ``u -> e^u h'(e^u) - h(e^u)``, up to a constant.
        dA: ``u -> A'(u)``; A is differentiated if not given. Goes with A and P only.
        dP: ``u -> P'(u)``; likewise.
        h: ``r -> h(r)``, strictly convex on r > 0. Log ratios beyond +-300 are taken as +-300.
        pair: ``(u_w, u_l) -> loss``, for a loss that is not separable; differentiated by autograd.
        log_A, log_P: logarithms of A and P where these overflow; without both, a loss whose terms overflow against each
            other is taken as +inf.
        log_dP: likewise of dP, for a weight that keeps an overflowing gradient finite.
        parameter: the loss's own parameter, if it has one.
    """

    name: str
    source: str
    A: Elementwise | None = None
    P: Elementwise | None = None
    dA: Elementwise | None = None
    dP: Elementwise | None = None
    h: Elementwise | None = None
    pair: Elementwise | None = None
    log_A: Elementwise | None = None
    log_P: Elementwise | None = None
    log_dP: Elementwise | None = None
    parameter: Parameter | None = None

    def __post_init__(self) -> None:
        if (self.A is None) != (self.P is None) or sum(f is not None for f in (self.A, self.h, self.pair)) != 1:
            raise ValueError(
                f"divergence {self.name!r} needs either both A and P, or h alone (separable), or pair (coupled)"
            )
        unused = ("dA", "dP") if self.h is not None else ("dA", "dP", "log_A", "log_P", "log_dP")
        for name in unused if self.A is None else ():
            if getattr(self, name) is not None:
                given = "h, which is differentiated" if self.h is not None else "pair"
                raise ValueError(f"divergence {self.name!r} is given by {given}: it does not use {name}; leave it out")
        terms: dict[str, Elementwise] = {}
        if self.h is not None:
            terms = _terms_of_generator(self.h)
        elif self.A is not None and self.P is not None:
            terms = {"dA": self.dA or _derivative(self.A), "dP": self.dP or _derivative(self.P)}
        for name, function in terms.items():
            object.__setattr__(self, name, function)

    @property
    def separable(self) -> bool:
        """Whether each response's gradient depends on that response alone."""
        return self.pair is None

    def term(self, name: str, u: Tensor, parameter: float) -> Tensor:
        """One of the elementwise functions at `u`, with the parameter if the loss has one."""
        function: Elementwise = getattr(self, name)
        return function(u) if self.parameter is None else function(u, parameter)


def _derivative(f: Elementwise) -> Elementwise:
    def df(x: Tensor, *parameter: float) -> Tensor:
        derivative: Tensor = torch.func.grad(lambda v: f(v, *parameter).sum())(x)
        return derivative

    return df


def _terms_of_generator(h: Elementwise) -> dict[str, Elementwise]:
    """A, P and their derivatives from ``h(r)``: ``A' = h''(r) r`` and ``P' = h''(r) r^2``."""
    d1 = _derivative(h)
    d2 = _derivative(d1)

    def ratio(u: Tensor) -> Tensor:
        return u.clamp(-LARGEST_U_OF_H, LARGEST_U_OF_H).exp()

    return {
        "A": lambda u, *p: d1(ratio(u), *p),
        "P": lambda u, *p: ratio(u) * d1(ratio(u), *p) - h(ratio(u), *p),
        "dA": lambda u, *p: d2(ratio(u), *p) * ratio(u),
        "dP": lambda u, *p: d2(ratio(u), *p) * ratio(u).square(),
    }
