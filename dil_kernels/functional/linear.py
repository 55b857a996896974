"""Log-probabilities and losses from hidden states and the language-model head, without the logits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.backends import constant_in_graphs, has_autocast, resolve_backend
from dil_kernels.checks import (
    check_cu_seqlens,
    check_head,
    check_ignore_index,
    check_number,
    check_processing,
    check_tensors,
    has_values,
    shape_of,
)
from dil_kernels.functional.logps import LogitStatistics, mask_boundaries
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.functional.loss_options import DILOutput, resolve_loss_options, resolve_ref_logps
from dil_kernels.ops.linear import linear_logps
from dil_kernels.ops.linear_head import TILE_SHAPES, peak_memory, stash_rows_within

# Of the memory of the device, the share that a stash may take by default.
STASH_SHARE = 1 / 8


@dataclass(frozen=True)
class _HeadOptions:
    """What is done with the product of hidden states and weight, and how; checked."""

    ignore_index: int
    shift: bool
    logit_scale: float
    final_logit_softcapping: float | None
    temperature: float
    stash_bytes: int | None
    max_scored_tokens: int | None
    backend: str

    def __post_init__(self) -> None:
        check_ignore_index(self.ignore_index)
        check_number("logit_scale", self.logit_scale)
        if not 0 < abs(self.logit_scale) < math.inf:
            raise ValueError(f"logit_scale must be a finite number other than 0, got {self.logit_scale}")
        for name, value in (("stash_bytes", self.stash_bytes), ("max_scored_tokens", self.max_scored_tokens)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be None or an integer >= 0, got {value!r}")


@constant_in_graphs
def default_stash_bytes(device: torch.device) -> int:
    """What `stash_bytes=None` means: an eighth of the memory of the device, or of the machine on the CPU.

    Not of what is free: which rows are kept decides how gradients are rounded, and a run must be repeatable bit by bit.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        total = 8 << 30
    return int(STASH_SHARE * total)


def linear_memory_bytes(
    num_scored_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    num_tokens: int | None = None,
    hidden_states_grad: bool = True,
    lm_head_weight_grad: bool = True,
    lm_head_bias_grad: bool = False,
    stash_bytes: int | None = 0,
    device: torch.device | str = "cuda",
) -> int:
    """An upper bound of the memory that `linear_token_logps` takes, forward and backward, known before running it.

    Args:
        num_scored_tokens: scored positions (`max_scored_tokens`, where that is given).
        hidden_size: D.
        vocab_size: V.
        dtype: of hidden states and weight.
        num_tokens: all positions, if more.
        hidden_states_grad, lm_head_weight_grad, lm_head_bias_grad: what requires a gradient.
        stash_bytes: as given to `linear_token_logps`; None stands for its default on the device of this machine.
        device: where it runs.

    Returns:
        Bytes beyond the inputs, the log-probs and the gradients of the inputs, at the peak. On top come copies of
        inputs that autocast converts or that are not contiguous, and what a BLAS library holds for itself.
    """
    tile = TILE_SHAPES["cuda" if torch.device(device).type == "cuda" else "cpu"]
    return peak_memory(
        num_scored_tokens,
        num_scored_tokens if num_tokens is None else num_tokens,
        hidden_size,
        vocab_size,
        dtype,
        tile=tile,
        cuda=torch.device(device).type == "cuda",
        stash_bytes=default_stash_bytes(torch.device(device)) if stash_bytes is None else stash_bytes,
        grad_hidden=hidden_states_grad,
        grad_weight=lm_head_weight_grad,
        grad_bias=lm_head_bias_grad,
    )


