"""The math of every loss, compiled and in torch, against mpmath over the whole fp32 range of log ratios."""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from dil_kernels import _C as compiled
from dil_kernels.losses import LossParameters, divergence_names, get_divergence
from dil_kernels.losses.scalar import pair_losses, response_losses, total

mp.dps = 60
COMPILED = compiled.divergence_names()
SEPARABLE = [name for name in COMPILED if get_divergence(name).separable]
BREGMAN = [name for name in SEPARABLE if get_divergence(name).bregman]


def sigmoid(u):
    return 1 / (1 + mp.exp(-u))


def softplus(u):
    return mp.log1p(mp.exp(u))


# A, P and A' by hand from h; k is the power.
GENERATORS = {
    "lsif": (lambda u, k: mp.exp(u), lambda u, k: mp.exp(2 * u) / 2, lambda u, k: mp.exp(u)),
    "ukl": (lambda u, k: u, lambda u, k: mp.exp(u), lambda u, k: mpf(1)),
    "bce": (lambda u, k: -mp.log1p(mp.exp(-u)), lambda u, k: mp.log1p(mp.exp(u)), lambda u, k: sigmoid(-u)),
    "power": (
        lambda u, k: mp.expm1(k * u) / k if k else u,
        lambda u, k: (
            mp.exp((1 + k) * u) / (1 + k) if k >= 0 else (mp.expm1((1 + k) * u) / (1 + k) if k > -1 else u) + 1 + k
        ),
        lambda u, k: mp.exp(k * u),
    ),
    "is": (lambda u, k: -mp.exp(-u), lambda u, k: u, lambda u, k: mp.exp(-u)),
    "brier": (
        lambda u, k: -(sigmoid(-u) ** 2),
        lambda u, k: sigmoid(u) ** 2,
        lambda u, k: 2 * sigmoid(u) * sigmoid(-u) ** 2,
    ),
}


# A, P, A', P' of what is of no h; k is beta.
OTHERS = {
    "sppo_hard": (
        lambda u, k: -((u - 1 / (2 * k)) ** 2),
        lambda u, k: (u + 1 / (2 * k)) ** 2,
        lambda u, k: -2 * (u - 1 / (2 * k)),
        lambda u, k: 2 * (u + 1 / (2 * k)),
    ),
    "apo_zero": (
        lambda u, k: -sigmoid(-k * u),
        lambda u, k: sigmoid(k * u),
        lambda u, k: k * sigmoid(k * u) * sigmoid(-k * u),
        lambda u, k: k * sigmoid(k * u) * sigmoid(-k * u),
    ),
}


def separable_terms(loss_type: str, own: mpf, u: mpf) -> tuple[mpf, mpf, mpf, mpf]:
    """A, P, A' and P' there."""
    if loss_type in OTHERS:
        A, P, dA, dP = (f(u, own) for f in OTHERS[loss_type])
        return A, P, dA, dP
    A, P, dA = (f(u, own) for f in GENERATORS[loss_type])
    return A, P, dA, mp.exp(u) * dA


def own(p: LossParameters) -> mpf:
    """What A and P take beside u."""
    return mpf(p.beta if p.loss_type in OTHERS else p.power)


def smoothed(x, p):
    e = mpf(p.label_smoothing)
    return [(1 - e) * softplus(-x), e * softplus(x)], [-(1 - e) * sigmoid(-x), e * sigmoid(x)]


def robust(x, p):
    e = mpf(p.label_smoothing)
    (right, wrong), (pull, push) = smoothed(x, p)
    return [right / (1 - 2 * e), -wrong / (1 - 2 * e)], [pull / (1 - 2 * e), -push / (1 - 2 * e)]


def identity_preference(x, p):
    beta = mpf(p.beta)
    target = 1 / (2 * beta)
    d = x / beta
    return [d**2, -2 * d * target, target**2], [2 * d / beta, -2 * target / beta]


def exact(x, p):
    e, q_w, q_l = mpf(p.label_smoothing), sigmoid(x), sigmoid(-x)
    terms = [-q_w * softplus(-x), -q_w * mp.log1p(-e), -q_l * softplus(x), -q_l * mp.log(e)]
    return terms, [q_w * q_l * x, -q_w * q_l * mp.log((1 - e) / e)]


