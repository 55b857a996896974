"""The links, three ways to put a separable loss to work on a pair, and the affine map before it."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from implementations import Implementation, every_loss
from mpmath import mp, mpf
from test_scalar_losses import BREGMAN, GENERATORS, in_cpp, in_torch, sigmoid
from torch import Tensor
from torch.nn.functional import logsigmoid

from dil_kernels import Divergence, dil_loss, fused_dil_loss, register_divergence, unpaired_dil_loss
from dil_kernels.losses import LossOptions, LossParameters, Parameter
from dil_kernels.losses.registry import _REGISTRY

mp.dps = 50
POWERS = (-1.0, -0.5, 0.0, 0.5, 2.0)


def truth(u_w: float, u_l: float, p: LossParameters) -> tuple[mpf, mpf, mpf, mpf]:
    """Loss and gradients, and the largest of the terms that add up to them."""
    A, P, dA = GENERATORS[p.loss_type]
    k, beta, M = mpf(p.power), mpf(p.beta), mpf(p.max_log_ratio)
    w, l = (M * mp.tanh(mpf(u) / M) if M else mpf(u) for u in (u_w, u_l))
    slope_w, slope_l = (mp.sech(mpf(u) / M) ** 2 if M else mpf(1) for u in (u_w, u_l))
    if p.link == "ratio":
        x, s = beta * (w - l), mpf(p.scale)
        push = beta * (mp.exp(-x) * dA(-x, k) + dA(x, k)) / s
        terms = max(abs(P(-x, k)), abs(A(x, k))) / s
        return (P(-x, k) - A(x, k)) / s, -push * slope_w, push * slope_l, terms
    if p.link == "f_dpo":
        margin = beta * (A(w, k) - A(l, k))
        push = beta * sigmoid(-margin) if margin > -1e6 else beta
        rounding = abs(beta) * (abs(A(w, k)) + abs(A(l, k)))
        loss = mp.log1p(mp.exp(-margin)) if margin > -1e6 else -margin
        return loss, -push * dA(w, k) * slope_w, push * dA(l, k) * slope_l, rounding
    w, l = beta * w + mpf(p.chosen_offset), beta * l + mpf(p.rejected_offset)
    alpha = mpf(p.alpha)
    chosen, rejected = p.chosen_weight * (-A(w, k) + alpha * P(w, k)), p.rejected_weight * (1 - alpha) * P(l, k)
    d_chosen = p.chosen_weight * dA(w, k) * (alpha * mp.exp(w) - 1) * beta * slope_w
    d_rejected = p.rejected_weight * (1 - alpha) * mp.exp(l) * dA(l, k) * beta * slope_l
    return chosen + rejected, d_chosen, d_rejected, max(abs(A(w, k)), abs(P(w, k)), abs(P(l, k)))


@st.composite
def parameters(draw: st.DrawFn, link: str) -> LossParameters:
    loss_type = draw(st.sampled_from(BREGMAN))
    p = LossParameters(loss_type, power=draw(st.sampled_from(POWERS)) if loss_type == "power" else 0.0, link=link)
    p = p._replace(
        beta=draw(st.sampled_from((0.05, 0.1, 1.0, 2.5))), max_log_ratio=draw(st.sampled_from((0.0, 0.0, 4.0)))
    )
    if link == "ratio":
        return p._replace(scale=draw(st.sampled_from((1.0, 4.0, 0.3))))
    if link == "f_dpo":
        return p
    offsets = st.sampled_from((0.0, 0.7, -3.0))
    return p._replace(
        alpha=draw(st.sampled_from((0.0, 0.5))), chosen_offset=draw(offsets), rejected_offset=draw(offsets)
    )


def close(actual: float, expected: mpf, terms: mpf, rtol: mpf) -> bool:
    if abs(expected) > mpf("1.7e308"):
        return actual == math.copysign(math.inf, float(mp.sign(expected)))
    return abs(mpf(actual) - expected) <= rtol * max(abs(expected), terms) + mpf("1e-45")


@pytest.mark.parametrize("implementation", [in_torch, in_cpp])
@pytest.mark.parametrize("link", ["imitation", "ratio", "f_dpo"])
@given(data=st.data())
@settings(max_examples=300)
def test_links_match_mpmath(link: str, implementation: Any, data: st.DataObject) -> None:
    ratios = st.one_of(st.floats(-60, 60), st.floats(-2, 2), st.floats(-900, 900))
    u_w, u_l, p = data.draw(ratios), data.draw(ratios), data.draw(parameters(link))
    loss, grad_w, grad_l, terms = truth(u_w, u_l, p)
    assume(terms < mpf("1e300"))  # what overflows has tests of its own
    actual = implementation(u_w, u_l, p)
    # Gradients of f-DPO go as exp(-margin), whose argument is rounded at the size of A.
    slack = mpf("1e-12") + (mpf("4e-16") * terms if link == "f_dpo" else 0)
    assert close(actual[0], loss, terms, mpf("1e-12")), f"{actual[0]}, not {mpmath.nstr(loss, 17)}"
    for got, expected in zip(actual[1:], (grad_w, grad_l), strict=True):
        # A chosen term's gradient with alpha is a difference.
        base = abs(expected) if p.alpha == 0 else max(abs(expected), p.beta * terms)
        assert close(got, expected, base, slack), f"{got}, not {mpmath.nstr(expected, 17)}"


@pytest.mark.parametrize("implementation", [in_torch, in_cpp])
def test_overflowing_links_are_infinite_of_the_right_sign(implementation: Any) -> None:
    inf = math.inf
    ratio = LossParameters("lsif", link="ratio")
    assert implementation(900.0, 0.0, ratio) == (-inf, -inf, inf)  # -A(900) + P(-900)
    assert implementation(-900.0, 0.0, ratio) == (inf, -inf, inf)
    contrast = LossParameters("lsif", link="f_dpo")
    assert implementation(900.0, 800.0, contrast) == (0.0, 0.0, 0.0)
    assert implementation(800.0, 900.0, contrast) == (inf, -inf, inf)
    assert implementation(900.0, 900.0, contrast)[0] == pytest.approx(math.log(2.0))
    assert implementation(900.0, 0.0, contrast) == (0.0, 0.0, 0.0)


def losses_and_gradients(u: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of log ratios [2, B]."""
    v = u.clone().requires_grad_()
    loss, *_ = dil_loss(v[0], v[1], *torch.zeros_like(u), **options)
    (grad,) = torch.autograd.grad(loss.sum(), v)
    return loss.detach(), grad


