"""fused_dil_loss of responses that do not come in pairs, and of pairs beside them: means, shares, registered losses."""

from __future__ import annotations

import pytest
import torch
from implementations import Implementation, every_implementation
from problems import IGNORE

from dil_kernels import Divergence, fused_dil_loss, register_divergence, unpaired_dil_loss
from dil_kernels.losses.registry import _REGISTRY

pytestmark = pytest.mark.usefixtures("nan_poisoned")


def unpaired_batch(device: str):
    """5 responses of which the second has no scored token; chosen, chosen, rejected, chosen, rejected."""
    gen = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(5, 6, 11, generator=gen).to(device) for _ in range(2))
    labels = torch.randint(0, 11, (5, 6), generator=gen).to(device)
    labels[1] = IGNORE
    return logits.requires_grad_(), ref, labels, torch.tensor([True, True, False, True, False], device=device)


@every_implementation
def test_unpaired_responses(impl: Implementation) -> None:
    logits, ref, labels, is_chosen = unpaired_batch(impl.device)
    out = fused_dil_loss(logits, labels, ref_logits=ref, is_chosen=is_chosen, alpha=0.25, backend=impl.backend)
    u = (out.chosen_rewards + out.rejected_rewards).detach()
    chosen, rejected = -u.exp() + 0.25 * (2 * u).exp() / 2, 0.75 * (2 * u).exp() / 2
    expected = torch.where(is_chosen, chosen, rejected)
    expected[1] = 0.0
    torch.testing.assert_close(out.losses, expected)
    torch.testing.assert_close(out.loss, (expected[0] + expected[3]) / 2 + (expected[2] + expected[4]) / 2)
    assert out.counts.tolist() == [2, 2]
    assert out.chosen_lengths.tolist() == [5, 0, 0, 5, 0]
    assert out.rejected_lengths.tolist() == [0, 0, 5, 0, 5]
    for field in (out.chosen_logps, out.chosen_rewards):
        assert (field[[1, 2, 4]] == 0).all()
        assert (field[[0, 3]] != 0).all()
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad[1].abs().max() == 0
    assert grad[[0, 2, 3, 4]].abs().amax((1, 2)).min() > 0


@every_implementation
def test_unpaired_responses_of_pairs_have_the_mean_of_the_pairs(impl: Implementation) -> None:
    gen = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, 5, 11, generator=gen).to(impl.device) for _ in range(2))
    labels = torch.randint(0, 11, (6, 5), generator=gen).to(impl.device)
    is_chosen = torch.tensor([True] * 3 + [False] * 3, device=impl.device)
    order = torch.tensor([4, 0, 2, 5, 1, 3], device=impl.device)
    results = []
    for rows, sides in ((torch.arange(6), None), (order, is_chosen[order])):
        x = logits.clone().requires_grad_()
        for reduction in ("mean", "sum"):
            options = {"loss_type": "bce", "alpha": 0.3, "chosen_weight": 2.0, "reduction": reduction}
            loss = fused_dil_loss(
                x[rows], labels[rows], ref_logits=ref[rows], is_chosen=sides, backend=impl.backend, **options
            ).loss
            results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(results[2:], results[:2])


@every_implementation
@pytest.mark.parametrize("unpaired", [True, False])
def test_shares_of_micro_batches_add_up_exactly(impl: Implementation, unpaired: bool) -> None:
    logits, ref, labels, is_chosen = unpaired_batch(impl.device)
    if not unpaired:
        logits, ref, labels = (torch.cat([x[:1], x[:4]]) for x in (logits.detach(), ref, labels))
        # Pairs of rows 0 and 1, 2 and 3 (without a token), 3 and 4.
        logits, ref, labels = (torch.cat([x[[0, 2, 3]], x[[1, 3, 4]]]) for x in (logits, ref, labels))
        logits.requires_grad_()
    parts = ([0, 1], [2, 3, 4]) if unpaired else ([0, 3], [1, 2, 4, 5])
    options = {"loss_type": "ukl", "average_log_prob": False, "backend": impl.backend}

    def run(rows: list[int], reduction: str):
        sides = is_chosen[rows] if unpaired else None
        return fused_dil_loss(
            logits[rows], labels[rows], ref_logits=ref[rows], is_chosen=sides, reduction=reduction, **options
        )

    whole = run(list(range(logits.shape[0])), "mean")
    outputs = [run(part, "sum") for part in parts]
    counts = torch.stack([out.counts for out in outputs]).sum(0)
    assert torch.equal(counts, whole.counts)
    shares = torch.stack([out.share(counts) for out in outputs]).sum()
    torch.testing.assert_close(shares, whole.loss)
    expected, actual = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (whole.loss, shares))
    torch.testing.assert_close(actual, expected)


@every_implementation
@pytest.mark.parametrize("unpaired", [True, False])
def test_a_registered_loss_is_as_a_compiled_one(impl: Implementation, unpaired: bool) -> None:
    logits, ref, labels, is_chosen = unpaired_batch(impl.device)
    rows = slice(0, 5) if unpaired else slice(0, 4)
    x, ref, labels = logits.detach()[rows].requires_grad_(), ref[rows], labels[rows]
    results = []
    register_divergence(Divergence(name="test_lsif", source="", h=lambda r: (r - 1) ** 2 / 2))
    try:
        for loss_type in ("lsif", "test_lsif"):
            out = fused_dil_loss(
                x,
                labels,
                ref_logits=ref,
                is_chosen=is_chosen if unpaired else None,
                loss_type=loss_type,
                alpha=0.3,
                backend=impl.backend,
            )
            weights = torch.arange(1, len(out.losses) + 1, device=impl.device)
            total = (weights * out.losses).sum() + 2 * out.loss + out.rejected_rewards.sum()
            constant = (1 - out.losses.eq(0).float()) * 0.5 * (loss_type == "test_lsif")
            # A is r - 1 there, and P is (r^2 - 1) / 2.
            constant = constant * (torch.where(is_chosen, 0.3 - 2, 0.7) if unpaired else -1)
            (grad,) = torch.autograd.grad(total, x)
            results.append((out.losses.detach() + constant, *(field.detach() for field in out[2:]), grad))
    finally:
        del _REGISTRY["test_lsif"]
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("chosen", [True, False])
def test_a_non_negative_correction_does_not_jump_where_a_side_is_missing(chosen: bool) -> None:
    logps, zero = torch.full((1,), -30.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    options = {"loss_type": "power", "power": -0.5, "reduction": "mean"}  # P(-inf) is not 0
    plain, corrected = (
        unpaired_dil_loss(logps, zero, torch.tensor([chosen]), non_negative=constant, **options)[0]
        for constant in (None, 0.4)
    )
    torch.testing.assert_close(corrected, plain, rtol=0.0, atol=1e-6)
