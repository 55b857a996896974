"""The losses on log ratios: published vectors, identities, the compiled math against the torch math, and their
autograd."""

from __future__ import annotations

import pytest
import torch
from implementations import Implementation, every_loss

from dil_kernels import _C as compiled  # the suite needs the extension; without it nothing here may pass
from dil_kernels import Divergence, dil_loss, fused_dil_loss, register_divergence
from dil_kernels.losses import Parameter, divergence_names, get_divergence
from dil_kernels.losses.registry import _REGISTRY

# mpmath, 50 digits: loss_type, options, u_w, u_l, loss, d/du_w, d/du_l
VECTORS = [
    ("lsif", {}, 0.0, 0.0, -0.5, -1.0, 1.0),
    ("lsif", {}, 1.0, -2.0, -2.7091240090146781, -2.7182818284590452, 0.01831563888873418),
    ("lsif", {}, -3.0, 0.25, 0.77457356698220013, -0.049787068367863943, 1.6487212707001281),
    ("lsif", {}, 10.0, 5.0, -11013.232897403358, -22026.465794806717, 22026.465794806717),
    ("ukl", {}, 0.5, -0.5, 0.10653065971263342, -1.0, 0.60653065971263342),
    ("ukl", {}, 2.5, 1.5, 1.9816890703380648, -1.0, 4.4816890703380648),
    ("ukl", {}, -100.0, -120.0, 100.0, -1.0, 7.6676480737219996e-53),
    ("bce", {}, 0.0, 0.0, 1.3862943611198906, -0.5, 0.5),
    ("bce", {}, 1.0, -2.0, 0.44018969856119533, -0.26894142136999512, 0.11920292202211756),
    ("bce", {}, -50.0, 20.0, 70.000000002061154, -1.0, 0.99999999793884638),
    ("dpo", {"beta": 0.1}, -0.5, 0.5, 0.74439666007357089, -0.052497918747893999, 0.052497918747893999),
    ("dpo", {"beta": 1.0}, 1.0, -2.0, 0.048587351573742059, -0.047425873177566781, 0.047425873177566781),
    ("power", {"power": 0.5}, 1.0, -2.0, -1.264251162488347, -1.6487212707001281, 0.049787068367863943),
    ("brier", {}, 1.0, -2.0, 0.086538824747124307, -0.10575418556853344, 0.025031084347353455),
    ("lsif", {"alpha": 0.5}, 1.0, -2.0, -0.86643889400419913, 0.97624622100627988, 0.0091578194443670901),
    ("bce", {"alpha": 0.5}, 1.0, -2.0, 1.0333565367988205, 0.096587867945007319, 0.059601461011058778),
]
SEPARABLE = [name for name in divergence_names() if get_divergence(name).separable]
COMPILED = compiled.divergence_names()
U = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)


@every_loss
@pytest.mark.parametrize(("loss_type", "options", "u_w", "u_l", "loss", "grad_w", "grad_l"), VECTORS)
def test_published_vectors(impl: Implementation, loss_type, options, u_w, u_l, loss, grad_w, grad_l) -> None:
    u = torch.tensor([[u_w], [u_l]], dtype=torch.float64, device=impl.device, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64, device=impl.device)
    backend = "eager" if impl.backend == "eager" else "auto"
    losses, chosen, rejected = dil_loss(u[0], u[1], zero, zero, loss_type=loss_type, backend=backend, **options)
    (grad,) = torch.autograd.grad(losses.sum(), u)
    expected = torch.tensor([loss, grad_w, grad_l], dtype=torch.float64)
    actual = torch.stack([losses.detach()[0], grad[0, 0], grad[1, 0]]).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0.0)
    assert (chosen.item(), rejected.item()) == (u_w, u_l)
    assert not chosen.requires_grad