def of_difference(f):
    def both(w, l, p):
        beta = mpf(p.beta)
        terms, slopes = f(beta * (w - l), p)
        return terms, [beta * slope for slope in slopes], [-beta * slope for slope in slopes]

    return both


def anchored_down(w, l, p):
    beta = mpf(p.beta)
    v, x = beta * w, beta * (w - l)
    push = beta * sigmoid(x) * sigmoid(-x)
    return [sigmoid(v), sigmoid(-x)], [beta * sigmoid(v) * sigmoid(-v), -push], [push]


def calibrated(w, l, p):
    target, push = 1 / (2 * mpf(p.beta)), sigmoid(l - w)
    terms = [softplus(l - w), (w - target) ** 2, (l + target) ** 2]
    return terms, [2 * w, -2 * target, -push], [2 * l, 2 * target, push]


# What adds up to the loss and its two gradients, from both log ratios.
COUPLED = {
    "dpo": of_difference(smoothed),
    "robust": of_difference(robust),
    "hinge": of_difference(lambda x, p: ([mpf(1), -x], [mpf(-1)]) if x < 1 else ([mpf(0)], [mpf(0)])),
    "ipo": of_difference(identity_preference),
    "exo_pair": of_difference(exact),
    "apo_down": anchored_down,
    "cal_dpo": calibrated,
}


@dataclass
class Truth:
    loss: mpf
    grads: tuple[mpf, mpf]
    terms: mpf  # the largest of those that add up to the loss
    grad_terms: tuple[mpf, mpf]


def constant_of_power(p: LossParameters) -> mpf:
    """What cancels in P between -1 and 0."""
    return 1 / mpf(1 + p.power) if p.loss_type == "power" and -1 < p.power < 0 else mpf(0)


def truth(u_w: float, u_l: float, p: LossParameters) -> Truth:
    M = mpf(p.max_log_ratio)
    w, l = ((M * mp.tanh(mpf(u) / M) if M else mpf(u)) for u in (u_w, u_l))
    slope_w, slope_l = ((mp.sech(mpf(u) / M) ** 2 if M else mpf(1)) for u in (u_w, u_l))
    if p.loss_type in COUPLED:
        losses, *sides = COUPLED[p.loss_type](w, l, p)
        grads = [[term * slope for term in terms] for terms, slope in zip(sides, (slope_w, slope_l), strict=True)]
        terms, *grad_terms = (max(map(abs, terms)) for terms in (losses, *grads))
        return Truth(sum(losses), (sum(grads[0]), sum(grads[1])), terms, tuple(grad_terms))
    alpha = mpf(p.alpha)
    A, P, dA, dP = separable_terms(p.loss_type, own(p), w)
    _, P_l, _, dP_l = separable_terms(p.loss_type, own(p), l)
    chosen = [-A, alpha * P]
    chosen_grads = [-dA, alpha * dP]
    rejected = (1 - alpha) * P_l
    losses = [p.chosen_weight * term for term in chosen] + [p.rejected_weight * rejected]
    return Truth(
        sum(losses),
        (
            p.chosen_weight * sum(chosen_grads) * slope_w,
            p.rejected_weight * (1 - alpha) * dP_l * slope_l,
        ),
        max(*(abs(term) for term in losses), constant_of_power(p)),
        (p.chosen_weight * max(abs(term) for term in chosen_grads) * slope_w, mpf(0)),
    )


def assert_close(actual: float, expected: mpf, terms: mpf, what: str) -> None:
    """To 1e-12 of the largest term, as the logarithm of what overflows loses digits; an overflow is that infinity."""
    if max(abs(expected), terms) > mpf("1e307"):
        sign = float(mp.sign(expected))
        assert actual == sign * float("inf") or (abs(expected) < mpf("1.8e308") and actual * sign > 1e305), (
            f"{what}: {actual}, not {mpmath.nstr(expected)}"
        )
        return
    assert abs(mpf(actual) - expected) <= mpf("1e-12") * max(abs(expected), terms) + mpf("1e-45"), (
        f"{what}: {actual}, not {mpmath.nstr(expected, 17)}"
    )


log_ratios = st.one_of(
    st.floats(-5, 5),
    st.floats(-1000, 1000),
    st.builds(lambda sign, e: sign * 10.0**e, st.sampled_from((-1, 1)), st.floats(-30, 38)),
)
weights = st.sampled_from((1.0, 0.0, 0.3, 2.5))


