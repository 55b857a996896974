"""Every loss at infinite and huge log ratios, in every combination: limits by mpmath, in every implementation."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from mpmath import mp, mpf
from test_cuda_source import emulated  # noqa: F401  (a fixture)
from test_scalar_losses import BREGMAN, COUPLED, GENERATORS, SEPARABLE, own, separable_terms, sigmoid, softplus

from dil_kernels import _C as compiled
from dil_kernels import dil_loss, unpaired_dil_loss
from dil_kernels.losses import LossParameters, get_divergence
from dil_kernels.losses.scalar import pair_losses

INF = math.inf
HUGE = (-INF, -1e300, -800.0, -2.0, 0.0, 3.0, 420.0, 700.0, 800.0, 1e300, INF)
POWERS = (-1.0, -0.5, 0.0, 1e-9, 0.5, 1.0, 2.0)
LOSSES = [LossParameters(name) for name in GENERATORS if name != "power"]
LOSSES += [LossParameters("power", power=k) for k in POWERS]
LOSSES += [LossParameters("sppo_hard", 0.3), LossParameters("apo_zero", 0.3), LossParameters("dpo", 0.3)]
LOSSES += [LossParameters(name, 0.3, label_smoothing=0.1) for name in COUPLED]
every_set = pytest.mark.parametrize("loss", LOSSES, ids=lambda p: f"{p.loss_type} {p.power} {p.label_smoothing}")
PAIRS = list(itertools.product(HUGE, HUGE))
U = torch.tensor(PAIRS, dtype=torch.float64).t()  # (2, pairs)
FAR = mpf("1e320")  # an infinite log ratio: beyond fp64, as its exponential is beyond that of any number of fp64


def rounded(x: mpf) -> float:
    """As fp64 would have it, with a margin where it overflows."""
    if abs(x) > mpf("1e307"):
        return math.copysign(INF, float(mp.sign(x)))
    return float(x)


def stand_in(u: float) -> mpf:
    return mpf(u) if math.isfinite(u) else FAR * (1 if u > 0 else -1)


@functools.cache
def generators(loss_type: str, parameter: mpf, u: float) -> tuple[mpf, mpf, mpf, mpf]:
    """A, P, A' and P' there."""
    with mp.workdps(400):  # more than the digits of what stands in for infinity
        return separable_terms(loss_type, parameter, stand_in(u))


def chosen_truth(u: float, p: LossParameters) -> tuple[mpf, mpf]:
    A, P, dA, dP = generators(p.loss_type, own(p), u)
    return p.chosen_weight * (p.alpha * P - A), p.chosen_weight * (p.alpha * dP - dA)


def rejected_truth(u: float, p: LossParameters) -> tuple[mpf, mpf]:
    _, P, _, dP = generators(p.loss_type, own(p), u)
    weight = mpf(p.rejected_weight) * (1 - mpf(p.alpha))
    return weight * P, weight * dP


@functools.cache
def truth(u_w: float, u_l: float, p: LossParameters) -> tuple[float, float, float]:
    if p.loss_type in COUPLED:
        if math.isinf(u_w) and u_w == u_l:  # no limit: it depends on which is larger
            return (math.nan, -p.beta, p.beta) if p.loss_type == "hinge" else (math.nan,) * 3
        with mp.workdps(400):
            loss, grad_w, grad_l = (rounded(sum(x)) for x in COUPLED[p.loss_type](stand_in(u_w), stand_in(u_l), p))
            return loss, grad_w, grad_l
    (w, grad_w), (l, grad_l) = chosen_truth(u_w, p), rejected_truth(u_l, p)
    loss = rounded(w + l)
    one, other = rounded(w), rounded(l)
    if math.isinf(one) and math.isinf(other) and one != other:
        if math.isinf(u_w) != math.isinf(u_l):  # only one of the terms is infinite
            loss = one if math.isinf(u_w) else other
        elif math.isinf(u_w):  # both: in whatever order they grow, overflow in both directions is +inf
            loss = INF
    return loss, rounded(grad_w), rounded(grad_l)


def options(loss: LossParameters) -> list[LossParameters]:
    if loss.loss_type in COUPLED:
        return [loss]
    alphas = (0.0, 0.25, 1.0) if loss.loss_type in BREGMAN else (0.0,)
    combinations = itertools.product(alphas, (1.0, 0.0, 0.3), (1.0, 0.0, 2.5))
    return [
        loss._replace(alpha=alpha, chosen_weight=chosen, rejected_weight=rejected)
        for alpha, chosen, rejected in combinations
    ]


def assert_same(actual: float, expected: float, what: str, eps: float = 1e-12, floor: float = 1e-45) -> None:
    # The logarithms of what overflows, 700 and more, lose that many units of fp64's last place.
    same = math.isnan(actual) if math.isnan(expected) else actual == expected
    assert same or abs(actual - expected) <= eps * abs(expected) + floor, f"{what}: {actual}, not {expected}"


def in_torch(p: LossParameters) -> list[list[float]]:
    u_w, u_l = (u.clone().requires_grad_() for u in U)
    loss = pair_losses(u_w, u_l, p)
    return [x.tolist() for x in (loss, *torch.autograd.grad(loss.sum(), (u_w, u_l)))]


def in_cpp(p: LossParameters) -> list[list[float]]:
    return [x.tolist() for x in compiled.divergence_pair(p, U[0].numpy(), U[1].numpy())]


@pytest.mark.parametrize("implementation", [in_torch, in_cpp])
@every_set
def test_pairs(loss: LossParameters, implementation) -> None:
    floor = 1e-16 if loss.loss_type == "apo_down" else 1e-45  # two sigmoids cancel in its gradient
    for p in options(loss):
        for pair, *found in zip(PAIRS, *implementation(p), strict=True):
            for what, actual, expected in zip(("loss", "d u_w", "d u_l"), found, truth(*pair, p), strict=True):
                assert_same(actual, expected, f"{what} at {pair}, {p}", floor=floor)


@pytest.mark.parametrize("loss_type", SEPARABLE)
def test_scalar_functions(loss_type: str) -> None:
    values = {"power": POWERS, "sppo_hard": (0.3,), "apo_zero": (0.3,)}.get(loss_type, (0.0,))
    for k, u in itertools.product(values, HUGE):
        for name, value in zip(("A", "P", "dA", "dP"), generators(loss_type, mpf(k), u), strict=True):
            what = f"{name} of {loss_type} {k} at {u}"
            divergence = get_divergence(loss_type)
            own_values = [k] * len(divergence.parameters)
            in_torch_ = divergence.term(name, torch.tensor(u, dtype=torch.float64), own_values).item()
            assert_same(float(compiled.divergence_scalars(loss_type)[name](u, k)), rounded(value), what)
            assert_same(in_torch_, rounded(value), what)


@functools.cache
def truth_of_link(u_w: float, u_l: float, p: LossParameters) -> tuple[float, float, float]:
    with mp.workdps(400):
        k, beta = mpf(p.power), mpf(p.beta)
        w, l = stand_in(u_w), stand_in(u_l)
        if p.link == "ratio":
            x = beta * (w - l)
            A, _, dA, _ = separable_terms(p.loss_type, k, x)
            _, P, _, dP = separable_terms(p.loss_type, k, -x)
            push = beta * (dP + dA)
            return rounded(P - A), -rounded(push), rounded(push)
        (A_w, _, dA_w, _), (A_l, _, dA_l, _) = (generators(p.loss_type, k, u) for u in (u_w, u_l))
        margin = beta * (A_w - A_l)
        if abs(margin) > 1e6:  # beyond what mpmath takes the exponential of
            loss, push = max(-margin, mpf(0)), beta if margin < 0 else mpf(0)
        else:
            loss, push = softplus(-margin), beta * sigmoid(-margin)
        return rounded(loss), -rounded(push * dA_w), rounded(push * dA_l)


@pytest.mark.parametrize("implementation", [in_torch, in_cpp])
@pytest.mark.parametrize("link", ["ratio", "f_dpo"])
@pytest.mark.parametrize("loss", LOSSES[: LOSSES.index(LossParameters("sppo_hard", 0.3))], ids=str)
def test_pairs_by_the_other_links(loss: LossParameters, link: str, implementation) -> None:
    p = loss._replace(link=link, beta=0.3)
    for pair, *found in zip(PAIRS, *implementation(p), strict=True):
        if math.isinf(pair[0]) and pair[0] == pair[1]:  # no limit: it depends on which is larger
            continue
        for what, actual, expected in zip(("loss", "d u_w", "d u_l"), found, truth_of_link(*pair, p), strict=True):
            # Two scores cancel in the margin of f_dpo, and its sigmoid goes by their absolute error.
            rough = link == "f_dpo" and what != "loss" and math.isfinite(expected)
            assert_same(actual, expected, f"{what} at {pair}, {p}", eps=1e-9 if rough else 1e-12)


def as_dtype(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()


def check_op(ops, p: LossParameters, pairs: list[tuple[float, float]], dtype: torch.dtype) -> None:
    """Log ratios come from sums of fp64; losses and gradients are rounded to the dtype."""
    B, u = len(pairs), torch.tensor(pairs, dtype=torch.float64).t().flatten()
    _, losses, logratios, _, _, _, coefs = ops.density_ratio_fwd(
        torch.zeros(2 * B, 1, dtype=dtype), None, None, None, -u, None, *p, *(False,) * 3, -1, False
    )
    assert torch.equal(logratios, u.to(dtype))
    for pair, *found in zip(pairs, losses.tolist(), coefs[:B].tolist(), coefs[B:].tolist(), strict=True):
        for actual, expected in zip(found, truth(*pair, p), strict=True):
            eps = 1e-12 if dtype == torch.float64 else 1e-6
            assert_same(actual, as_dtype(expected, dtype), f"{pair}, {p}", eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_set
def test_the_op(loss: LossParameters, dtype: torch.dtype) -> None:
    for p in options(loss):
        check_op(torch.ops.dil_kernels, p, PAIRS, dtype)


@every_set
def test_the_cuda_source(emulated, loss: LossParameters) -> None:  # noqa: F811
    check_op(emulated, options(loss)[0], [(INF, 700.0), (-800.0, -INF), (INF, INF)], torch.float64)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_public_functions(backend: str) -> None:
    """The cases that once gave NaN gradients or the wrong sign."""
    zero = torch.zeros(1, dtype=torch.float64)
    for kwargs, u_w, u_l, expected in (
        ({"loss_type": "lsif"}, INF, 700.0, (-INF, -INF, INF)),
        ({"loss_type": "power", "power": 0.0}, INF, 1.0, (-INF, -1.0, math.e)),
        ({"loss_type": "power", "power": 0.0}, -INF, -INF, (INF, -1.0, 0.0)),
        ({"loss_type": "power", "power": -1.0}, -INF, -INF, (INF, -INF, 1.0)),
        ({"loss_type": "power", "power": -1.0}, 0.0, INF, (INF, -1.0, 1.0)),
        ({"loss_type": "ukl"}, INF, 800.0, (-INF, -1.0, INF)),
        ({"loss_type": "is"}, -800.0, -INF, (-INF, -INF, 1.0)),
    ):
        u = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (u_w, u_l)]
        losses, _, _ = dil_loss(*u, zero, zero, backend=backend, **kwargs)
        grads = torch.autograd.grad(losses.sum(), u)
        for actual, wanted in zip((losses, *grads), expected, strict=True):
            assert_same(actual.item(), wanted, f"{kwargs} at {u_w}, {u_l}")
        for side, x, grad in ((True, u[0], expected[1]), (False, u[1], expected[2])):
            term, _ = unpaired_dil_loss(x, zero, torch.tensor([side]), backend=backend, **kwargs)
            assert_same(torch.autograd.grad(term.sum(), x)[0].item(), grad, f"{kwargs} at {x}, chosen {side}")
