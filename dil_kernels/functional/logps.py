"""Log-probabilities of labels and of sequences, from logits."""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from dil_kernels import reference
from dil_kernels.backends import resolve_backend
from dil_kernels.checks import check_cu_seqlens, check_flag, check_inplace, check_logits, check_tensors, shape_of
from dil_kernels.functional.vocab_parallel import Checks, checked_together, group_of, local_part
from dil_kernels.ops.logps import logps_from_logits
from dil_kernels.ops.vocab_parallel import IGNORED, Shard, eager_rows
from dil_kernels.options import LogitsKeywords, LogitsOptions, ScoringOptions, split, takes


class LogitStatistics(NamedTuple):
    """What the processed logits of each scored position look like; shaped as the log-probs, without a gradient.

    Positions that are not scored hold 0 and False. A row whose log-prob is NaN holds NaN where the logits do not allow
    a number, and False.
    """

    mean_logit: Tensor  #: fp32 (fp64 for fp64 logits), over the vocabulary
    entropy: Tensor  #: likewise, -sum p log p in nats; a -inf logit adds nothing
    top1_hit: Tensor  #: bool, whether no logit is larger than the label's


def mask_boundaries(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """Labels [N] with the first token of every sequence ignored: no label is predicted across a boundary."""
    N = labels.shape[0]
    first = torch.zeros(N + 1, dtype=torch.bool, device=labels.device)
    # An empty last sequence starts at N; clamping keeps invalid boundaries in bounds (their sums are NaN).
    first = first.index_fill(0, cu_seqlens[:-1].long().clamp(0, N), True)[:N]
    return labels.masked_fill(first, ignore_index)


@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, return_statistics: Literal[False] = ..., **options: Unpack[LogitsKeywords]
) -> Tensor: ...


@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[LogitsKeywords]
) -> tuple[Tensor, LogitStatistics]: ...