@st.composite
def parameters(draw: st.DrawFn, loss_type: str) -> LossParameters:
    values = {
        "beta": st.floats(0.01, 3),
        "power": st.sampled_from((-1.0, -1 + 1e-9, -0.9, -0.5, -0.1, -1e-12, 0.0, 1e-9, 0.5, 1.0, 2.0)),
        "label_smoothing": st.sampled_from((1e-6, 0.1, 0.4999) if loss_type == "exo_pair" else (0.0, 0.1, 0.4999)),
    }
    divergence = get_divergence(loss_type)
    p = LossParameters(loss_type, **{own.name: draw(values[own.name]) for own in divergence.parameters})
    p = p._replace(max_log_ratio=draw(st.sampled_from((0.0, 0.0, 3.0, 100.0))))
    if divergence.separable:
        p = p._replace(chosen_weight=draw(weights), rejected_weight=draw(weights))
    if divergence.separable and divergence.bregman:
        alphas = st.one_of(st.sampled_from((0.0, 0.5, 1.0)), st.builds(lambda e: 10.0**e, st.floats(-300, -0.01)))
        p = p._replace(alpha=draw(alphas))
    return p


def in_torch(u_w: float, u_l: float, p: LossParameters) -> tuple[float, float, float]:
    w, l = (torch.tensor([u], dtype=torch.float64, requires_grad=True) for u in (u_w, u_l))
    loss = pair_losses(w, l, p)
    grads = torch.autograd.grad(loss.sum(), (w, l))
    return loss.item(), grads[0].item(), grads[1].item()


def in_cpp(u_w: float, u_l: float, p: LossParameters) -> tuple[float, float, float]:
    loss, grad_w, grad_l = compiled.divergence_pair(p, u_w, u_l)
    return float(loss), float(grad_w), float(grad_l)


@pytest.mark.parametrize("loss_type", COMPILED)
@given(data=st.data())
@settings(max_examples=150)
def test_pairs_match_mpmath(loss_type: str, data: st.DataObject) -> None:
    u_w, u_l, p = data.draw(log_ratios), data.draw(log_ratios), data.draw(parameters(loss_type))
    expected = truth(u_w, u_l, p)
    if loss_type == "hinge":  # on which side of its kink a pair is, is known to rounding only
        assume(expected.loss == 0 or expected.loss > mpf("1e-12") * expected.terms)
    assume(abs(expected.loss) > mpf("1e-9") * expected.terms or expected.terms < mpf("1e300"))
    for implementation in (in_torch, in_cpp):
        loss, grad_w, grad_l = implementation(u_w, u_l, p)
        assert_close(loss, expected.loss, expected.terms, f"loss {implementation.__name__}")
        assert_close(grad_w, expected.grads[0], expected.grad_terms[0], f"d loss / d u_w {implementation.__name__}")
        assert_close(grad_l, expected.grads[1], expected.grad_terms[1], f"d loss / d u_l {implementation.__name__}")


@pytest.mark.parametrize("loss_type", SEPARABLE)
@given(data=st.data())
def test_single_responses_are_the_terms_of_a_pair(loss_type: str, data: st.DataObject) -> None:
    p, u = data.draw(parameters(loss_type)), data.draw(log_ratios)
    for is_chosen in (True, False):
        v = torch.tensor([u], dtype=torch.float64, requires_grad=True)
        loss = response_losses(v, torch.tensor([is_chosen]), p)
        (grad,) = torch.autograd.grad(loss.sum(), v)
        alone = p._replace(rejected_weight=0.0) if is_chosen else p._replace(chosen_weight=0.0)
        expected = truth(u, u, alone)
        if abs(expected.loss) < mpf("1e-9") * expected.terms and expected.terms > mpf("1e300"):
            continue  # the sign of what cancels to 1e-9 after an overflow is no one's to know
        in_cpp_ = compiled.divergence_response(p, u, is_chosen)
        for actual_loss, actual_grad in ((loss.item(), grad.item()), in_cpp_):
            assert_close(float(actual_loss), expected.loss, expected.terms, "loss")
            assert_close(float(actual_grad), expected.grads[not is_chosen], max(expected.grad_terms), "gradient")


