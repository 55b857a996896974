"""A loss as a density-ratio divergence, in log-ratio space.

A Bregman divergence with generator ``h`` fits the density ratio ``r = pi_theta / pi_ref`` to data. With the log ratio
``u = log r``, ``A(u) = h'(e^u)`` and ``P(u) = e^u h'(e^u) - h(e^u)``, the loss of one pair (DIL, arXiv 2503.05079,
eq. 19, with the reference expectation taken as ``alpha`` chosen + ``1 - alpha`` rejected) is

    L = chosen_weight [-A(u_w) + alpha P(u_w)] + rejected_weight (1 - alpha) P(u_l)

where ``P'(u) = e^u A'(u)``. Losses of the same form whose A and P are of no such ``h``, and losses that couple the two
responses of a pair, are described by the same type. `dil_kernels.losses.scalar` combines the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dil_kernels.checks import check_number

Elementwise = Callable[..., Tensor]
PARAMETER_NAMES = ("beta", "power", "label_smoothing")  # the keywords that functions with a loss_type have
PAIR_BETA = 0.1  # where a loss of both responses of a pair is given none, as in the literature
FUNCTIONS = ("h", "pair", "A", "P", "dA", "dP", "log_A", "log_P", "log_dP")  # of a Divergence
LARGEST_U_OF_H = 300.0  # a loss given by h alone sees ratios from e^-300 to e^300: their squares are finite in fp64


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of a loss's own, a keyword of every function that takes a ``loss_type``.

    Attributes:
        name: "beta", "power" or "label_smoothing".
        default: taken where none is given.
        minimum: the least value.
        exclusive: whether `minimum` itself is left out.
        below: what every value is below.
    """

    name: str
    default: float
    minimum: float
    exclusive: bool = False
    below: float = math.inf

    def __post_init__(self) -> None:
        if self.name not in PARAMETER_NAMES:
            raise ValueError(f"a parameter must be named one of {', '.join(PARAMETER_NAMES)}, got {self.name!r}")
        self.check(self.default)

    def check(self, value: float) -> float:
        """The value as a float; a ``ValueError`` if it is out of range, a ``TypeError`` if it is no number."""
        check_number(self.name, value)
        if not (self.minimum <= value < self.below) or (self.exclusive and value == self.minimum):
            bound = f"{'>' if self.exclusive else '>='} {self.minimum:g}"
            if self.below < math.inf:
                bound += f" and < {self.below:g}"
            raise ValueError(f"{self.name} must be a finite number {bound}, got {value}")
        return float(value)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One loss over the log ratios of chosen and rejected responses.

    A separable loss is given by ``A`` and ``P``, or by ``h`` alone, which is then differentiated; a loss that couples
    the two responses by ``pair`` instead. All are elementwise torch functions of any floating dtype and shape, and take
    the values of the loss's own parameters as their last arguments.

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
        parameters: of the loss's own, in the order of those arguments.
        bregman: whether A and P are of one ``h``. Without, a separable loss has neither `alpha` nor another link, as
            nothing is known of its terms but that they are smooth.
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
    parameters: tuple[Parameter, ...] = ()
    bregman: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"the name of a divergence must be text, got {self.name!r}")
        for name in FUNCTIONS:
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise TypeError(f"divergence {self.name!r}: {name} must be a function, got {getattr(self, name)!r}")
        if (self.A is None) != (self.P is None) or sum(f is not None for f in (self.A, self.h, self.pair)) != 1:
            raise ValueError(
                f"divergence {self.name!r} needs either both A and P, or h alone (separable), or pair (coupled)"
            )
        if len({parameter.name for parameter in self.parameters}) < len(self.parameters):
            raise ValueError(f"divergence {self.name!r} has two parameters of one name")
        if not self.bregman and self.A is None:
            raise ValueError(f"divergence {self.name!r} has bregman=False, which is of A and P only; leave it out")
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

    def own(self, name: str) -> Parameter | None:
        """The loss's own parameter of that name, if it has one."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def defaults(self) -> tuple[float, ...]:
        """Of the loss's own parameters."""
        return tuple(parameter.default for parameter in self.parameters)

    def term(self, name: str, u: Tensor, own: Sequence[float]) -> Tensor:
        """One of the elementwise functions at `u`, given the values of the loss's own parameters."""
        function: Elementwise = getattr(self, name)
        return function(u, *own)


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
