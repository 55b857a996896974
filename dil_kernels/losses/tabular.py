"""The second stage of the two-stage route in closed form, for responses that can be listed (DIL, eq. 22)."""

from __future__ import annotations

import torch
from torch import Tensor

from dil_kernels.checks import check_positive, check_tensors, has_values

__all__ = ["tabular_policy"]


def tabular_policy(ref_probs: Tensor, log_ratios: Tensor, *, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """The policy ``pi = pi_ref r^(1/beta) / Z``, which maximises ``E[log r] - beta KL(pi || pi_ref)`` (DIL, eq. 17).

    At beta = 1 with the exact ratio ``r = pi_chosen / pi_ref`` it is ``pi_ref r = pi_chosen``, and Z = 1: how far Z is
    from 1 says how far a fitted ratio is from a ratio of distributions.

    Args:
        ref_probs: [..., Y], pi_ref(y | x) over all Y responses; rows sum to 1, zeros allowed.
        log_ratios: [..., Y], fitted log r(x, y), the reward of the first stage.
        beta: weight of the KL divergence; eq. 17 has 1.

    Returns:
        pi [..., Y] and log Z [...], in the dtype of `ref_probs`. pi is 0 wherever pi_ref is, whatever the ratio; a row
        is NaN where its ratios define none: an infinite one where pi_ref is positive, or nothing but zeros.

    Raises:
        ValueError: shapes that differ, rows that are no distribution, or a beta that is not positive.
        TypeError: probabilities or log ratios that are no floating-point numbers.
    """
    check_tensors(ref_probs=ref_probs, log_ratios=log_ratios)
    for name, tensor in (("ref_probs", ref_probs), ("log_ratios", log_ratios)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
    if ref_probs.shape != log_ratios.shape:
        raise ValueError(f"log_ratios must be {list(ref_probs.shape)} as ref_probs, got {list(log_ratios.shape)}")
    check_positive("beta", beta)
    sums = ref_probs.sum(-1)
    if has_values(ref_probs) and (
        bool((ref_probs < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)
    ):
        raise ValueError("ref_probs must be distributions over the last dimension: non-negative, summing to 1")
    log_weights = ref_probs.log() + log_ratios / beta
    log_weights = torch.where((ref_probs == 0) & ~log_ratios.isnan(), -torch.inf, log_weights)
    log_Z = log_weights.logsumexp(-1)
    return (log_weights - log_Z.unsqueeze(-1)).exp().to(ref_probs.dtype), log_Z.to(ref_probs.dtype)