@pytest.mark.parametrize("implementation", [in_torch, in_cpp])
def test_lsif_overflows_to_the_larger_term(implementation) -> None:
    inf = float("inf")
    plain, mixed = LossParameters("lsif"), LossParameters("lsif", alpha=1e-300)
    assert implementation(800.0, 300.0, plain) == (-inf, -inf, pytest.approx(mp.exp(600), rel=1e-12))
    assert implementation(800.0, 500.0, plain) == (inf, -inf, inf)
    assert implementation(800.0, 399.0, plain)[0] == -inf
    assert implementation(800.0, 0.0, mixed) == (inf, inf, 1.0)
    assert implementation(715.0, 0.0, mixed._replace(alpha=1e-322))[:2] == (-inf, -inf)  # r is below 1 / alpha


@pytest.mark.parametrize("implementation", [in_torch, in_cpp])
@pytest.mark.parametrize("power", [-0.9, -0.5, -0.1])
@pytest.mark.parametrize("u", [1500.0, 1e4, 1e38, -1500.0, -1e4, -1e38])
def test_power_below_0_far_out(implementation, power: float, u: float) -> None:
    """A' underflows there while P' = e^u A' overflows."""
    for alpha in (0.0, 0.5):
        p = LossParameters("power", power=power, alpha=alpha)
        for u_w, u_l in ((0.5, u), (u, 0.5)):
            expected = truth(u_w, u_l, p)
            loss, *grads = implementation(u_w, u_l, p)
            assert_close(loss, expected.loss, expected.terms, "loss")
            for grad, expected_grad in zip(grads, expected.grads, strict=True):
                assert_close(grad, expected_grad, mpf(0), "gradient")
    weighted = LossParameters("power", power=power, rejected_weight=1e-250)
    assert_close(implementation(0.0, 1500.0, weighted)[2], truth(0.0, 1500.0, weighted).grads[1], mpf(0), "gradient")


@pytest.mark.parametrize("loss_type", COMPILED)
def test_nan_stays_nan(loss_type: str) -> None:
    for u_w, u_l in ((float("nan"), 1.0), (1.0, float("nan"))):
        for alpha in (0.0, 0.5) if loss_type in BREGMAN else (0.0,):
            p = LossParameters(loss_type, 0.5, 0.5, 0.2, alpha)
            assert in_cpp(u_w, u_l, p)[0] != in_cpp(u_w, u_l, p)[0]
            assert in_torch(u_w, u_l, p)[0] != in_torch(u_w, u_l, p)[0]


@pytest.mark.parametrize(("power", "sibling", "shift"), [(1.0, "lsif", 1.0), (0.0, "ukl", 0.0), (-1.0, "is", -1.0)])
@pytest.mark.parametrize("step", [0.0, 1e-13, -1e-13])
def test_power_contains_its_siblings_and_is_continuous_there(
    power: float, sibling: str, shift: float, step: float
) -> None:
    if power + step < -1:
        return
    u_w, u_l = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    rest = {"alpha": 0.25}
    near = pair_losses(u_w, u_l, LossParameters("power", power=power + step, **rest))
    there = pair_losses(u_w, u_l, LossParameters(sibling, **rest))
    torch.testing.assert_close(near, there + shift, rtol=1e-9, atol=1e-9)
    for w, l, expected in zip(u_w.tolist(), u_l.tolist(), near.tolist(), strict=True):
        actual = in_cpp(w, l, LossParameters("power", power=power + step, **rest))[0]
        assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_sum_of_losses_overflows_to_inf_and_keeps_nan() -> None:
    inf, nan = float("inf"), float("nan")
    for values, expected in (([inf, -inf, 1.0], inf), ([-inf, 1.0], -inf), ([1.5, -4.0], -2.5)):
        assert total(torch.tensor(values)).item() == expected
    assert total(torch.tensor([nan, inf])).isnan()
    losses = torch.tensor([inf, -inf], requires_grad=True)
    assert torch.autograd.grad(3 * total(losses), losses)[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("loss_type", divergence_names())
def test_second_derivatives_of_the_torch_losses(loss_type: str) -> None:
    u_w, u_l = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = LossParameters(loss_type, 0.5, 0.5, 0.2, 0.3 if loss_type in BREGMAN else 0.0, 4.0)
    inputs = (u_w.requires_grad_(), u_l.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, l: pair_losses(w, l, p), inputs)
    assert torch.autograd.gradgradcheck(lambda w, l: pair_losses(w, l, p), inputs)
