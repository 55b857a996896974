"""The density-ratio loss over token log-probabilities as torch.library ops, and the autograd Function above them.

    density_ratio_fwd(token_logps, labels?, cu_seqlens?, ref_token_logps?, ref_logps?, is_chosen?, loss_type, parameter,
                      alpha, max_log_ratio, chosen_weight, rejected_weight, average, interleaved, mean, ignore_index,
                      shift)
        -> (loss [], losses [B] or [S], logratios [S], logps [S], lengths [S] int32, counts [2] int32, coefs [S])
    density_ratio_bwd(grad_loss?, grad_losses?, grad_logratios?, grad_logps?, token_logps, labels?, cu_seqlens?,
                      is_chosen?, lengths, counts, coefs, average, interleaved, mean, ignore_index, shift)
        -> grad_token_logps

Sequences are rows of token_logps [S, T_out], or segments of a packed [N_out] delimited by cu_seqlens [S + 1]. A token
counts where its label (shifted by one if `shift`) is not ignore_index; every token does without labels. Pair i is
sequences i and B + i, or 2i and 2i + 1 if interleaved; with `is_chosen` [S] there are no pairs, and each sequence has a
loss of its own. `counts` is what the mean divides by: the pairs, twice, or the chosen and the rejected sequences.
`coefs` is d losses / d logratio of each sequence. loss_type "none" sums log ratios and leaves every loss 0. Both ops
are declared in csrc/ops.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dil_kernels import backends, reference
from dil_kernels.losses.divergences import LossParameters
from dil_kernels.ops import needs_function, refuse_double_backward


def _num_sequences(token_logps: Tensor, cu_seqlens: Tensor | None) -> int:
    return token_logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_fwd(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    is_chosen: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    S = _num_sequences(token_logps, cu_seqlens)
    return (
        token_logps.new_empty(()),
        token_logps.new_empty((S if is_chosen is not None else S // 2,)),
        token_logps.new_empty((S,)),
        token_logps.new_empty((S,)),
        token_logps.new_empty((S,), dtype=torch.int32),
        token_logps.new_empty((2,), dtype=torch.int32),
        token_logps.new_empty((S,)),
    )


def _fake_bwd(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logratios: Tensor | None,
    grad_logps: Tensor | None,
    token_logps: Tensor,
    *saved: Any,
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
        is_chosen: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the head of this file."""
        loss, losses, logratios, logps, lengths, counts, coefs = torch.ops.dil_kernels.density_ratio_fwd(
            token_logps, labels, cu_seqlens, ref_token_logps, ref_logps, is_chosen, *options
        )
        ctx.save_for_backward(token_logps, labels, cu_seqlens, is_chosen, lengths, counts, coefs)
        ctx.mark_non_differentiable(lengths, counts)
        ctx.set_materialize_grads(False)
        ctx.num_inputs = 6 + len(options)
        ctx.options = options[-5:]  # average, interleaved, mean, ignore_index, shift
        return loss, losses, logratios, logps, lengths, counts

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
        return (grad,) + (None,) * (ctx.num_inputs - 1)


def density_ratio(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    is_chosen: Tensor | None,
    parameters: LossParameters,
    *,
    average: bool,
    interleaved: bool,
    mean: bool,
    ignore_index: int,
    shift: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], losses [B] or [S], log ratios [S], log-prob sums [S], lengths [S] and counts [2].

    An item (a pair, or a sequence with `is_chosen`) with a response that has no scored token has loss 0, no gradient,
    and is left out of the mean. Sums and losses are taken in fp64 and returned in the dtype of `token_logps`. With
    `compiled`, the extension does all of it for its own losses; for others it sums, and torch takes the loss.
    """
    if not compiled:
        return reference.density_ratio(
            token_logps,
            labels,
            cu_seqlens,
            ref_token_logps,
            ref_logps,
            is_chosen,
            parameters,
            average=average,
            interleaved=interleaved,
            mean=mean,
            ignore_index=ignore_index,
            shift=shift,
        )
    known = parameters.loss_type in backends.compiled_losses()
    inputs = (
        token_logps.contiguous(),
        labels,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if ref_token_logps is None else ref_token_logps.to(token_logps.dtype).contiguous(),
        None if ref_logps is None else ref_logps.double().contiguous(),
        None if is_chosen is None else is_chosen.contiguous(),
        parameters.loss_type if known else "none",
        parameters.parameter,
        parameters.alpha,
        parameters.max_log_ratio,
        parameters.chosen_weight,
        parameters.rejected_weight,
        average,
        interleaved,
        mean,
        ignore_index,
        shift,
    )
    if needs_function(token_logps):
        results = DensityRatio.apply(*inputs)
    else:
        results = torch.ops.dil_kernels.density_ratio_fwd(*inputs)[:-1]
    loss, losses, logratios, logps, lengths, counts = results
    if not known:
        wide = logratios.to(reference.accumulation_dtype(logratios.device))
        # NaN log ratios are those of invalid boundaries, which must not pass for responses without a token.
        has_tokens = (lengths > 0) | wide.isnan()
        loss, losses, counts = reference.losses_of_logratios(
            wide, has_tokens, is_chosen, parameters, interleaved, mean, token_logps.dtype
        )
    return loss, losses, logratios, logps, lengths, counts