def _as_autocast(tensor: Tensor | None) -> Tensor | None:
    """In the precision that torch.autocast gives matrix products, where it is on."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _num_rows(targets: Tensor, options: _HeadOptions) -> int:
    """How many rows to make place for: the scored ones, or a bound on them."""
    N, bound = targets.numel(), options.max_scored_tokens
    if not has_values(targets) or (targets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return N if bound is None else min(N, bound)  # a count would have to come from the device
    if bound is not None and targets.is_cuda:
        return min(N, bound)
    scored = int((targets != options.ignore_index).sum())
    if bound is not None and scored > bound:
        raise ValueError(f"max_scored_tokens={bound}, but labels score {scored} positions")
    return scored


def _beyond_bound(targets: Tensor, options: _HeadOptions) -> Tensor:
    """Scored positions [B, T] for which `max_scored_tokens` leaves no place; on the CPU they raise."""
    scored = targets != options.ignore_index
    return scored & (scored.flatten().cumsum(0).view(scored.shape) > _num_rows(targets, options))


def _token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    labels: Tensor,
    options: _HeadOptions,
    *,
    statistics: bool,
    names: tuple[str, str, str] = ("hidden_states", "lm_head_weight", "lm_head_bias"),
) -> tuple[Tensor, LogitStatistics | None, str]:
    """Log-probs in the shape of the labels, one shorter with a shift; their statistics; the backend that ran."""
    tensors = (hidden_states, lm_head_weight, lm_head_bias)
    check_tensors(**dict(zip(names, tensors, strict=True)), labels=labels)
    hidden, weight, bias = (_as_autocast(tensor) for tensor in tensors)
    assert hidden is not None
    assert weight is not None
    ignore_index, shift = options.ignore_index, options.shift
    check_head(hidden, weight, bias, labels, ignore_index=ignore_index, shift=shift, names=names)
    check_processing(hidden.dtype, options.final_logit_softcapping, options.temperature, options.logit_scale)
    backend = resolve_backend(options.backend, hidden.device, hidden.dtype)
    shape = labels.shape
    if labels.ndim == 1:
        hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
    # torch's pad takes a float, which does not hold every int64.
    unscored = labels.new_full((labels.shape[0], 1), ignore_index)
    targets = torch.cat([labels[:, 1:], unscored], 1) if shift else labels
    T_out = labels.shape[1] - int(shift)
    if backend == "eager":
        logits = reference.linear_logits(
            hidden, weight, bias, labels, ignore_index=ignore_index, shift=shift, logit_scale=options.logit_scale
        )
        cap, temperature = options.final_logit_softcapping, options.temperature
        logps = reference.token_logps(
            logits,
            labels,
            ignore_index=ignore_index,
            shift=shift,
            final_logit_softcapping=cap,
            temperature=temperature,
        )
        stats = None
        if statistics:
            stats = reference.logit_statistics(
                logits,
                labels,
                ignore_index=ignore_index,
                shift=shift,
                final_logit_softcapping=cap,
                temperature=temperature,
            )
        if options.max_scored_tokens is not None:
            beyond = _beyond_bound(targets, options)[:, :T_out]
            logps = logps.masked_fill(beyond, torch.nan)
            if stats is not None:
                mean, entropy = (x.masked_fill(beyond, torch.nan) for x in stats[:2])
                stats = (mean, entropy, stats[2] & ~beyond)
    else:
        targets = targets.reshape(-1)
        rows = _num_rows(targets, options)
        stash_bytes = options.stash_bytes
        if stash_bytes is None:
            stash_bytes = default_stash_bytes(hidden.device)
        flat, raw = linear_logps(
            hidden.reshape(-1, hidden.shape[-1]),
            weight.contiguous(),
            bias,
            targets,
            rows=rows,
            stash_rows=stash_rows_within(stash_bytes, rows, weight.shape[0], weight.dtype),
            ignore_index=ignore_index,
            logit_scale=options.logit_scale,
            softcap=options.final_logit_softcapping or 0.0,
            temperature=options.temperature,
            statistics=statistics,
            tile=TILE_SHAPES["cuda" if hidden.is_cuda else "cpu"],
            backend=backend,
        )
        logps = flat.view(labels.shape)[:, :T_out].contiguous()
        stats = None
        if statistics:
            mean, entropy, hit = (s.view(labels.shape)[:, :T_out] for s in raw)
            stats = (mean, entropy, hit != 0)
    if len(shape) == 1:
        logps = logps.squeeze(0)
        stats = None if stats is None else tuple(s.squeeze(0) for s in stats)  # type: ignore[assignment]
    return logps, None if stats is None else LogitStatistics(*stats), backend


@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = ...,
    logit_scale: float = ...,
    final_logit_softcapping: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    shift: bool = ...,
    stash_bytes: int | None = ...,
    max_scored_tokens: int | None = ...,
    return_statistics: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = ...,
    logit_scale: float = ...,
    final_logit_softcapping: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    shift: bool = ...,
    stash_bytes: int | None = ...,
    max_scored_tokens: int | None = ...,
    return_statistics: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, LogitStatistics]: ...


def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    stash_bytes: int | None = None,
    max_scored_tokens: int | None = None,
    return_statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LogitStatistics]:
    """Log-probability of each label from hidden states and the head; logits exist one tile at a time.

    With z = cap tanh(logit_scale (hidden @ weight^T + bias) / cap), these are log-probs of softmax(z / temperature).
    Logits, log-sum-exps and the label's logit are fp32 also where the model is bf16 or fp16. Forward and backward
    together take three matrix products of the size of the scored rows, for any upstream gradient; two where the weight
    needs no gradient, one where nothing does.

    Args:
        hidden_states: [B, T, D] or [N, D] (one sequence), the input of the head; fp32, bf16, fp16, or fp64 (CPU).
        lm_head_weight: [V, D], of the same dtype; possibly tied to the embedding. Under torch.autocast all three are
            taken in its precision.
        labels: [B, T] or [N] int64, in [0, V) or `ignore_index`. Nothing is computed for positions that are not scored.
        lm_head_bias: [V].
        logit_scale: multiplies the logits (Granite: 1 / logits_scaling; Cohere: logit_scale).
        final_logit_softcapping: replaces the logits x by cap * tanh(x / cap) (Gemma), cap > 0; None does not.
        temperature: divides the logits, last.
        ignore_index, shift: as in `token_logps`.
        stash_bytes: memory for the gradients of the logits, in the dtype of the weight, kept from forward to backward;
            rows beyond it are computed again in the backward. None: an eighth of the device's memory. Where the weight
            needs no gradient nothing is kept. The split changes gradients by roundings: set it for results that are the
            same bit by bit on machines of other memory.
        max_scored_tokens: a bound on how many positions are scored. On CUDA, counting them waits for the device, which
            a bound avoids; under torch.compile or in a CUDA graph the default is all positions. Positions beyond the
            bound have log-prob NaN; in eager mode on the CPU they raise.
        return_statistics: also return mean logit, entropy and top-1 hit of each position.
        backend: "auto", "triton" (CUDA), "cpp" (CPU) or "eager" (materialises the logits, in fp32).

    Returns:
        As `token_logps`. Differentiable once, in hidden states, weight and bias.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`.
    """
    options = _HeadOptions(
        ignore_index,
        shift,
        logit_scale,
        final_logit_softcapping,
        temperature,
        stash_bytes,
        max_scored_tokens,
        backend,
    )
    logps, stats, _ = _token_logps(
        hidden_states, lm_head_weight, lm_head_bias, labels, options, statistics=return_statistics
    )
    return logps if stats is None else (logps, stats)


def _prepare(
    hidden_states: Tensor, labels: Tensor, cu_seqlens: Tensor | None, options: _HeadOptions, name: str = "hidden_states"
) -> tuple[Tensor, Tensor]:
    """Padded input as it is; packed input as [N, D] and [N], where a shift cannot cross a boundary."""
    check_tensors(**{name: hidden_states}, labels=labels)
    if cu_seqlens is None:
        if hidden_states.ndim != 3:
            raise ValueError(
                f"{name} must be [B, T, D] (or pass cu_seqlens for packed [N, D]), got {shape_of(hidden_states)}"
            )
        return hidden_states, labels
    if hidden_states.ndim in (2, 3):
        check_cu_seqlens(cu_seqlens, hidden_states, name, "D")
    if labels.shape == hidden_states.shape[:-1] and hidden_states.ndim == 3:
        hidden_states, labels = hidden_states.squeeze(0), labels.squeeze(0)
    if labels.device != hidden_states.device:
        raise ValueError(f"labels are on {labels.device}, but {name} are on {hidden_states.device}")
    if options.shift and labels.ndim == 1:
        labels = mask_boundaries(labels, cu_seqlens, options.ignore_index)
    return hidden_states, labels


def linear_sequence_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average_log_prob: bool = False,
    lm_head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    stash_bytes: int | None = None,
    max_scored_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each sequence from hidden states and the head.

    Args:
        hidden_states: [B, T, D]; packed [1, N, D] or [N, D] with `cu_seqlens`.
        lm_head_weight: [V, D].
        labels: [B, T]; [1, N] or [N] with `cu_seqlens`.
        cu_seqlens, average_log_prob: as in `sequence_logps`.
        lm_head_bias, logit_scale, final_logit_softcapping, temperature, ignore_index, shift, stash_bytes,
            max_scored_tokens, backend: as in `linear_token_logps`.

    Returns:
        [B] or [S]; 0 for a sequence without a scored token.

    Raises:
        ValueError, TypeError, RuntimeError: as `sequence_logps`.
    """
    options = _HeadOptions(
        ignore_index,
        shift,
        logit_scale,
        final_logit_softcapping,
        temperature,
        stash_bytes,
        max_scored_tokens,
        backend,
    )
    hidden_states, labels = _prepare(hidden_states, labels, cu_seqlens, options)
    logps, _, _ = _token_logps(hidden_states, lm_head_weight, lm_head_bias, labels, options, statistics=False)
    return reference.sequence_logps(
        logps,
        labels,
        cu_seqlens,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
    )


def fused_linear_dil_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    ref_hidden_states: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    ref_lm_head_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    is_chosen: Tensor | None = None,
    loss_type: str = "lsif",
    beta: float | None = None,
    power: float | None = None,
    alpha: float = 0.0,
    max_log_ratio: float | None = None,
    non_negative: float | None = None,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
    average_log_prob: bool = True,
    cu_seqlens: Tensor | None = None,
    pair_layout: str = "concatenated",
    reduction: str = "mean",
    lm_head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    stash_bytes: int | None = None,
    max_scored_tokens: int | None = None,
    backend: str = "auto",
) -> DILOutput:
    """DIL loss from hidden states and the head (arXiv 2503.05079, eq. 19), without the logits.

    Args:
        hidden_states: [2B, T, D], chosen and rejected responses under the policy; packed [1, N, D] or [N, D] with
            `cu_seqlens`.
        lm_head_weight: [V, D].
        labels: [2B, T] int64; [1, N] or [N] if packed.
        ref_chosen_logps, ref_rejected_logps: [B], summed log-probs under the reference model.
        ref_hidden_states: [2B, T, D'], the reference model's hidden states, instead of the sums; needs
            `ref_lm_head_weight` and costs one matrix product.
        ref_lm_head_weight: [V, D'].
        ref_lm_head_bias: [V].
        ref_logps, is_chosen: of responses that do not come in pairs, as in `fused_dil_loss`.
        loss_type, beta, power, alpha, max_log_ratio, non_negative, chosen_weight, rejected_weight, average_log_prob,
            cu_seqlens, pair_layout, reduction: as in `fused_dil_loss`.
        lm_head_bias: [V].
        logit_scale, final_logit_softcapping, temperature: as in `linear_token_logps`; they apply to both models.
        ignore_index, shift, stash_bytes, max_scored_tokens, backend: as in `linear_token_logps`.

    Returns:
        A `DILOutput`, as of `fused_dil_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_token_logps` and `fused_dil_loss`.
    """
    loss_options = resolve_loss_options(
        loss_type,
        beta,
        alpha,
        average_log_prob,
        pair_layout,
        reduction,
        power=power,
        max_log_ratio=max_log_ratio,
        non_negative=non_negative,
        chosen_weight=chosen_weight,
        rejected_weight=rejected_weight,
    )
    options = _HeadOptions(
        ignore_index,
        shift,
        logit_scale,
        final_logit_softcapping,
        temperature,
        stash_bytes,
        max_scored_tokens,
        backend,
    )
    check_tensors(
        hidden_states=hidden_states,
        lm_head_weight=lm_head_weight,
        ref_hidden_states=ref_hidden_states,
        ref_lm_head_weight=ref_lm_head_weight,
    )
    if (ref_hidden_states is None) != (ref_lm_head_weight is None):
        raise ValueError("ref_hidden_states and ref_lm_head_weight must be given together")
    if ref_hidden_states is None and ref_lm_head_bias is not None:
        raise ValueError("ref_lm_head_bias was given without ref_hidden_states")
    if ref_hidden_states is not None and ref_hidden_states.shape[:-1] != hidden_states.shape[:-1]:
        raise ValueError(
            f"ref_hidden_states must be {[*hidden_states.shape[:-1], 'D']} as hidden_states, "
            f"got {shape_of(ref_hidden_states)}"
        )
    if ref_lm_head_weight is not None and ref_lm_head_weight.shape[:1] != lm_head_weight.shape[:1]:
        raise ValueError(
            f"ref_lm_head_weight must have the vocabulary of lm_head_weight {shape_of(lm_head_weight)}, "
            f"got {shape_of(ref_lm_head_weight)}"
        )
    if ref_hidden_states is not None and cu_seqlens is not None and ref_hidden_states.ndim == 3:
        ref_hidden_states = ref_hidden_states.squeeze(0)
    hidden_states, labels = _prepare(hidden_states, labels, cu_seqlens, options)
    S = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    counted_in = ("rows in hidden_states", hidden_states) if cu_seqlens is None else ("in cu_seqlens", cu_seqlens)
    ref_logps = resolve_ref_logps(
        ref_chosen_logps,
        ref_rejected_logps,
        S,
        counted_in,
        hidden_states.device,
        loss_options,
        ref_logps=ref_logps,
        is_chosen=is_chosen,
    )
    if (ref_hidden_states is None) == (ref_logps is None):
        sums = "both ref_chosen_logps and ref_rejected_logps" if is_chosen is None else "ref_logps"
        raise ValueError(f"give the reference either as ref_hidden_states and ref_lm_head_weight, or as {sums}")
    token_logps, _, name = _token_logps(hidden_states, lm_head_weight, lm_head_bias, labels, options, statistics=False)
    ref_token_logps = None
    if ref_hidden_states is not None:
        assert ref_lm_head_weight is not None
        with torch.no_grad():
            ref_token_logps, _, _ = _token_logps(
                ref_hidden_states,
                ref_lm_head_weight,
                ref_lm_head_bias,
                labels,
                options,
                statistics=False,
                names=("ref_hidden_states", "ref_lm_head_weight", "ref_lm_head_bias"),
            )
    return loss_of_token_logps(
        token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        loss_options,
        ignore_index=ignore_index,
        shift=shift,
        backend=name,
        is_chosen=is_chosen,
    )