def log_ratios() -> Tensor:
    return torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3.0


def same(options: dict[str, Any], others: dict[str, Any], factor: float = 1.0) -> None:
    results = (losses_and_gradients(log_ratios(), **each) for each in (options, others))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, factor * theirs, rtol=1e-12, atol=1e-12)


def test_what_the_literature_says_of_the_links() -> None:
    beta = {"beta": 0.3}
    dpo = beta | {"loss_type": "dpo"}
    same(beta | {"loss_type": "bce", "link": "ratio"}, dpo, 2.0)  # BPO with h of the logistic loss
    same(beta | {"loss_type": "ukl", "link": "f_dpo"}, dpo)  # reverse KL
    u, k, s = log_ratios(), 0.5, 4.0
    loss, grad = losses_and_gradients(u, **beta, loss_type="power", power=k, link="ratio", scale=s)
    d = 0.3 * (u[0] - u[1])
    torch.testing.assert_close(loss, (-(1 + k) * d).exp() / (s * (1 + k)) - ((k * d).exp() - 1) / (s * k))  # SBA
    torch.testing.assert_close(grad[1], 0.3 / s * ((-(1 + k) * d).exp() + (k * d).exp()))
    torch.testing.assert_close(grad[0], -grad[1])
    # With scale 4 a loss of A'(0) = 1 starts as DPO does. The LSIF in circulation, R^2 - 2R, would not start at all.
    start = torch.zeros(2, 1, dtype=torch.float64)
    _, of_dpo = losses_and_gradients(start, loss_type="dpo", beta=0.1)
    for loss_type in ("lsif", "ukl", "power"):
        _, grad = losses_and_gradients(start, loss_type=loss_type, link="ratio", beta=0.1, scale=4.0)
        torch.testing.assert_close(grad, of_dpo)


