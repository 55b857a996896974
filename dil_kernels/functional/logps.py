"""Log-probabilities of labels and of sequences, from logits."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.backends import resolve_backend
from dil_kernels.checks import (
    check_cu_seqlens,
    check_ignore_index,
    check_inplace,
    check_logits,
    check_tensors,
    shape_of,
)
from dil_kernels.ops.logps import logps_from_logits


class LogitStatistics(NamedTuple):
    """What the processed logits of each scored position look like; shaped as the log-probs, without a gradient.

    Positions that are not scored hold 0 and False. A row whose log-prob is NaN holds NaN where the logits do not allow
    a number, and False.
    """

    mean_logit: Tensor  # fp32 (fp64 for fp64 logits), over the vocabulary
    entropy: Tensor  # likewise, -sum p log p in nats; a -inf logit adds nothing
    top1_hit: Tensor  # bool, whether no logit is larger than the label's


def mask_boundaries(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """Labels [N] with the first token of every sequence ignored: no label is predicted across a boundary."""
    N = labels.shape[0]
    first = torch.zeros(N + 1, dtype=torch.bool, device=labels.device)
    # An empty last sequence starts at N; clamping keeps invalid boundaries in bounds (their sums are NaN).
    first = first.index_fill(0, cu_seqlens[:-1].long().clamp(0, N), True)[:N]
    return labels.masked_fill(first, ignore_index)


def _token_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    ignore_index: int,
    shift: bool,
    final_logit_softcapping: float | None,
    temperature: float,
    inplace_backward: bool,
    return_statistics: bool,
    backend: str,
) -> tuple[Tensor, LogitStatistics | None]:
    if backend == "eager":
        logps = reference.token_logps(
            logits,
            labels,
            ignore_index=ignore_index,
            shift=shift,
            final_logit_softcapping=final_logit_softcapping,
            temperature=temperature,
        )
        if not return_statistics:
            return logps, None
        return logps, LogitStatistics(
            *reference.logit_statistics(
                logits,
                labels,
                ignore_index=ignore_index,
                shift=shift,
                final_logit_softcapping=final_logit_softcapping,
                temperature=temperature,
            )
        )
    logps, statistics = logps_from_logits(
        logits,
        labels,
        ignore_index,
        shift,
        final_logit_softcapping or 0.0,
        temperature,
        return_statistics,
        inplace_backward,
        backend,
    )
    if not return_statistics:
        return logps, None
    mean_logit, entropy, top1_hit = statistics.unbind()
    return logps, LogitStatistics(mean_logit, entropy, top1_hit != 0)


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = ...,
    shift: bool = ...,
    final_logit_softcapping: float | None = ...,
    temperature: float = ...,
    inplace_backward: bool = ...,
    return_statistics: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = ...,
    shift: bool = ...,
    final_logit_softcapping: float | None = ...,
    temperature: float = ...,
    inplace_backward: bool = ...,
    return_statistics: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, LogitStatistics]: ...


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    return_statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LogitStatistics]:
    """Log-probability of each label under the softmax of the processed logits, without materialising the softmax.

    Args:
        logits: [B, T, V] or [N, V] (one sequence); fp32, bf16, fp16, or fp64 (CPU). Rows may be strided.
        labels: [B, T] or [N] int64, in [0, V) or `ignore_index`. Rows with an ignored label are not read.
        ignore_index: the label of positions that are not scored.
        shift: position t scores label t + 1, as causal models are trained; no shifted copy of the logits is made.
        final_logit_softcapping: replaces the logits x by cap * tanh(x / cap) (Gemma), cap > 0; None does not.
        temperature: divides the logits, after the softcapping; > 0.
        inplace_backward: write the gradient over the logits instead of into a new buffer. Whoever else needs the logits
            for its backward gets autograd's error, as does a second backward. Under saved-tensor hooks, which leave
            out autograd's check, the gradient gets a new buffer all the same.
        return_statistics: also return mean logit, entropy and top-1 hit of each position, from the same read.
        backend: "auto", "triton" (CUDA), "cpp" (CPU) or "eager".

    Returns:
        fp32 (fp64 for fp64 logits), natural log, 0 where ignored: [B, T - 1] or [N - 1] with `shift`, else the labels'
        shape. A NaN or +inf in a row makes its log-prob NaN; -inf masks an entry. With softcapping, which bounds them,
        infinite logits are as cap and -cap. Differentiable once. With `return_statistics`, these and a
        `LogitStatistics`.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, such as a temperature that fp32 (fp64
            for fp64 logits) does not hold with its reciprocal; on the CPU also a label outside [0, V). On CUDA such a
            label makes its log-prob NaN, since checking it would synchronise with the host.
        RuntimeError: a backend that cannot run here.
    """
    check_logits(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        final_logit_softcapping=final_logit_softcapping,
        temperature=temperature,
    )
    name = resolve_backend(backend, logits.device, logits.dtype)
    if inplace_backward:
        if name == "eager":
            raise RuntimeError("inplace_backward=True needs the triton or cpp backend; the eager backend cannot do it")
        check_inplace(logits)
    one_sequence = logits.ndim == 2
    if one_sequence:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    logps, statistics = _token_logps(
        logits,
        labels,
        ignore_index,
        shift,
        final_logit_softcapping,
        temperature,
        inplace_backward,
        return_statistics,
        name,
    )
    if one_sequence:
        logps = logps.squeeze(0)
    if statistics is None:
        return logps
    return logps, LogitStatistics(*(x.squeeze(0) for x in statistics)) if one_sequence else statistics


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each sequence: the sum of its scored tokens' log-probs.

    Args:
        logits: [B, T, V]; packed [1, N, V] or [N, V] with `cu_seqlens`.
        labels: [B, T]; [1, N] or [N] with `cu_seqlens`.
        cu_seqlens: int32 [S + 1], boundaries of the packed sequences: starts at 0, does not decrease, ends at N. No
            label is ever predicted across a boundary: with `shift`, the first label of each sequence is ignored.
        average_log_prob: divide by the number of scored tokens.
        ignore_index, shift, final_logit_softcapping, temperature, inplace_backward, backend: as in `token_logps`.

    Returns:
        [B] or [S]; 0 for a sequence without a scored token.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`; also cu_seqlens that are not boundaries (on CUDA, where
            checking would synchronise with the host, the result is NaN instead).
    """
    logits, labels = prepare_rows(logits, labels, cu_seqlens, ignore_index, shift)
    logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        final_logit_softcapping=final_logit_softcapping,
        temperature=temperature,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return reference.sequence_logps(
        logps, labels, cu_seqlens, average_log_prob=average_log_prob, ignore_index=ignore_index, shift=shift
    )


def prepare_rows(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor]:
    """Padded input as it is; packed input as [N, V] and [N], where a shift cannot cross a boundary."""
    check_tensors(logits=logits, labels=labels)
    check_ignore_index(ignore_index)
    if cu_seqlens is None:
        if logits.ndim != 3:
            raise ValueError(f"logits must be [B, T, V] (or pass cu_seqlens for packed [N, V]), got {shape_of(logits)}")
        return logits, labels
    if logits.ndim in (2, 3):
        check_cu_seqlens(cu_seqlens, logits)
    if labels.shape == logits.shape[:-1] and logits.ndim == 3:
        logits, labels = logits.squeeze(0), labels.squeeze(0)
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, but logits are on {logits.device}")
    if shift and labels.ndim == 1:
        labels = mask_boundaries(labels, cu_seqlens, ignore_index)
    return logits, labels