@takes(LogitsOptions)
def token_logps(
    logits: Tensor, labels: Tensor, *, return_statistics: bool = False, **options: Unpack[LogitsKeywords]
) -> Tensor | tuple[Tensor, LogitStatistics]:
    """Log-probability of each label under the softmax of the processed logits, without materialising the softmax.

    Args:
        logits: [B, T, V] or [N, V] (one sequence); fp32, bf16, fp16, or fp64 (CPU). Rows may be strided.
        labels: [B, T] or [N] int64, in [0, V) or `ignore_index`. Rows with an ignored label are not read.
        return_statistics: also return mean logit, entropy and top-1 hit of each position, from the same read.
        options: the fields of `LogitsOptions`.

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
    (scoring,) = split("token_logps", options, LogitsOptions)
    with_statistics = bool(return_statistics)
    with checked_logits(logits, scoring, return_statistics=with_statistics) as checks:
        checked = check_scored_logits(logits, labels, scoring, checks)
    logps, statistics = logps_of_labels(checked, scoring, checks.shard(), return_statistics=with_statistics)
    return logps if statistics is None else (logps, statistics)


class CheckedLogits(NamedTuple):
    """What is scored: logits [B, T, V] or [N, V], or the part of this process, labels [B, T] or [N], and by what."""

    logits: Tensor
    labels: Tensor
    backend: str


def checked_logits(
    logits: Tensor, options: LogitsOptions, *, return_statistics: bool = False, **others: Tensor | None
) -> contextlib.AbstractContextManager[Checks]:
    """While this is entered, arguments are checked, on all processes that have parts of the logits together.

    Args:
        logits: that are scored.
        options: how.
        return_statistics: whether they are asked for.
        others: logits that must be split likewise, by name.
    """
    check_tensors(logits=logits, **others)
    split_over = {name: (x, -1) for name, x in {"logits": logits, **others}.items()}
    return checked_together(group_of(options.process_group, split_over), logits, options, return_statistics)


def check_scored_logits(logits: Tensor, labels: Tensor, options: LogitsOptions, checks: Checks) -> CheckedLogits:
    """The checks of `token_logps`, on logits that may be a DTensor."""
    whole, logits, split_over = logits, local_part(logits), checks.group is not None
    check_logits(logits, labels, ignore_index=options.ignore_index, shift=options.shift, part=split_over)
    options.check_dtype(logits.dtype)
    backend = resolve_backend(options.backend, logits.device, logits.dtype)
    if options.inplace_backward:
        if backend == "eager":
            raise RuntimeError("inplace_backward=True needs the triton or cpp backend; the eager backend cannot do it")
        check_inplace(logits)
    if split_over:
        targets = labels[..., 1:] if options.shift else labels
        checks.found(logits, whole, -1, targets, **{"the number of positions": labels.numel()})
    return CheckedLogits(logits, labels, backend)


def logps_of_labels(
    checked: CheckedLogits, options: LogitsOptions, shard: Shard | None = None, *, return_statistics: bool = False
) -> tuple[Tensor, LogitStatistics | None]:
    """As `token_logps`."""
    logits, labels, backend = checked
    one_sequence = logits.ndim == 2
    if one_sequence:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    if shard is not None:
        labels = shard.own_labels(labels, options.ignore_index)
    statistics = None
    if backend == "eager":
        logps, statistics = eager_logps(logits, labels, options, shard, return_statistics=return_statistics)
    else:
        logps, measured = logps_from_logits(
            logits,
            labels,
            options.processing,
            statistics=return_statistics,
            inplace_backward=options.inplace_backward,
            backend=backend,
            shard=shard,
        )
        if return_statistics:
            mean_logit, entropy, top1_hit = measured.unbind()
            statistics = LogitStatistics(mean_logit, entropy, top1_hit != 0)
    if one_sequence:
        logps = logps.squeeze(0)
        statistics = None if statistics is None else LogitStatistics(*(x.squeeze(0) for x in statistics))
    return logps, statistics


def eager_logps(
    logits: Tensor, labels: Tensor, options: ScoringOptions, shard: Shard | None, *, return_statistics: bool
) -> tuple[Tensor, LogitStatistics | None]:
    """Log-probs of labels [B, T] under logits [B, T, V] in plain PyTorch; labels of a shard are its own."""
    if shard is None:
        logps = reference.token_logps(logits, labels, options)
        if not return_statistics:
            return logps, None
        return logps, LogitStatistics(*reference.logit_statistics(logits, labels, options))
    if options.shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = torch.where((labels == IGNORED).unsqueeze(-1), 0, logits)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    capped = reference.capped(logits, options.final_logit_softcapping)
    logps, statistics = eager_rows(capped, logits, labels, options.temperature, shard)
    return logps, LogitStatistics(*statistics) if return_statistics else None


@takes(LogitsOptions)
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average_log_prob: bool = False,
    **options: Unpack[LogitsKeywords],
) -> Tensor:
    """Log-probability of each sequence: the sum of its scored tokens' log-probs.

    Args:
        logits: [B, T, V]; packed [1, N, V] or [N, V] with `cu_seqlens`.
        labels: [B, T]; [1, N] or [N] with `cu_seqlens`.
        cu_seqlens: int32 [S + 1], boundaries of the packed sequences: starts at 0, does not decrease, ends at N. No
            label is ever predicted across a boundary: with `shift`, the first label of each sequence is ignored.
        average_log_prob: divide by the number of scored tokens.
        options: the fields of `LogitsOptions`.

    Returns:
        [B] or [S]; 0 for a sequence without a scored token.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`; also cu_seqlens that are not boundaries (on CUDA, where
            checking would synchronise with the host, the result is NaN instead).
    """
    (scoring,) = split("sequence_logps", options, LogitsOptions)
    check_flag("average_log_prob", average_log_prob)
    with checked_logits(logits, scoring) as checks:
        logits, labels = prepare_rows(logits, labels, cu_seqlens, scoring)
        checked = check_scored_logits(logits, labels, scoring, checks)
    logps, _ = logps_of_labels(checked, scoring, checks.shard())
    return reference.sequence_logps(logps, labels, cu_seqlens, average_log_prob=average_log_prob, options=scoring)


def prepare_rows(
    values: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    options: ScoringOptions,
    name: str = "logits",
    width: str = "V",
) -> tuple[Tensor, Tensor]:
    """Padded input as it is; packed input as [N, width] and [N], where a shift cannot cross a boundary.

    Args:
        values: logits or hidden states, [B, T, width] or packed.
        labels: [B, T] or packed.
        cu_seqlens: of packed ones.
        options: what is scored.
        name: of the values, for errors; width: of their last dimension.
    """
    check_tensors(**{name: values}, labels=labels)
    if cu_seqlens is None:
        if values.ndim != 3:
            raise ValueError(
                f"{name} must be [B, T, {width}] (or pass cu_seqlens for packed [N, {width}]), got {shape_of(values)}"
            )
        return values, labels
    if values.ndim in (2, 3):
        check_cu_seqlens(cu_seqlens, values, name, width)
    if labels.shape == values.shape[:-1] and values.ndim == 3:
        values, labels = values.squeeze(0), labels.squeeze(0)
    if labels.device != values.device:
        raise ValueError(f"labels are on {labels.device}, but {name} are on {values.device}")
    if options.shift and labels.ndim == 1:
        labels = mask_boundaries(labels, cu_seqlens, options.ignore_index)
    return values, labels
