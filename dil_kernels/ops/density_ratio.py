"""The density-ratio loss over token log-probabilities as torch.library ops, and the autograd Function above them.

    density_ratio_fwd(token_logps, labels?, cu_seqlens?, ref_token_logps?, ref_logps?, loss_type, beta, alpha, average,
                      interleaved, mean, ignore_index, shift)
        -> (loss [], losses [B], logratios [S], logps [S], lengths [S] int32, num_pairs [] int32, coefs [S])
    density_ratio_bwd(grad_loss?, grad_losses?, grad_logratios?, grad_logps?, token_logps, labels?, cu_seqlens?,
                      lengths, num_pairs, coefs, average, interleaved, mean, ignore_index, shift) -> grad_token_logps

Sequences are rows of token_logps [S, T_out], or segments of a packed [N_out] delimited by cu_seqlens [S + 1]. A token
counts where its label (shifted by one if `shift`) is not ignore_index; every token does without labels. Pair i is
sequences i and B + i, or 2i and 2i + 1 if interleaved. `coefs` is d losses / d logratio of each sequence. Both ops are
declared in csrc/ops.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dil_kernels import backends, reference
from dil_kernels.ops import refuse_double_backward


def _num_sequences(token_logps: Tensor, cu_seqlens: Tensor | None) -> int:
    return token_logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_fwd(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    loss_type: str,
    beta: float,
    alpha: float,
    average: bool,
    interleaved: bool,
    mean: bool,
    ignore_index: int,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    S = _num_sequences(token_logps, cu_seqlens)
    return (
        token_logps.new_empty(()),
        token_logps.new_empty((S // 2,)),
        token_logps.new_empty((S,)),
        token_logps.new_empty((S,)),
        token_logps.new_empty((S,), dtype=torch.int32),
        token_logps.new_empty((), dtype=torch.int32),
        token_logps.new_empty((S,)),
    )


def _fake_bwd(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logratios: Tensor | None,
    grad_logps: Tensor | None,
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    num_pairs: Tensor,
    coefs: Tensor,
    average: bool,
    interleaved: bool,
    mean: bool,
    ignore_index: int,
    shift: bool,
) -> Tensor:
    return token_logps.new_empty(token_logps.shape)


if backends.load_extension() is not None:
    torch.library.register_fake("dil_kernels::density_ratio_fwd", _fake_fwd)
    torch.library.register_fake("dil_kernels::density_ratio_bwd", _fake_bwd)


class DensityRatio(torch.autograd.Function):
    """Differentiable once in the token log-probabilities, through loss, losses, log ratios and log-prob sums."""

    @staticmethod
    def forward(
        ctx: Any,
        token_logps: Tensor,
        labels: Tensor | None,
        cu_seqlens: Tensor | None,
        ref_token_logps: Tensor | None,
        ref_logps: Tensor | None,
        loss_type: str,
        beta: float,
        alpha: float,
        average: bool,
        interleaved: bool,
        mean: bool,
        ignore_index: int,
        shift: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the head of this file."""
        loss, losses, logratios, logps, lengths, num_pairs, coefs = torch.ops.dil_kernels.density_ratio_fwd(
            token_logps,
            labels,
            cu_seqlens,
            ref_token_logps,
            ref_logps,
            loss_type,
            beta,
            alpha,
            average,
            interleaved,
            mean,
            ignore_index,
            shift,
        )
        ctx.save_for_backward(token_logps, labels, cu_seqlens, lengths, num_pairs, coefs)
        ctx.mark_non_differentiable(lengths, num_pairs)
        ctx.set_materialize_grads(False)
        ctx.options = (average, interleaved, mean, ignore_index, shift)
        return loss, losses, logratios, logps, lengths, num_pairs

    @staticmethod
    def backward(
        ctx: Any,
        grad_loss: Tensor | None,
        grad_losses: Tensor | None,
        grad_logratios: Tensor | None,
        grad_logps: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        """Gradient of the token log-probs."""
        refuse_double_backward("The density-ratio loss")
        grads = (grad_loss, grad_losses, grad_logratios, grad_logps)
        given = [None if grad is None else grad.contiguous() for grad in grads]
        grad = torch.ops.dil_kernels.density_ratio_bwd(*given, *ctx.saved_tensors, *ctx.options)
        return (grad,) + (None,) * 12


def density_ratio(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    loss_type: str,
    beta: float,
    alpha: float,
    average: bool,
    interleaved: bool,
    reduction: str,
    ignore_index: int,
    shift: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], losses [B], log ratios [S], log-prob sums [S], lengths [S] and the number of pairs counted [].

    A pair with a response that has no scored token has loss 0, no gradient, and is left out of the mean. Sums and
    losses are taken in fp64 and returned in the dtype of `token_logps`.
    """
    if not compiled:
        return reference.density_ratio(
            token_logps,
            labels,
            cu_seqlens,
            ref_token_logps,
            ref_logps,
            loss_type=loss_type,
            beta=beta,
            alpha=alpha,
            average=average,
            interleaved=interleaved,
            reduction=reduction,
            ignore_index=ignore_index,
            shift=shift,
        )
    return DensityRatio.apply(
        token_logps,
        labels,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if ref_token_logps is None else ref_token_logps.to(token_logps.dtype),
        None if ref_logps is None else ref_logps.double(),
        loss_type,
        beta,
        alpha,
        average,
        interleaved,
        reduction != "sum",
        ignore_index,
        shift,
    )
