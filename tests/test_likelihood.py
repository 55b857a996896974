"""nll_weight: the negative log-likelihood of the chosen responses beside any loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from implementations import Implementation, every_loss

from dil_kernels import dil_loss, fused_dil_loss


@every_loss
@pytest.mark.parametrize("unpaired", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_negative_log_likelihood_is_of_chosen_responses_that_count(
    impl: Implementation, reduction: str, unpaired: bool
) -> None:
    gen = torch.Generator().manual_seed(3)
    logits, ref = (torch.randn(6, 7, 11, generator=gen).to(impl.device) for _ in range(2))
    labels = torch.randint(0, 11, (6, 7), generator=gen)
    labels[:, :3][torch.rand(6, 3, generator=gen) < 0.5] = -100
    labels[1] = -100  # in pair 1 its chosen response, and a chosen one by itself
    sides = torch.tensor([True, True, False, True, False, True])
    options: dict[str, Any] = {"reduction": reduction, "is_chosen": sides.to(impl.device) if unpaired else None}
    x = logits.requires_grad_()
    both, plain = (
        fused_dil_loss(x, labels.to(impl.device), ref_logits=ref, backend=impl.backend, nll_weight=w, **options)
        for w in (0.4, 0.0)
    )
    logps = x.detach().cpu().double().requires_grad_()
    scored = labels[:, 1:] != -100
    of_labels = logps[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = -(of_labels * scored).sum(1) / scored.sum(1).clamp(min=1)
    counted = sides & scored.any(1) if unpaired else torch.tensor([True, False, True])
    nll = 0.4 * torch.where(counted, nll[: len(counted)], 0.0)
    expected = {"mean": nll.sum() / counted.sum(), "sum": nll.sum(), "none": nll}[reduction]
    torch.testing.assert_close((both.loss - plain.loss).cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((both.losses - plain.losses).cpu().double(), nll, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(both.loss.sum() - plain.loss.sum(), x)
    (truth,) = torch.autograd.grad(expected.sum(), logps)
    torch.testing.assert_close(grad.cpu().double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_likelihood_of_0_beside_a_loss_that_overflows(reduction: str) -> None:
    """+inf against -inf is +inf, as in every sum of losses."""
    zero, never = torch.zeros(1, dtype=torch.float64), torch.full((1,), -math.inf, dtype=torch.float64)
    options: dict[str, Any] = {"loss_type": "is", "chosen_weight": 0.0, "reduction": reduction}  # u_l alone
    for nll_weight, expected in ((0.0, -math.inf), (0.5, math.inf)):
        loss, *_ = dil_loss(never, never, zero, zero, nll_weight=nll_weight, **options)
        assert loss.item() == expected
    loss, *_ = dil_loss(never, zero.log(), zero, never, nll_weight=0.5, **options)
    assert loss.isnan()  # of a log ratio that is none
