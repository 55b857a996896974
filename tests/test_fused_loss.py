"""fused_dil_loss: token vectors checked by hand, every option against the fp64 oracle, gradients through every
output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation, every_implementation
from problems import IGNORE, boundaries

from dil_kernels import dil_loss, fused_dil_loss, sequence_logps
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.losses import FusedLossOptions, LossParameters, divergence_names, get_divergence
from dil_kernels.losses.options import SequenceOptions
from dil_kernels.ops.density_ratio import density_ratio
from dil_kernels.options import ScoringOptions

pytestmark = pytest.mark.usefixtures("nan_poisoned")

# Log-probs of two sequences under policy and reference: chosen with 4 tokens, rejected with 5.
PW, RW = [-1.5, -0.25, -2.0, -0.5], [-1.25, -0.5, -2.25, -0.75]
PL, RL = [-0.75, -3.0, -1.0, -2.5, -0.125], [-0.5, -2.0, -1.25, -1.5, -0.25]


def two_way_logits(logps: list[float], length: int) -> torch.Tensor:
    """[length, 2] logits whose entry 0 has the given log-probs."""
    p = torch.tensor(logps + [-1.0] * (length - len(logps)), dtype=torch.float64)
    return torch.stack([p, torch.log1p(-p.exp())], -1)


@every_implementation
@pytest.mark.parametrize(
    ("average", "loss_type", "loss", "grads"),
    [
        (False, "lsif", -1.6369623977721236, None),
        (False, "ukl", -0.34664503315507154, None),
        (True, "lsif", -0.89696517669631896, (-0.28328711326670658, 0.094473310548202941)),
        (True, "bce", 1.1557222994570091, None),
    ],
)
def test_published_token_vectors(impl: Implementation, average: bool, loss_type: str, loss: float, grads) -> None:
    dtype = torch.float32 if impl.backend == "triton" else torch.float64
    policy = torch.stack([two_way_logits(PW, 5), two_way_logits(PL, 5)]).to(impl.device, dtype).requires_grad_()
    ref = torch.stack([two_way_logits(RW, 5), two_way_logits(RL, 5)]).to(impl.device, dtype)
    labels = torch.zeros(2, 5, dtype=torch.int64, device=impl.device)
    labels[0, 4] = IGNORE
    out = fused_dil_loss(
        policy, labels, ref_logits=ref, loss_type=loss_type, average_log_prob=average, shift=False, backend=impl.backend
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(out.loss.item(), loss, rtol=tolerance, atol=tolerance)
    assert out.chosen_lengths.tolist() == [4]
    assert out.rejected_lengths.tolist() == [5]
    torch.testing.assert_close(out.chosen_logps.item(), sum(PW), rtol=tolerance, atol=tolerance)
    u = (0.125, -0.375) if average else (0.5, -1.875)
    torch.testing.assert_close(
        (out.chosen_rewards.item(), out.rejected_rewards.item()), u, rtol=tolerance, atol=tolerance
    )
    if grads is not None:
        (grad,) = torch.autograd.grad(out.loss, policy)
        per_token = grad.sum(-1).abs().max()  # rows sum to zero; entry 0 carries g (1 - p)
        assert per_token < 1e-6
        expected = torch.zeros(2, 5, dtype=torch.float64)
        expected[0, :4], expected[1] = grads[0], grads[1]
        factor = 1 - policy.detach().double().cpu()[..., 0].exp()
        torch.testing.assert_close(grad[..., 0].double().cpu(), expected * factor, rtol=1e-5, atol=1e-7)


def oracle_inputs(data: st.DataObject, packed: bool):
    """A batch of up to three pairs or some unpaired responses, padded or packed, with some all-masked ones."""
    unpaired = data.draw(st.booleans())
    S = data.draw(st.integers(1, 5)) if unpaired else 2 * data.draw(st.integers(1, 3))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    V = data.draw(st.sampled_from((2, 17, 130)))
    shift = data.draw(st.booleans())
    cu_seqlens = None
    shape: tuple[int, ...]
    if packed:
        lengths = data.draw(boundaries(num_sequences=S))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        shape = (sum(lengths),)
    else:
        shape = (S, data.draw(st.integers(1 + shift, 6)))
    labels = torch.randint(0, V, shape, generator=gen)
    labels[torch.rand(shape, generator=gen) < data.draw(st.sampled_from((0.0, 0.4, 0.9, 1.0)))] = IGNORE
    logits, ref_logits = (torch.randn(*shape, V, generator=gen) for _ in range(2))
    is_chosen = torch.rand(S, generator=gen) < 0.5 if unpaired else None
    return logits, ref_logits, labels, cu_seqlens, shift, is_chosen


def loss_options(data: st.DataObject, paired: bool) -> dict[str, Any]:
    """Every option of a loss."""
    names = [name for name in divergence_names() if paired or get_divergence(name).separable]
    loss_type = data.draw(st.sampled_from(names))
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "reduction": data.draw(st.sampled_from(("mean", "sum", "none"))),
        "max_log_ratio": data.draw(st.sampled_from((None, 0.7, 5.0))),
    }
    options["nll_weight"] = data.draw(st.sampled_from((0.0, 0.0, 0.4)))
    divergence = get_divergence(loss_type)
    values = {"beta": (None, 0.1, 0.7), "power": (None, -0.5, 0.0, 0.9), "label_smoothing": (None, 0.1, 0.3)}
    options |= {own.name: data.draw(st.sampled_from(values[own.name])) for own in divergence.parameters}
    if not divergence.separable:
        return options
    if divergence.bregman:
        options["alpha"] = data.draw(st.sampled_from((0.0, 0.5)))
    for weight in ("chosen_weight", "rejected_weight"):
        options[weight] = data.draw(st.sampled_from((1.0, 0.0, 2.5)))
    if options["reduction"] == "mean" and divergence.bregman and loss_type != "is":
        options["non_negative"] = data.draw(st.sampled_from((None, 0.2, 0.8)))
    return options


@every_implementation
@given(data=st.data())
@settings(max_examples=60)
def test_every_option_matches_the_oracle(impl: Implementation, data: st.DataObject) -> None:
    inputs = oracle_inputs(data, packed=data.draw(st.booleans()))
    logits, ref_logits, labels, cu_seqlens, shift, is_chosen = inputs
    options = loss_options(data, paired=is_chosen is None)
    options |= {"average_log_prob": data.draw(st.booleans()), "shift": shift}
    if is_chosen is None:
        options["pair_layout"] = data.draw(st.sampled_from(("concatenated", "interleaved")))
    with_sums = data.draw(st.booleans())
    results = {}
    for name, device, backend, dtype in (
        ("truth", "cpu", "eager", torch.float64),
        ("actual", impl.device, impl.backend, torch.float32),
    ):
        x = logits.to(device, dtype).requires_grad_()
        ref = {"ref_logits": ref_logits.to(device, dtype)}
        cu = None if cu_seqlens is None else cu_seqlens.to(device)
        if with_sums:
            sums = sequence_logps(ref_logits.double(), labels, cu_seqlens=cu_seqlens, shift=shift, backend="eager")
            ref = {"ref_logps": sums.to(device, dtype)}
            if is_chosen is None:
                halves = (sums[0::2], sums[1::2]) if options["pair_layout"] == "interleaved" else sums.chunk(2)
                names = ("ref_chosen_logps", "ref_rejected_logps")
                ref = {name: half.to(device, dtype) for name, half in zip(names, halves, strict=True)}
        sides = None if is_chosen is None else is_chosen.to(device)
        out = fused_dil_loss(x, labels.to(device), cu_seqlens=cu, backend=backend, is_chosen=sides, **ref, **options)
        # A gradient through every differentiable output at once, different for each entry.
        weight = torch.arange(1, out.losses.numel() + 1, device=device, dtype=dtype)
        total = (out.losses * weight).sum() + 0.3 * out.loss.sum() + 0.1 * (out.chosen_logps * weight).sum()
        total = total + 0.2 * (out.rejected_rewards * weight).sum()
        (grad,) = torch.autograd.grad(total, x)
        results[name] = [*(field.detach().cpu().double() for field in out), grad.cpu().double()]
    for field, truth, actual in zip((*out._fields, "grad"), results["truth"], results["actual"], strict=True):
        scale = max(truth.abs().max().item(), 1.0)
        torch.testing.assert_close(actual, truth, rtol=1e-5, atol=2e-6 * scale, msg=lambda m, f=field: f"{f}: {m}")


@every_implementation
def test_left_out_pairs(impl: Implementation) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 11, generator=gen).to(impl.device).requires_grad_()
    ref = torch.randn(6, 5, 11, generator=gen).to(impl.device)
    labels = torch.randint(0, 11, (6, 5), generator=gen).to(impl.device)
    labels[1] = IGNORE  # pair 1: its chosen response has no scored token
    out = fused_dil_loss(logits, labels, ref_logits=ref, backend=impl.backend)
    torch.testing.assert_close(out.loss, (out.losses[0] + out.losses[2]) / 2)
    assert out.losses[1] == 0.0
    assert out.chosen_rewards[1] == 0.0
    assert out.chosen_lengths.tolist() == [4, 0, 4]
    out.loss.backward()
    assert logits.grad is not None
    assert logits.grad[[1, 4]].abs().max() == 0.0
    assert logits.grad[[0, 2, 3, 5]].abs().amax((1, 2)).min() > 0.0


@every_implementation
def test_a_batch_without_scored_tokens_is_a_differentiable_zero(impl: Implementation) -> None:
    logits = torch.randn(2, 5, 11, device=impl.device, requires_grad=True)
    labels = torch.full((2, 5), IGNORE, device=impl.device)
    out = fused_dil_loss(logits, labels, ref_logits=torch.randn_like(logits), backend=impl.backend)
    assert out.loss == 0.0
    out.loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every_implementation
def test_temperature_applies_to_both_models(impl: Implementation) -> None:
    gen = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(2, 4, 9, generator=gen).to(impl.device) for _ in range(2))
    labels = torch.randint(0, 9, (2, 4), generator=gen).to(impl.device)
    warm = fused_dil_loss(logits, labels, ref_logits=ref, temperature=2.0, backend=impl.backend)
    halved = fused_dil_loss(logits / 2, labels, ref_logits=ref / 2, backend=impl.backend)
    torch.testing.assert_close(warm.losses, halved.losses)


@every_implementation
def test_identical_policy_and_reference_in_bf16(impl: Implementation) -> None:
    tokens = 300 if impl == Implementation("triton", "cpu") else 2000  # the interpreter takes 10 ms a row
    logits = torch.randn(2, tokens, 50, generator=torch.Generator().manual_seed(0)).bfloat16().to(impl.device)
    labels = torch.randint(0, 50, (2, tokens), generator=torch.Generator().manual_seed(1)).to(impl.device)
    out = fused_dil_loss(logits, labels, ref_logits=logits, average_log_prob=False, backend=impl.backend)
    assert out.chosen_rewards.tolist() == [0.0]
    assert out.loss == -0.5


def test_the_loss_is_deterministic_and_in_fp64_inside() -> None:
    # 1e8 + 1 is lost in fp32; the log ratio must not lose it.
    token_logps = torch.tensor([[1e8, 1.0, -1e8], [0.0, 0.0, 0.0]])
    ref = torch.zeros_like(token_logps)
    options = SequenceOptions(average=False, interleaved=False, mean=True, ignore_index=IGNORE, shift=False)
    for compiled in (True, False):
        out = density_ratio(
            token_logps,
            None,
            None,
            ref,
            None,
            None,
            LossParameters("ukl"),
            options,
            compiled=compiled,
        )
        assert out[2].tolist() == [1.0, 0.0]


@every_implementation
def test_policy_and_reference_of_different_precision(impl: Implementation) -> None:
    gen = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(2, 6, 40, generator=gen) for _ in range(2))
    labels = torch.randint(0, 40, (2, 6), generator=gen).to(impl.device)
    truth = fused_dil_loss(logits.bfloat16().double(), labels.cpu(), ref_logits=ref.double(), backend="eager").loss
    policy = logits.bfloat16().to(impl.device)
    mixed = fused_dil_loss(policy, labels, ref_logits=ref.to(impl.device), backend=impl.backend).loss
    sums = sequence_logps(ref.to(impl.device), labels, backend=impl.backend).double()
    from_sums = fused_dil_loss(
        policy, labels, ref_chosen_logps=sums[:1], ref_rejected_logps=sums[1:], backend=impl.backend
    ).loss
    torch.testing.assert_close(mixed.cpu().double(), truth, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(from_sums.cpu().double(), truth, rtol=1e-5, atol=0.0)


@every_implementation
def test_an_overflowed_loss_leaves_the_other_gradients_finite(impl: Implementation) -> None:
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)).to(impl.device).requires_grad_()
    labels = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1)).to(impl.device)
    zero, low = (torch.tensor(v, device=impl.device) for v in ([0.0, 0.0], [-900.0, 0.0]))
    out = fused_dil_loss(
        logits, labels, ref_chosen_logps=zero, ref_rejected_logps=low, average_log_prob=False, backend=impl.backend
    )
    assert out.losses[0] == torch.inf
    for field in (out.rejected_rewards, out.chosen_logps):
        (grad,) = torch.autograd.grad(field.sum(), logits, retain_graph=True)
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_dil_loss_of_mixed_precision(backend: str) -> None:
    one, wide = torch.ones(3), torch.full((3,), 1.0 + 1e-12, dtype=torch.float64)
    for policy, ref, expected in ((one, wide, -1e-12), (wide, one, 1e-12)):
        losses, chosen, _ = dil_loss(policy, one, ref, one, loss_type="ukl", backend=backend)
        assert losses.dtype == policy.dtype
        torch.testing.assert_close(chosen.double(), torch.full((3,), expected).double(), rtol=1e-3, atol=0.0)


@every_implementation
def test_losses_that_overflow_in_both_directions_sum_to_inf(impl: Implementation) -> None:
    """Also where the larger one, before it is rounded to fp32, is the negative one."""
    backend = "eager" if impl.backend == "eager" else "auto"
    u_w, u_l = torch.tensor([[200.0, 0.0], [0.0, 60.0]], device=impl.device)
    zero = torch.zeros(2, device=impl.device)
    losses, *_ = dil_loss(u_w, u_l, zero, zero, backend=backend)
    assert losses.tolist() == [-torch.inf, torch.inf]
    for reduction in ("sum", "mean"):
        assert dil_loss(u_w, u_l, zero, zero, reduction=reduction, backend=backend)[0] == torch.inf
    options, scoring = FusedLossOptions(average_log_prob=False), ScoringOptions(shift=False)
    out = loss_of_token_logps(
        torch.cat([u_w, u_l])[:, None], torch.zeros(4, 1, dtype=torch.int64, device=impl.device), None, None,
        torch.zeros(4, device=impl.device), options, scoring, backend=impl.backend,
    )  # fmt: skip
    assert out.loss == out.share(out.counts) == torch.inf


@every_implementation
def test_a_non_negative_correction_ignores_terms_of_weight_0(impl: Implementation) -> None:
    u = torch.tensor([[0.1], [400.0]], device=impl.device, dtype=torch.float64)
    zero = torch.zeros(1, device=impl.device, dtype=torch.float64)
    backend = "eager" if impl.backend == "eager" else "auto"
    for options in ({"alpha": 1.0}, {"alpha": 0.6, "rejected_weight": 0.0}, {"alpha": 0.5, "rejected_weight": 0.0}):
        plain, *_ = dil_loss(u[0], u[1], zero, zero, reduction="mean", backend=backend, **options)
        loss, *_ = dil_loss(u[0], u[1], zero, zero, reduction="mean", backend=backend, non_negative=0.5, **options)
        assert loss == plain
    for u_w, chosen_weight in ((0.1, 1.0), (400.0, 0.0)):  # the rest is negative, or the rejected term alone
        w = torch.full_like(zero, u_w)
        options = {"alpha": 0.2, "chosen_weight": chosen_weight, "rejected_weight": 1.0 - chosen_weight}
        loss, *_ = dil_loss(w, zero, zero, zero, reduction="mean", backend=backend, non_negative=0.5, **options)
        expected = 0.4 if chosen_weight == 0.0 else -math.exp(0.1) + 0.25 * math.exp(0.2)
        torch.testing.assert_close(loss.item(), expected)
    huge = torch.full_like(zero, 400.0)  # (alpha - C) mean[Q(w)] is -inf: only the chosen term is left
    l = zero.clone().requires_grad_()
    loss, *_ = dil_loss(huge, l, zero, zero, reduction="mean", backend=backend, non_negative=0.5, alpha=0.2)
    (grad,) = torch.autograd.grad(loss, l)
    assert loss == torch.inf
    assert grad == 0
    nan = torch.full_like(zero, torch.nan)
    assert dil_loss(zero, nan, zero, zero, reduction="mean", backend=backend, non_negative=0.5)[0].isnan()


@every_implementation
def test_the_non_negative_correction_leaves_the_chosen_term_alone(impl: Implementation) -> None:
    for rejected, kept in ((3.0, True), (-3.0, False)):
        u = torch.tensor([[0.5, 1.0], [rejected, rejected - 1]], device=impl.device, requires_grad=True)
        zero = torch.zeros(2, device=impl.device)
        backend = "eager" if impl.backend == "eager" else "auto"
        loss, *_ = dil_loss(u[0], u[1], zero, zero, non_negative=0.5, reduction="mean", backend=backend)
        (grad,) = torch.autograd.grad(loss, u)
        w, l = u.detach()
        constant = 0.0 if kept else 0.5
        expected = (-w.exp() + constant * (2 * w).exp() / 2).mean() + kept * ((2 * l).exp() / 2).mean()
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(grad[0], (-w.exp() + constant * (2 * w).exp()) / 2)
        torch.testing.assert_close(grad[1], kept * (2 * l).exp() / 2)