@pytest.mark.parametrize(
    ("loss_type", "score"),
    [
        ("is", lambda u: -(-u).exp()),  # forward KL
        ("bce", lambda u: math.log(2.0) - (1.0 + (-u).exp()).log()),  # Jensen-Shannon
        ("power", lambda u: (0.5 * u).exp() / 0.5),  # alpha divergence
    ],
)
def test_f_divergences(loss_type: str, score: Any) -> None:
    u = log_ratios()
    expected = -logsigmoid(0.2 * (score(u[0]) - score(u[1])))
    loss, _ = losses_and_gradients(u, loss_type=loss_type, link="f_dpo", beta=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_trls_separable_losses_are_settings() -> None:
    u, beta = log_ratios(), 0.3
    chosen, rejected = beta * u[0], beta * u[1]
    nca = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    bco = -logsigmoid(chosen - 0.4) - logsigmoid(0.4 - rejected)
    for expected, options in ((nca, {"alpha": 0.5}), (bco, {"offset": -0.4}), (bco, {"offset": (-0.4, -0.4)})):
        loss, grad = losses_and_gradients(u, loss_type="bce", beta=beta, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert grad.abs().max() > 0


@pytest.mark.parametrize("loss_type", ["bce", "brier", "ukl", "lsif"])
def test_the_settings_of_gsil(loss_type: str) -> None:
    """Its Bernoulli, Brier, KLIEP and LSIF at alpha u + delta."""
    u, alpha, delta = log_ratios(), 0.4, -0.7
    loss, grad = losses_and_gradients(u, loss_type=loss_type, beta=alpha, offset=delta)
    plain, slope = losses_and_gradients(alpha * u + delta, loss_type=loss_type)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(grad, alpha * slope)


def test_what_the_literature_says_of_coupled_losses() -> None:
    u = log_ratios()
    d, beta, e = u[0] - u[1], 0.3, 0.1
    right, wrong = -logsigmoid(beta * d), -logsigmoid(-beta * d)
    q = torch.stack([(beta * d).sigmoid(), (-beta * d).sigmoid()])
    p = torch.tensor([[1 - e], [e]], dtype=torch.float64)
    dpo: dict[str, Any] = {"loss_type": "dpo", "beta": beta}
    for options, expected in (
        (dpo | {"label_smoothing": e}, (1 - e) * right + e * wrong),
        ({"loss_type": "robust", "beta": beta, "label_smoothing": e}, ((1 - e) * right - e * wrong) / (1 - 2 * e)),
        ({"loss_type": "exo_pair", "beta": beta, "label_smoothing": e}, (q * (q / p).log()).sum(0)),
        ({"loss_type": "hinge", "beta": beta}, (1 - beta * d).clamp(min=0)),
        ({"loss_type": "ipo", "beta": beta}, (d - 1 / (2 * beta)) ** 2),
        ({"loss_type": "sppo_hard", "beta": beta}, (u[0] - 0.5 / beta) ** 2 + (u[1] + 0.5 / beta) ** 2),
        ({"loss_type": "apo_zero", "beta": beta}, 1 - (beta * u[0]).sigmoid() + (beta * u[1]).sigmoid()),
        ({"loss_type": "apo_down", "beta": beta}, (beta * u[0]).sigmoid() + 1 - (beta * d).sigmoid()),
    ):
        loss, _ = losses_and_gradients(u, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    same({"loss_type": "robust", "beta": beta}, dpo)
    calibrated, of_sppo, of_dpo = (
        losses_and_gradients(u, loss_type=name, beta=b)[0]
        for name, b in (("cal_dpo", beta), ("sppo_hard", beta), ("dpo", 1.0))
    )
    torch.testing.assert_close(calibrated, of_sppo + of_dpo)


def test_terms_of_no_divergence_are_registered_as_such() -> None:
    options: dict[str, Any] = {
        "source": "this test",
        "A": lambda u, beta, label_smoothing: beta * u - label_smoothing * u.square(),
        "P": lambda u, beta, label_smoothing: beta * u + label_smoothing * u.square(),
        "parameters": (
            Parameter(name="beta", default=0.5, minimum=0.0),
            Parameter(name="label_smoothing", default=0.25, minimum=0.0, below=1.0),
        ),
    }
    with pytest.raises(ValueError, match=r"A'\(u\) must be > 0"):
        register_divergence(Divergence(name="quadratic", **options))
    with pytest.raises(ValueError, match="bregman=False, which is of A and P only"):
        Divergence(name="pairwise", source="", pair=lambda w, l: w - l, bregman=False)
    with pytest.raises(ValueError, match="two parameters of one name"):
        Divergence(name="twice", source="", pair=lambda w, l, a, b: w - l, parameters=options["parameters"][:1] * 2)
    with pytest.raises(ValueError, match="beta must be a finite number >= 0, got -1"):
        Parameter(name="beta", default=-1.0, minimum=0.0)
    with pytest.raises(ValueError, match="dA is not the derivative of A"):
        register_divergence(Divergence(name="quadratic", **options, dA=lambda u, b, e: u, bregman=False))
    register_divergence(Divergence(name="quadratic", **options, bregman=False))
    try:
        u = log_ratios()
        for backend in ("auto", "eager"):
            loss, _ = losses_and_gradients(
                u, loss_type="quadratic", beta=2.0, label_smoothing=0.5, rejected_weight=3.0, backend=backend
            )
            torch.testing.assert_close(loss, -(2 * u[0] - u[0] ** 2 / 2) + 3 * (2 * u[1] + u[1] ** 2 / 2))
        for refused in ({"alpha": 0.5}, {"link": "ratio"}):
            with pytest.raises(ValueError, match="loss_type='quadratic' is no Bregman divergence"):
                LossOptions(loss_type="quadratic", **refused)
        with pytest.raises(ValueError, match=r"label_smoothing must be a finite number >= 0 and < 1, got 1.0"):
            LossOptions(loss_type="quadratic", label_smoothing=1.0)
    finally:
        del _REGISTRY["quadratic"]


@every_loss
@pytest.mark.parametrize("link", ["imitation", "ratio", "f_dpo"])
def test_every_way_to_the_loss_agrees(impl: Implementation, link: str) -> None:
    gen = torch.Generator().manual_seed(2)
    logits, ref = (torch.randn(4, 7, 11, generator=gen).to(impl.device) for _ in range(2))
    labels = torch.randint(0, 11, (4, 7), generator=gen).to(impl.device)
    options: dict[str, Any] = {"loss_type": "power", "power": -0.5, "link": link, "beta": 0.7, "max_log_ratio": 3.0}
    options |= {"imitation": {"offset": (0.2, -0.1)}, "ratio": {"scale": 2.0}}.get(link, {})
    x = logits.double().requires_grad_()
    truth = fused_dil_loss(x, labels, ref_logits=ref.double(), backend="eager", **options)
    (grad,) = torch.autograd.grad(truth.loss, x)
    x = logits.requires_grad_()
    out = fused_dil_loss(x, labels, ref_logits=ref, backend=impl.backend, **options)
    torch.testing.assert_close(out.loss.double(), truth.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x)[0].double(), grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.chosen_rewards.double(), truth.chosen_rewards)  # the log ratios as they are


def test_affine_terms_of_unpaired_responses_are_those_of_pairs() -> None:
    u = log_ratios()
    options: dict[str, Any] = {"loss_type": "lsif", "beta": 0.4, "offset": (0.3, -0.2), "alpha": 0.25}
    both, _ = losses_and_gradients(u, **options)
    sides = torch.arange(100) < 50
    losses, _ = unpaired_dil_loss(u.flatten(), torch.zeros(100, dtype=torch.float64), sides, **options)
    torch.testing.assert_close(losses[:50] + losses[50:], both)


@pytest.mark.parametrize("link", ["imitation", "ratio", "f_dpo"])
@pytest.mark.parametrize("loss_type", BREGMAN)
def test_gradcheck(loss_type: str, link: str) -> None:
    p = LossParameters(loss_type, 0.6, 0.5, max_log_ratio=3.0, scale=2.0, link=link)
    from dil_kernels.losses.scalar import pair_losses

    inputs = [torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1] = (inputs[1] * 0.7 - 0.4).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, l: pair_losses(w, l, p), inputs)
    assert torch.autograd.gradgradcheck(lambda w, l: pair_losses(w, l, p), inputs)


REFUSED = [
    ({"link": "odds"}, "unknown link 'odds'; available: imitation, ratio, f_dpo"),
    ({"loss_type": "dpo", "link": "ratio"}, "link='ratio' was given, but loss_type='dpo' is not separable"),
    ({"link": "ratio", "alpha": 0.5}, "alpha=0.5 was given, but link='ratio' has no alpha; leave it 0"),
    ({"link": "f_dpo", "chosen_weight": 2.0}, "chosen_weight=2.0 was given, but link='f_dpo' has no chosen_weight"),
    ({"link": "f_dpo", "scale": 2.0}, "scale=2.0 was given, but link='f_dpo' has no scale; leave it 1"),
    ({"scale": 2.0}, "scale=2.0 was given, but link='imitation' has no scale; leave it 1"),
    ({"link": "ratio", "offset": 0.5}, "offset=0.5 was given, but link='ratio' has no offset; leave it None"),
    ({"loss_type": "dpo", "offset": 0.5}, "offset=0.5 was given, but loss_type='dpo' is not separable; leave it None"),
    (
        {"offset": (0.0, 1.0, 2.0)},
        "offset must be one number, or one for chosen and one for rejected, got (0.0, 1.0, 2.0)",
    ),
    ({"offset": math.inf}, "offset must be finite, got inf"),
    ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0"),
    ({"beta": math.nan}, "beta must be a finite number > 0, got nan"),
    ({"link": "ratio", "scale": -1.0}, "scale must be a finite number > 0, got -1.0"),
    (
        {"loss_type": "robust", "label_smoothing": 0.5},
        "label_smoothing must be a finite number >= 0 and < 0.5, got 0.5",
    ),
    ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "label_smoothing must be a finite number > 0 and < 0.5, got 0"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "loss_type='hinge' has no label_smoothing; leave it out"),
    ({"loss_type": "sppo_hard", "alpha": 0.5}, "loss_type='sppo_hard' is no Bregman divergence; leave it 0"),
    ({"loss_type": "apo_zero", "link": "f_dpo"}, "loss_type='apo_zero' is no Bregman divergence; leave it 'imitation'"),
    ({"loss_type": "apo_zero", "non_negative": 0.5, "reduction": "mean"}, "non_negative=0.5 was given, but"),
    (
        {"loss_type": "bce", "link": "ratio", "non_negative": 0.5, "reduction": "mean"},
        "link='ratio' has no non-negative",
    ),
    ({"nll_weight": -1.0}, "nll_weight must be a finite number >= 0, got -1.0"),
    ({"link": "ratio", "non_negative": 0.5, "reduction": "mean"}, "non_negative=0.5 was given, but"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_a_link_does_not_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LossOptions(**options)


def test_a_beta_of_the_losses_own_stays_its_own() -> None:
    own = Divergence(
        name="scaled_ukl",
        source="this test",
        A=lambda u, beta: beta * u,
        P=lambda u, beta: beta * u.exp(),
        parameters=(Parameter(name="beta", default=0.1, minimum=0.0, exclusive=True),),
    )
    register_divergence(own)
    try:
        same({"loss_type": "scaled_ukl", "beta": 0.5}, {"loss_type": "ukl"}, 0.5)
        with pytest.raises(ValueError, match="loss_type='scaled_ukl' has a beta of its own"):
            LossOptions(loss_type="scaled_ukl", link="f_dpo")
    finally:
        del _REGISTRY["scaled_ukl"]


def test_unpaired_responses_have_no_other_link() -> None:
    u, sides = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(ValueError, match="link='ratio' couples the chosen and the rejected response of a pair"):
        unpaired_dil_loss(u, u, sides, link="ratio")


def test_beta_has_the_default_of_its_link() -> None:
    assert [LossOptions(link=link).factor for link in ("imitation", "ratio", "f_dpo")] == [1.0, 0.1, 0.1]
    zero = Parameter(name="beta", default=0.0, minimum=-1.0)
    register_divergence(
        Divergence(name="shifted", source="this test", pair=lambda w, l, b: w - l + b, parameters=(zero,))
    )
    try:
        assert [LossOptions(loss_type="shifted", beta=b).factor for b in (None, 0.0, -0.5)] == [0.0, 0.0, -0.5]
    finally:
        del _REGISTRY["shifted"]
    register_divergence(Divergence(name="difference", source="this test", pair=lambda w, l: (w - l).square()))
    try:
        assert LossOptions(loss_type="difference").factor == 1.0
    finally:
        del _REGISTRY["difference"]
    assert (LossOptions(loss_type="dpo").factor, LossOptions(loss_type="dpo", beta=0.3).factor) == (0.1, 0.3)
    for options, own in itertools.product(({}, {"beta": 0.5}), ("lsif", "dpo")):
        p = LossOptions(loss_type=own, **options).parameters
        assert p.beta == options.get("beta", 0.1 if own == "dpo" else 1.0)