@pytest.mark.parametrize("name", SEPARABLE)
def test_eager_derivatives_and_the_identity(name: str) -> None:
    divergence = get_divergence(name)
    own = divergence.defaults()
    u = U.clone().requires_grad_()
    for key in ("A", "P"):
        (by_autograd,) = torch.autograd.grad(divergence.term(key, u, own).sum(), u)
        analytic = divergence.term(f"d{key}", U, own)
        # autograd's own derivative of expm1 is expm1 + 1, which is good to 1e-16 absolutely
        torch.testing.assert_close(analytic, by_autograd, rtol=1e-11, atol=1e-15, msg=key)
    dA, dP = (divergence.term(key, U, own) for key in ("dA", "dP"))
    if divergence.bregman:
        torch.testing.assert_close(dP, U.exp() * dA, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", [name for name in SEPARABLE if name in COMPILED])
def test_compiled_scalars_match_torch_and_the_identity(name: str) -> None:
    divergence = get_divergence(name)
    own, functions = divergence.defaults(), compiled.divergence_scalars(name)
    scalars = {key: torch.from_numpy(f(U.numpy(), *(own or (0.0,)))) for key, f in functions.items()}
    for key, actual in scalars.items():
        torch.testing.assert_close(actual, divergence.term(key, U, own), rtol=1e-13, atol=1e-300, msg=key)
    if divergence.bregman:
        torch.testing.assert_close(scalars["dP"], U.exp() * scalars["dA"], rtol=1e-13, atol=0.0)


def test_the_compiled_list_is_the_python_list() -> None:
    assert divergence_names() == COMPILED


@every_loss
@pytest.mark.parametrize("loss_type", COMPILED)
def test_gradcheck(impl: Implementation, loss_type: str) -> None:
    gen = torch.Generator().manual_seed(0)
    policy = torch.randn(2, 3, generator=gen, dtype=torch.float64).to(impl.device).requires_grad_()
    ref = torch.randn(2, 3, generator=gen, dtype=torch.float64).to(impl.device)
    backend = "eager" if impl.backend == "eager" else "auto"
    for reduction in ("none", "mean", "sum"):

        def f(p: torch.Tensor, reduction: str = reduction) -> torch.Tensor:
            return dil_loss(p[0], p[1], ref[0], ref[1], loss_type=loss_type, reduction=reduction, backend=backend)[0]

        assert torch.autograd.gradcheck(f, (policy,))


@every_loss
@pytest.mark.parametrize("loss_type", COMPILED)
@pytest.mark.parametrize("u", [-700.0, -90.0, 90.0, 700.0])
def test_extreme_log_ratios_never_give_nan(impl: Implementation, loss_type: str, u: float) -> None:
    backend = "eager" if impl.backend == "eager" else "auto"
    for u_w, u_l in ((u, -u), (-u, u), (u, 0.0), (0.0, u)):
        p = torch.tensor([[u_w], [u_l]], device=impl.device, requires_grad=True)
        zero = torch.zeros(1, device=impl.device)
        losses, _, _ = dil_loss(p[0], p[1], zero, zero, loss_type=loss_type, backend=backend)
        (grad,) = torch.autograd.grad(losses.sum(), p)
        assert not losses.isnan().any()
        assert not grad.isnan().any()


def test_a_registered_divergence_works_everywhere() -> None:
    itakura_saito = Divergence(name="test_is", source="h = -log r", A=lambda u: -(-u).exp(), P=lambda u: 1.0 * u)
    register_divergence(itakura_saito)
    try:
        gen = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 4, 7, generator=gen, requires_grad=True)
        labels = torch.randint(0, 7, (2, 4), generator=gen)
        ref = torch.randn(2, 4, 7, generator=gen)
        out = fused_dil_loss(logits, labels, ref_logits=ref, loss_type="test_is")
        expected = (-out.chosen_rewards).exp() + out.rejected_rewards
        torch.testing.assert_close(out.losses, expected)
        out.loss.backward()
        with pytest.raises(ValueError, match="already registered"):
            register_divergence(itakura_saito)
    finally:
        del _REGISTRY["test_is"]


