"""Softcapping where tanh is flat: its slope against mpmath in every dtype, and which logit is the largest."""

from __future__ import annotations

import pytest
import torch
from implementations import Implementation, every_implementation
from mpmath import mp, mpf
from torch import Tensor

from dil_kernels import linear_token_logps, token_logps
from dil_kernels.functional import LogitStatistics

CAP = 4.0
# 1 - tanh^2 is 6% off in fp32 at 8, 96% at 9, and 0 from there on; in fp64 from 19 on.
STEEPNESS = (0.5, 3.0, 8.0, 9.0, 12.0, 15.0, -9.0)
OTHERS = (2.0, -1.0, 7.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEMPERATURE = 0.5


def exact_grads(x: Tensor, label: int) -> Tensor:
    """d logp / dx of a row of logits, by mpmath."""
    u = [mpf(v) / CAP for v in x.tolist()]
    e = [mp.exp(CAP * mp.tanh(v) / TEMPERATURE) for v in u]
    p = [v / sum(e) for v in e]
    grads = [((i == label) - p[i]) * mp.sech(u[i]) ** 2 / TEMPERATURE for i in range(len(u))]
    return torch.tensor([float(g) for g in grads], dtype=torch.float64)


def skip_what_the_backend_lacks(impl: Implementation, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and (impl.backend == "triton" or impl.device == "cuda"):
        pytest.skip("fp64 logits are for the CPU")


def as_logits(x: Tensor, label: int, exact: Tensor, impl: Implementation) -> Tensor:
    """The gradient of a row of logits, each apart: scaled, so that it is in the range of fp16."""
    grads = []
    for i in range(len(x)):
        logits = x.detach().clone()[None].to(impl.device).requires_grad_()
        logps = token_logps(
            logits,
            torch.tensor([label], device=impl.device),
            shift=False,
            final_logit_softcapping=CAP,
            temperature=TEMPERATURE,
            backend=impl.backend,
        )
        scale = 1.0 / exact[i].item()
        (grad,) = torch.autograd.grad(logps, logits, torch.full_like(logps, scale))
        grads.append(grad[0, i].double().cpu() / scale)
    return torch.stack(grads)


def through_the_head(x: Tensor, label: int, exact: Tensor, impl: Implementation, stash_bytes: int | None) -> Tensor:
    """d bias of a head whose product is 0, likewise."""
    grads = []
    hidden, weight = torch.zeros(1, 1, 1, dtype=x.dtype), torch.ones(len(x), 1, dtype=x.dtype)
    for i in range(len(x)):
        bias = x.detach().clone().to(impl.device).requires_grad_()
        logps = linear_token_logps(
            hidden.to(impl.device),
            weight.to(impl.device),
            torch.tensor([[label]], device=impl.device),
            lm_head_bias=bias,
            shift=False,
            final_logit_softcapping=CAP,
            temperature=TEMPERATURE,
            stash_bytes=stash_bytes,
            backend=impl.backend,
        )
        scale = 1.0 / exact[i].item()
        (grad,) = torch.autograd.grad(logps, bias, torch.full_like(logps, scale))
        grads.append(grad[i].double().cpu() / scale)
    return torch.stack(grads)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steepness", STEEPNESS)
def test_slope(impl: Implementation, dtype: torch.dtype, steepness: float) -> None:
    skip_what_the_backend_lacks(impl, dtype)
    x = torch.tensor([*OTHERS, steepness * CAP], dtype=dtype)  # exact in every dtype
    # An exponent of 30 loses that many units of the last place; h is kept in the dtype of the weight.
    tolerance = {torch.float64: 1e-13, torch.float32: 4e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for label in (1, 3):
        exact = exact_grads(x, label)
        torch.testing.assert_close(as_logits(x, label, exact, impl), exact, rtol=tolerance, atol=0.0)
        if dtype == torch.float16 and exact.abs().min() < 6e-5:
            continue  # h, which is written before the upstream gradient is known, is below the range of fp16
        for stash_bytes in (0, None):
            found = through_the_head(x, label, exact, impl, stash_bytes)
            torch.testing.assert_close(found, exact, rtol=tolerance, atol=0.0)


def statistics_of(x: Tensor, label: int, impl: Implementation, head: bool, **options: float) -> LogitStatistics:
    common = {"shift": False, "return_statistics": True, "backend": impl.backend, **options}
    x, y = x.to(impl.device), torch.tensor([label], device=impl.device)
    if not head:
        return token_logps(x[None], y, **common)[1]
    hidden, weight = x.new_zeros(1, 1), x.new_ones(len(x), 1)
    return linear_token_logps(hidden, weight, y, lm_head_bias=x, **common)[1]


@every_implementation
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [5, 3000])
def test_top1_hit_where_tanh_saturates(impl: Implementation, head: bool, dtype: torch.dtype, V: int) -> None:
    skip_what_the_backend_lacks(impl, dtype)
    x = torch.full((V,), -100.0, dtype=dtype)
    x[0], x[1], x[V - 1], x[V // 2] = 80.0, 96.0, 96.0, -torch.inf  # 20 and more times the cap: tanh is 1 in fp64, too
    hits = {label: statistics_of(x, label, impl, head, final_logit_softcapping=CAP).top1_hit.item() for label in (0, 1)}
    assert hits == {0: False, 1: True}
    x[V - 1] = 112.0
    assert not statistics_of(x, 1, impl, head, final_logit_softcapping=CAP).top1_hit.item()
    assert statistics_of(x, V - 1, impl, head, final_logit_softcapping=CAP).top1_hit.item()


@every_implementation
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_logit_is_finite_where_the_mean_is(impl: Implementation, head: bool, dtype: torch.dtype) -> None:
    skip_what_the_backend_lacks(impl, dtype)
    largest = torch.finfo(dtype).max
    for values, temperature in (([0.75], 1.0), ([0.75, 0.5], 1.0), ([0.75, -0.75, 0.001], 0.01), ([0.75], 1e20)):
        x = largest * torch.tensor(values, dtype=torch.float64).repeat(1000)
        exact = sum(map(mpf, x.tolist())) / len(x) / mpf(temperature)
        measured = statistics_of(x.to(dtype), 0, impl, head, temperature=temperature)
        expected = torch.tensor([float(exact)], dtype=torch.float64)
        rounded = largest / 1000 / temperature * (1e-12 if dtype == torch.float64 else 1e-5)  # of what cancels
        torch.testing.assert_close(measured.mean_logit.double().cpu(), expected, rtol=1e-6, atol=rounded)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_and_a_small_temperature(impl: Implementation, dtype: torch.dtype) -> None:
    skip_what_the_backend_lacks(impl, dtype)
    large = 1e38 if dtype == torch.float32 else 1e307
    x = torch.tensor([[large, large, -large, 0.5 * large]], dtype=dtype, device=impl.device).requires_grad_()
    logps = token_logps(x, torch.tensor([1], device=impl.device), shift=False, temperature=0.01, backend=impl.backend)
    (grad,) = torch.autograd.grad(logps, x)
    torch.testing.assert_close(logps, torch.full_like(logps, -0.6931471805599453))
    torch.testing.assert_close(grad, torch.tensor([[-50.0, 50.0, 0.0, 0.0]], dtype=dtype, device=impl.device))
