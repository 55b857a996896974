"""The density-ratio loss over token log-probabilities as torch.library ops, and the autograd Function above them.

    density_ratio_fwd(token_logps, labels?, cu_seqlens?, ref_token_logps?, ref_logps?, is_chosen?,
                      *parameters, *options)
        -> (loss [], losses [B] or [S], logratios [S], logps [S], lengths [S] int32, counts [2] int32, coefs [S])
    density_ratio_bwd(grad_loss?, grad_losses?, grad_logratios?, grad_logps?, token_logps, labels?, cu_seqlens?,
                      is_chosen?, lengths, counts, coefs, *options)
        -> grad_token_logps

with `LossParameters` and `SequenceOptions`. Sequences are rows of token_logps [S, T_out], or segments of a packed
[N_out] delimited by cu_seqlens [S + 1]. A token counts where its label (shifted by one if `shift`) is not ignore_index;
every token does without labels. Pair i is sequences i and B + i, or 2i and 2i + 1 if interleaved; with `is_chosen` [S]
there are no pairs, and each sequence has a loss of its own. `counts` is what the mean divides by: the pairs, twice, or
the chosen and the rejected sequences. `coefs` is d losses / d logratio of each sequence. loss_type "none" sums log
ratios and leaves every loss 0. Both ops are the extension's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dil_kernels import backends, reference
from dil_kernels.losses.options import LossParameters, SequenceOptions
from dil_kernels.ops import Op, arguments, needs_function, refuse_double_backward


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


_SEQUENCES = "Tensor token_logps, Tensor? labels, Tensor? cu_seqlens"
_GRADS = "Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_logratios, Tensor? grad_logps"
Op(
    f"density_ratio_fwd({_SEQUENCES}, Tensor? ref_token_logps, Tensor? ref_logps, Tensor? is_chosen, "
    f"{arguments(LossParameters)}, {arguments(SequenceOptions)}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
Op(
    f"density_ratio_bwd({_GRADS}, {_SEQUENCES}, Tensor? is_chosen, Tensor lengths, Tensor counts, Tensor coefs, "
    f"{arguments(SequenceOptions)}) -> Tensor",
    lambda *inputs: inputs[4].new_empty(inputs[4].shape),
)


class DensityRatio(torch.autograd.Function):
    """Differentiable once in the token log-probabilities, through loss, losses, log ratios and log-prob sums."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the six tensors that the op begins with, `LossParameters` and `SequenceOptions`."""
        *tensors, parameters, options = inputs
        results = torch.ops.dil_kernels.density_ratio_fwd(*tensors, *parameters, *options)
        loss, losses, logratios, logps, lengths, counts, coefs = results
        token_logps, labels, cu_seqlens, _, _, is_chosen = tensors
        ctx.save_for_backward(token_logps, labels, cu_seqlens, is_chosen, lengths, counts, coefs)
        ctx.mark_non_differentiable(lengths, counts)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return loss, losses, logratios, logps, lengths, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradient of the token log-probs."""
        refuse_double_backward("The density-ratio loss")
        given = [None if grad is None else grad.contiguous() for grad in grads[:4]]
        grad = torch.ops.dil_kernels.density_ratio_bwd(*given, *ctx.saved_tensors, *ctx.options)
        return grad, *(None,) * 7


def density_ratio(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    is_chosen: Tensor | None,
    parameters: LossParameters,
    options: SequenceOptions,
    *,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], losses [B] or [S], log ratios [S], log-prob sums [S], lengths [S] and counts [2].

    An item (a pair, or a sequence with `is_chosen`) with a response that has no scored token has loss 0, no gradient,
    and is left out of the mean. Sums and losses are taken in fp64 and returned in the dtype of `token_logps`. With
    `compiled`, the extension does all of it for its own losses; for others it sums, and torch takes the loss.
    """
    if not compiled:
        sequences = (token_logps, labels, cu_seqlens, ref_token_logps, ref_logps, is_chosen)
        return reference.density_ratio(*sequences, parameters, options)
    known = parameters.loss_type in backends.compiled_losses()
    tensors = (
        token_logps.contiguous(),
        labels,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if ref_token_logps is None else ref_token_logps.to(token_logps.dtype).contiguous(),
        None if ref_logps is None else ref_logps.double().contiguous(),
        None if is_chosen is None else is_chosen.contiguous(),
    )
    computed = parameters if known else parameters._replace(loss_type="none")
    if needs_function(token_logps):
        results = DensityRatio.apply(*tensors, computed, options)
    else:
        results = torch.ops.dil_kernels.density_ratio_fwd(*tensors, *computed, *options)[:-1]
    loss, losses, logratios, logps, lengths, counts = results
    if not known:
        wide = logratios.to(reference.accumulation_dtype(logratios.device))
        # NaN log ratios are those of invalid boundaries, which must not pass for responses without a token.
        has_tokens = (lengths > 0) | wide.isnan()
        loss, losses, counts = reference.losses_of_logratios(
            wide, has_tokens, is_chosen, parameters, options, token_logps.dtype
        )
    return loss, losses, logratios, logps, lengths, counts