@pytest.mark.parametrize(
    ("A", "P", "message"),
    [
        (lambda u: u.exp(), lambda u: u.exp(), "breaks"),
        (lambda u: -u.exp(), lambda u: -0.5 * (2 * u).exp(), "convex"),
    ],
)
def test_registration_refuses_what_is_no_bregman_divergence(A, P, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_divergence(Divergence(name="wrong", source="", A=A, P=P))
    assert "wrong" not in divergence_names()
    with pytest.raises(ValueError, match="either both A and P"):
        Divergence(name="wrong", source="", A=A)


def bce_generator(r: torch.Tensor) -> torch.Tensor:
    return r * r.log() - (1 + r) * (1 + r).log()


@pytest.fixture
def registry():
    before = dict(_REGISTRY)
    yield _REGISTRY
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.parametrize(
    "h", [lambda r: (r - 1) ** 2 / 2, lambda r: r**3 / 6, lambda r: r * r.log() - r, lambda r: -r.log()]
)
@pytest.mark.filterwarnings("error")
def test_a_generator_that_does_not_cancel_is_registered_without_a_warning(registry, h) -> None:
    register_divergence(Divergence(name="from_h", source="", h=h))
    assert "from_h" in registry


def test_a_generator_that_cancels_is_registered_with_its_range(registry) -> None:
    with pytest.warns(UserWarning, match="cancels in fp64 outside log ratios of") as caught:
        register_divergence(Divergence(name="bce_of_h", source="", h=bce_generator))
    low, high = (float(x) for x in str(caught[0].message).split("[")[1].split("]")[0].split(","))
    assert low == -40.0
    assert 20.0 < high < 32.0
    u = torch.linspace(low, high, 301, dtype=torch.float64)
    for name in ("A", "P", "dP"):
        expected = get_divergence("bce").term(name, u, ())
        torch.testing.assert_close(get_divergence("bce_of_h").term(name, u, ()), expected, rtol=3e-4, atol=3e-4)


def test_registration_refuses_what_would_mislead(registry) -> None:
    def with_offset(r: torch.Tensor) -> torch.Tensor:  # P drowns in the rounding of 1e14
        return (r - 1) ** 2 / 2 + 1e14 * r

    with pytest.raises(ValueError, match="cancels in fp64 outside log ratios of"):
        register_divergence(Divergence(name="wrong", source="", h=with_offset))
    lsif = get_divergence("lsif")
    for name in ("log_A", "log_P", "log_dP"):
        wrong = Divergence(name="wrong", source="", **{"A": lsif.A, "P": lsif.P, name: lambda u: 3.0 * u})
        with pytest.raises(ValueError, match=f"{name} is not the logarithm of"):
            register_divergence(wrong)
    for pair in (lambda w, l: (w - l).mean(), lambda w, l: w - l.mean(), lambda w, l: w - l.flip(0)):
        with pytest.raises(ValueError, match="pair must be elementwise"):
            register_divergence(Divergence(name="wrong", source="", pair=pair))
    with pytest.raises(ValueError, match="a parameter must be named one of beta, power, label_smoothing, got 'tau'"):
        Parameter(name="tau", default=1.0, minimum=0.0)
    assert "wrong" not in registry


def test_registration_refuses_derivatives_that_would_not_be_used(registry) -> None:
    lsif = get_divergence("lsif")
    for given in ({"h": lambda r: (r - 1) ** 2 / 2}, {"pair": lambda w, l: (w - l).exp()}):
        for name in ("dA", "dP"):
            with pytest.raises(ValueError, match=f"it does not use {name}; leave it out"):
                Divergence(name="wrong", source="", **given, **{name: getattr(lsif, name)})
    with pytest.raises(ValueError, match="it does not use log_A; leave it out"):
        Divergence(name="wrong", source="", pair=lambda w, l: (w - l).exp(), log_A=lsif.log_A)


def test_registration_takes_divergences_alone() -> None:
    with pytest.raises(TypeError, match=r"^divergence must be a Divergence, got str$"):
        register_divergence("lsif")


def jump(u: torch.Tensor) -> torch.Tensor:
    return torch.where(u > 1.7, 0.05, 0.0).to(u.dtype)


@pytest.mark.parametrize(
    "given",
    [
        {"A": lambda u: u.exp() + jump(u), "P": lambda u: 0.5 * (2 * u).exp()},
        {"A": lambda u: u.exp(), "P": lambda u: 0.5 * (2 * u).exp() - jump(u)},
        {"A": lambda u: u.exp() + jump(u), "P": lambda u: 0.5 * (2 * u).exp(), "dA": lambda u: u.exp()},
        {"pair": lambda w, l: (l - w).exp() + jump(w)},
        {"pair": lambda w, l: (l - w).exp() + jump(l)},
    ],
)
def test_registration_refuses_what_jumps(registry, given) -> None:
    with pytest.raises(ValueError, match=r"jumps near a log ratio of 1\.7"):
        register_divergence(Divergence(name="wrong", source="", **given))
    assert "wrong" not in registry


def test_registration_takes_kinks(registry) -> None:
    register_divergence(Divergence(name="kinked", source="", pair=lambda w, l: (1.0 - (w - l)).relu()))
    bent = lambda u: torch.where(u > 1.0, 3.0 * u - 2.0, u)  # noqa: E731  A' is 1, then 3
    P = lambda u: torch.where(u > 1.0, 3.0 * u.exp() - 2.0 * torch.e, u.exp())  # noqa: E731
    register_divergence(Divergence(name="bent", source="", A=bent, P=P))
    assert {"kinked", "bent"} <= set(registry)


@pytest.mark.parametrize(
    "given",
    [
        {"A": lambda u: u.exp_(), "P": lambda u: 0.5 * (2 * u).exp()},
        {"A": lambda u: u.exp(), "P": lambda u: 0.5 * u.mul_(2).exp()},
        {"A": lambda u: u.exp(), "P": lambda u: 0.5 * (2 * u).exp(), "dP": lambda u: u.mul_(2).exp()},
        {"h": lambda r: r.sub_(1) ** 2 / 2},
        {"pair": lambda w, l: l.sub_(w).exp()},
    ],
)
def test_registration_refuses_what_changes_its_argument(registry, given) -> None:
    with pytest.raises(ValueError, match="changes its argument in place"):
        register_divergence(Divergence(name="wrong", source="", **given))
    assert "wrong" not in registry


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ({"name": 3, "h": torch.log}, TypeError, "the name of a divergence must be text, got 3"),
        ({"name": "", "h": torch.log}, TypeError, "the name of a divergence must be text, got ''"),
        ({"h": 3}, TypeError, "h must be a function, got 3"),
        ({"h": lambda r: 1.0}, ValueError, r"h must return a tensor of the shape of its argument, \[3\], got a float"),
        ({"A": torch.sum, "P": torch.exp}, ValueError, r"A must return a tensor of the shape .*, \[3\], got \[\]"),
        ({"pair": lambda w, l: 0.0}, ValueError, "pair must return a tensor of the shape"),
        ({"pair": lambda w, l: (w - l).detach()}, ValueError, "pair has no gradient"),
        ({"pair": lambda w, l: (w - l).float()}, ValueError, r"pair returns torch\.float32 of float64"),
        ({"A": lambda u: u.exp().float(), "P": torch.exp}, ValueError, r"A returns torch\.float32 of float64"),
    ],
    ids=[
        "name",
        "no name",
        "no function",
        "a number",
        "a sum",
        "a number of pairs",
        "no gradient",
        "fp32",
        "fp32 of A",
    ],
)
def test_registration_refuses_what_is_no_loss(registry, given, error, problem) -> None:
    with pytest.raises(error, match=problem):
        register_divergence(Divergence(**{"name": "wrong", "source": "", **given}))
    assert "wrong" not in registry


@pytest.mark.parametrize("function", [dil_loss, fused_dil_loss])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"loss_type": "dpo", "beta": 0.1},
        {"loss_type": "power", "power": 0.5},
        {"loss_type": "exo_pair", "label_smoothing": 0.1},
        {"nll_weight": 0.5},
        {"max_log_ratio": 2.0},
        {"chosen_weight": 2.0},
        {"rejected_weight": 2.0},
        {"non_negative": 0.5, "reduction": "mean"},
    ],
)
def test_options_that_are_tensors_are_refused(function, options) -> None:
    name = next(reversed([key for key in options if key not in ("loss_type", "reduction")]))
    with_tensor = options | {name: torch.tensor(options[name], requires_grad=True)}
    ones = torch.ones(2, requires_grad=True)
    logits, labels = torch.randn(4, 3, 5, requires_grad=True), torch.ones(4, 3, dtype=torch.int64)
    arguments = (ones, ones, ones, ones) if function is dil_loss else (logits, labels)
    named = {} if function is dil_loss else {"ref_logits": logits.detach()}
    function(*arguments, **named, **options)
    with pytest.raises(TypeError, match=f"{name} must be a number, got a Tensor"):
        function(*arguments, **named, **with_tensor)
