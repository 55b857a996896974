"""The definition of every density-ratio loss, in log-ratio space.

A Bregman divergence with generator ``h`` fits the density ratio ``r = pi_theta / pi_ref`` to data. With the log ratio
``u = log r``, ``A(u) = h'(e^u)`` and ``P(u) = e^u h'(e^u) - h(e^u)``, the loss of one pair (DIL, arXiv 2503.05079,
eq. 19, with the reference expectation taken as ``alpha`` chosen + ``1 - alpha`` rejected) is

    L = chosen_weight [-A(u_w) + alpha P(u_w)] + rejected_weight (1 - alpha) P(u_l)

Every entry satisfies ``P'(u) = e^u A'(u)``. `dil_kernels/losses/scalar.py` combines the terms; `csrc/divergences.h`
holds the same math for the compiled backend, and a test ties the two together. docs/losses.md describes every entry.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # exact everywhere; softplus turns linear above 20

from dil_kernels.checks import check_number, has_values

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


@dataclass(frozen=True)
class LossParameters:
    """Everything beside the log ratios that the loss of a pair depends on, checked; as csrc/divergences.h has it.

    Attributes:
        loss_type: the name of the divergence.
        parameter: the loss's own parameter; 0 where it has none.
        alpha: share of the chosen responses in the reference expectation.
        max_log_ratio: soft bound M on the log ratios, u -> M tanh(u / M); 0 for none.
        chosen_weight, rejected_weight: of the two terms.
    """

    loss_type: str
    parameter: float
    alpha: float = 0.0
    max_log_ratio: float = 0.0
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0


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


def resolve_options(
    loss_type: str,
    beta: float | None = None,
    alpha: float = 0.0,
    *,
    power: float | None = None,
    max_log_ratio: float | None = None,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> LossParameters:
    """Check the options of a loss against what it uses.

    Raises:
        ValueError: unknown loss, an option that the loss does not use, or a value out of range.
        TypeError: a value that is no number; a tensor among them, since no gradient would flow to it.
    """
    divergence = get_divergence(loss_type)
    own = divergence.parameter
    parameter = 0.0 if own is None else own.default
    for name, value in zip(PARAMETER_NAMES, (beta, power), strict=True):
        if value is None:
            continue
        if own is None or own.name != name:
            raise ValueError(f"{name}={value} was given, but loss_type={loss_type!r} has no {name}; leave it out")
        parameter = own.check(value)
    numbers = {"alpha": alpha, "chosen_weight": chosen_weight, "rejected_weight": rejected_weight}
    for name, value in (numbers | ({} if max_log_ratio is None else {"max_log_ratio": max_log_ratio})).items():
        check_number(name, value)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if max_log_ratio is not None and not 0.0 < max_log_ratio < math.inf:
        raise ValueError(f"max_log_ratio must be a finite number > 0, got {max_log_ratio}")
    for name, weight in (("chosen_weight", chosen_weight), ("rejected_weight", rejected_weight)):
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
    of_separable = {"alpha": (alpha, 0), "chosen_weight": (chosen_weight, 1), "rejected_weight": (rejected_weight, 1)}
    for name, (value, unused) in of_separable.items():
        if value != unused and not divergence.separable:
            raise ValueError(
                f"{name}={value} was given, but loss_type={loss_type!r} is not separable; leave it {unused}"
            )
    return LossParameters(
        divergence.name,
        parameter,
        float(alpha),
        float(max_log_ratio or 0.0),
        float(chosen_weight),
        float(rejected_weight),
    )


def resolve_non_negative(parameters: LossParameters, constant: float | None, reduction: str) -> float | None:
    """Check the constant C of the non-negative correction (`dil_kernels.losses.scalar.non_negative_loss`).

    Raises:
        ValueError: C is out of range, the loss has no lower bound of P to correct by, or nothing is averaged.
        TypeError: C is no number.
    """
    if constant is None:
        return None
    check_number("non_negative", constant)
    if not 0.0 < constant < 1.0:
        raise ValueError(f"non_negative must be between 0 and 1 (it is below 1 / sup r), got {constant}")
    has_floor = get_divergence(parameters.loss_type).separable
    if has_floor:
        floor = floor_of_P(parameters, torch.float64, "cpu")
        # A number cannot be read under torch.compile; there such a loss gives a loss that is not finite.
        has_floor = not has_values(floor) or math.isfinite(floor)
    if not has_floor:
        raise ValueError(
            f"non_negative={constant} was given, but loss_type={parameters.loss_type!r} has no non-negative part: it "
            "needs a separable loss with a finite P(-inf)"
        )
    if reduction != "mean":
        raise ValueError(
            f"non_negative={constant} corrects means over the batch: reduction must be 'mean', got {reduction!r}"
        )
    return float(constant)


def floor_of_P(parameters: LossParameters, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """P of a separable loss at r = 0, its least value; []."""
    u = torch.full((), -math.inf, dtype=dtype, device=device)
    return get_divergence(parameters.loss_type).term("P", u, parameters.parameter)


def register_divergence(divergence: Divergence) -> Divergence:
    """Make a loss available by name wherever a ``loss_type`` is taken.

    A separable divergence is checked on a grid of log ratios in fp64: ``A'(u) > 0`` (``h`` strictly convex),
    ``P'(u) = e^u A'(u)``, ``dA`` and ``dP``, where given, against autograd, and ``log_A``, ``log_P`` and ``log_dP``
    against what they are the logarithms of. Nothing may change its arguments, nor jump on [-8, 8]. The terms of an
    ``h`` may cancel in fp64: a warning names the log ratios where they do not, if those do not cover [-40, 40].
    A coupled one is checked to be elementwise. The compiled kernels sum log ratios for it; its own math runs in torch
    on those, a number a sequence.

    Args:
        divergence: the loss; its name must be new.

    Returns:
        The same divergence.

    Raises:
        ValueError: the name is taken, or the check fails; an ``h`` must hold on [-8, 8] at least.
    """
    if divergence.name in _REGISTRY or divergence.name == "none":
        raise ValueError(f"divergence {divergence.name!r} is already registered")
    parameter = 0.0 if divergence.parameter is None else divergence.parameter.default
    _check_arguments_stay(divergence, parameter)
    if divergence.h is not None:
        low, high = _range_of_generator(divergence, parameter)
        problem = (
            f"divergence {divergence.name!r}: what is derived from h cancels in fp64 outside log ratios of "
            f"[{low:g}, {high:g}]; give A and P instead"
        )
        if low > -8.0 or high < 8.0:
            raise ValueError(problem)
        if low > -40.0 or high < 40.0:
            warnings.warn(problem, stacklevel=2)
    if divergence.separable:
        _check_on_grid(divergence, parameter)
        _check_logarithms(divergence, parameter)
        for name in ("A", "P") if divergence.h is None else ():
            _check_no_jump(divergence, name, functools.partial(divergence.term, name, parameter=parameter))
    else:
        _check_pair(divergence, parameter)
    _REGISTRY[divergence.name] = divergence
    return divergence


def _check_arguments_stay(divergence: Divergence, parameter: float) -> None:
    """No function of the loss writes to its arguments: they are those of the caller."""
    own = () if divergence.parameter is None else (parameter,)
    for name in ("h", "pair", "A", "P", "dA", "dP", "log_A", "log_P", "log_dP"):
        function = getattr(divergence, name)
        if function is None:
            continue
        arguments = [torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) for _ in range(1 + (name == "pair"))]
        before = [argument.clone() for argument in arguments]
        function(*arguments, *own)
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


def _check_on_grid(divergence: Divergence, parameter: float) -> None:
    u = torch.linspace(-8.0, 8.0, 65, dtype=torch.float64)
    dA, dP = divergence.term("dA", u, parameter), divergence.term("dP", u, parameter)
    if not bool((dA > 0).all()):
        raise ValueError(f"divergence {divergence.name!r}: A'(u) must be > 0 everywhere (h strictly convex)")
    if not torch.allclose(dP, u.exp() * dA, rtol=1e-6, atol=1e-12):
        raise ValueError(f"divergence {divergence.name!r} breaks P'(u) = e^u A'(u): A and P do not share one h")
    for name, given in (("A", dA), ("P", dP)):
        with torch.enable_grad():
            x = u.clone().requires_grad_()
            (grad,) = torch.autograd.grad(divergence.term(name, x, parameter).sum(), x)
        if not torch.allclose(given, grad, rtol=1e-6, atol=1e-12):
            raise ValueError(f"divergence {divergence.name!r}: d{name} is not the derivative of {name}")


def _check_logarithms(divergence: Divergence, parameter: float) -> None:
    u = torch.linspace(-LARGEST_U_OF_H, LARGEST_U_OF_H, 601, dtype=torch.float64)
    for name in ("A", "P", "dP"):
        if getattr(divergence, f"log_{name}") is None:
            continue
        term = divergence.term(name, u, parameter)
        large = (term > 1e30) & term.isfinite()  # smaller ones may differ by a constant that no overflow sees
        given = divergence.term(f"log_{name}", u, parameter)[large]
        if not torch.allclose(given, term[large].log(), rtol=1e-9, atol=1e-6):
            raise ValueError(f"divergence {divergence.name!r}: log_{name} is not the logarithm of {name}")


def _check_pair(divergence: Divergence, parameter: float) -> None:
    assert divergence.pair is not None
    own = () if divergence.parameter is None else (parameter,)
    u_w, u_l = torch.tensor([[0.5, -1.0], [-0.25, 2.0]], dtype=torch.float64)
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


def _range_of_generator(divergence: Divergence, parameter: float) -> tuple[float, float]:
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
            integral = signed * (divergence.term(f"d{name}", within, parameter) @ weights).cumsum(0)
            value = divergence.term(name, u, parameter)
            good &= (value[1:] - value[0] - integral).abs() <= 1e-4 * integral.abs().clamp(min=1.0)
        reach.append(float(u[int(good.long().cumprod(0).sum())]))
    return reach[0], reach[1]


def _product(k: float, u: Tensor) -> Tensor:
    """``k u``, where 0 times an infinity is 0."""
    return k * u if k != 0 else torch.where(u.isinf(), 0.0, 0.0 * u)


def _expm1_over(k: float, u: Tensor) -> Tensor:
    """``(e^{k u} - 1) / k``, which is u where k is 0."""
    x = _product(k, u)
    quotient = torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))
    return torch.where(x.abs() < 1, u * quotient, torch.expm1(x) / (k or 1.0))


def _power_P(u: Tensor, k: float) -> Tensor:
    # The constant makes the loss continuous in k: that of ukl at 0, finite at -1.
    return ((1.0 + k) * u).exp() / (1.0 + k) if k >= 0 else _expm1_over(1.0 + k, u) + (1.0 + k)


def _builtin(**fields: Any) -> None:
    register_divergence(Divergence(**fields))


_builtin(
    name="lsif",  # h(r) = (r - 1)^2 / 2
    source="DIL (arXiv 2503.05079) eq. 24",
    A=lambda u: u.exp(),
    P=lambda u: 0.5 * (2.0 * u).exp(),
    dA=lambda u: u.exp(),
    dP=lambda u: (2.0 * u).exp(),
    log_A=lambda u: u,
    log_P=lambda u: 2.0 * u - math.log(2.0),
    log_dP=lambda u: 2.0 * u,
)
_builtin(
    name="ukl",  # h(r) = r log r - r
    source="DIL (arXiv 2503.05079) table 1",
    A=lambda u: 1.0 * u,
    P=lambda u: u.exp(),
    dA=lambda u: torch.ones_like(u),
    dP=lambda u: u.exp(),
    log_P=lambda u: u,
    log_dP=lambda u: u,
)
_builtin(
    name="bce",  # h(r) = r log r - (1 + r) log(1 + r)
    source="DIL (arXiv 2503.05079) table 1",
    A=lambda u: logsigmoid(u),
    P=lambda u: -logsigmoid(-u),
    dA=lambda u: (-u).sigmoid(),
    dP=lambda u: u.sigmoid(),
)
_builtin(
    name="power",  # h(r) = (r^{1+k} - r) / (k (1+k)); below -1 the loss is unbounded in the rejected term, too
    source="Basu et al. 1998, Biometrika 85; Sugiyama et al. 2012, Ann. Inst. Stat. Math. 64",
    A=lambda u, k: _expm1_over(k, u),
    P=_power_P,
    dA=lambda u, k: _product(k, u).exp(),
    dP=lambda u, k: _product(1.0 + k, u).exp(),
    log_A=lambda u, k: k * u - math.log(k) if k > 0 else torch.full_like(u, -math.inf),
    log_P=lambda u, k: (1.0 + k) * u - math.log1p(k) if k > -1 else torch.full_like(u, math.inf),
    log_dP=lambda u, k: _product(1.0 + k, u),
    parameter=Parameter(name="power", default=0.5, minimum=-1.0),
)
_builtin(
    name="is",  # h(r) = -log r
    source="Itakura-Saito: Banerjee et al. 2005, JMLR 6; power at -1",
    A=lambda u: -(-u).exp(),
    P=lambda u: 1.0 * u,
    dA=lambda u: (-u).exp(),
    dP=lambda u: torch.ones_like(u),
)
_builtin(
    name="brier",  # h(r) = 1 / (1 + r)
    source="Menon and Ong 2016, ICML: the square loss of a classifier of chosen against reference",
    A=lambda u: -(-u).sigmoid().square(),
    P=lambda u: u.sigmoid().square(),
    dA=lambda u: 2.0 * u.sigmoid() * (-u).sigmoid().square(),
    dP=lambda u: 2.0 * u.sigmoid().square() * (-u).sigmoid(),
)
_builtin(
    name="dpo",
    source="DIL (arXiv 2503.05079) eq. 27; DPO (arXiv 2305.18290) eq. 7",
    pair=lambda u_w, u_l, beta: -logsigmoid(beta * (u_w - u_l)),
    parameter=Parameter(name="beta", default=0.1, minimum=0.0, exclusive=True),
)
