"""Eager PyTorch implementation: the oracle of the tests (in fp64) and the backend of last resort.

Written to be read, not to be fast: `log_softmax` over whole rows, autograd for every gradient.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from dil_kernels.backends import has_autocast
from dil_kernels.losses.options import LossParameters, SequenceOptions
from dil_kernels.losses.scalar import pair_losses, response_losses, soft_bound, total
from dil_kernels.options import HeadOptions, ScoringOptions

DEFAULTS = ScoringOptions()


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Of logits / temperature; without the largest, what is left overflows only where its exponential is 0."""
    return ((logits - logits.detach().amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def token_logps(logits: Tensor, labels: Tensor, options: ScoringOptions = DEFAULTS) -> Tensor:
    """Log-probability of each label under the softmax of the processed logits.

    Args:
        logits: [B, T, V].
        labels: [B, T] int64.
        options: what is scored.

    Returns:
        [B, T - 1] with `shift` (position t scores label t + 1), else [B, T]; fp64 for fp64 logits, fp32 otherwise. 0
        where the label is `ignore_index`, NaN where it is outside [0, V).
    """
    logits, index, scored, invalid = _scored_rows(logits, labels, options)
    logits = capped(logits, options.final_logit_softcapping)
    logps = log_softmax(logits, options.temperature).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    logps = torch.where(invalid, torch.nan, logps)
    return torch.where(scored, logps, 0)


def logit_statistics(
    logits: Tensor, labels: Tensor, options: ScoringOptions = DEFAULTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean logit, entropy and top-1 hit of the positions that `token_logps` scores, of the processed logits.

    Returns:
        Mean over the vocabulary; -sum p log p in nats, where a -inf logit adds nothing; whether no logit is larger than
        the label's. Shaped as the log-probs: 0 or False where ignored, NaN or False where the label is outside [0, V).
    """
    logits, index, scored, invalid = _scored_rows(logits.detach(), labels, options)
    z, temperature = capped(logits, options.final_logit_softcapping), options.temperature
    logps = log_softmax(z, temperature)
    entropy = -torch.where(logps == -torch.inf, 0, logps.exp() * logps).sum(-1)
    mean = ((z / z.shape[-1]).sum(-1, dtype=accumulation_dtype(z.device)) / temperature).to(z.dtype)
    # Before softcapping, which may round different ones to the same value.
    target = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    hit = (target >= logits.amax(-1)) & ~entropy.isnan() & scored & ~invalid
    mean, entropy = (torch.where(scored, torch.where(invalid, torch.nan, x), 0) for x in (mean, entropy))
    return mean, entropy, hit


def capped(logits: Tensor, final_logit_softcapping: float | None) -> Tensor:
    """cap * tanh(logits / cap)."""
    return logits if final_logit_softcapping is None else soft_bound(logits, final_logit_softcapping)


def _scored_rows(logits: Tensor, labels: Tensor, options: ScoringOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in at least fp32, labels in bounds, which rows are scored, and which of their labels are out of bounds."""
    if options.shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    V = logits.shape[-1]
    scored = labels != options.ignore_index
    invalid = scored & ((labels < 0) | (labels >= V))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # A row that is not scored may hold anything, NaN included, and gets a zero gradient.
    logits = torch.where(scored.unsqueeze(-1), logits, 0).to(dtype)
    return logits, torch.where(scored & ~invalid, labels, 0), scored, invalid


def linear_logits(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    labels: Tensor,
    options: HeadOptions,
) -> Tensor:
    """Logits [B, T, V] of hidden states [B, T, D] under a head [V, D], in fp64 where these are, in fp32 otherwise.

    Positions that are not scored may hold anything and get no gradient.
    """
    device = hidden_states.device.type
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    scored = labels != options.ignore_index
    if options.shift:
        scored = torch.nn.functional.pad(scored[:, 1:], (0, 1))
    hidden_states = torch.where(scored.unsqueeze(-1), hidden_states, 0).to(dtype)
    bias = None if lm_head_bias is None else lm_head_bias.to(dtype)
    # Autocast would convert the product's factors again.
    casts = has_autocast(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else contextlib.nullcontext():
        return torch.nn.functional.linear(hidden_states, lm_head_weight.to(dtype), bias) * options.logit_scale


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """fp64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sequence_sums(values: Tensor, cu_seqlens: Tensor | None, num_tokens: int) -> Tensor:
    """Sum of each sequence: rows of [S, T], or the segments of a packed [N] that `cu_seqlens` [S + 1] delimits.

    `num_tokens` is where `cu_seqlens` must end; packed values may be one short of it (with a shift, the last position
    has nothing to predict). On the CPU the boundaries have been checked; elsewhere invalid ones make every sum NaN.
    """
    if cu_seqlens is None:
        return values.sum(-1)
    offsets = cu_seqlens.long()
    bounded = offsets.clamp(0, values.numel()).cummax(0).values  # in bounds, also where the boundaries are invalid
    sums = torch.segment_reduce(values, "sum", offsets=bounded, axis=0, initial=0.0, unsafe=True)
    valid = (offsets[0] == 0) & (offsets[-1] == num_tokens) & (offsets[1:] >= offsets[:-1]).all()
    return torch.where(valid, sums, torch.nan)


def sequence_logps(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    *,
    average_log_prob: bool,
    options: ScoringOptions,
) -> Tensor:
    """Sum, or mean over the scored tokens, of each sequence's log-probs; 0 for a sequence without a scored token."""
    num_tokens = labels.shape[-1]
    dtype = accumulation_dtype(token_logps.device)
    sums = sequence_sums(token_logps.to(dtype), cu_seqlens, num_tokens)
    if average_log_prob:
        scored = _is_scored(labels, options)
        sums = sums / sequence_sums(scored.to(dtype), cu_seqlens, num_tokens).clamp(min=1)
    return sums.to(token_logps.dtype)


def _is_scored(labels: Tensor, options: ScoringOptions | SequenceOptions) -> Tensor:
    """Which log-probs count, in their shape."""
    return (labels[..., 1:] if options.shift else labels) != options.ignore_index


def density_ratio(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    is_chosen: Tensor | None,
    parameters: LossParameters,
    options: SequenceOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Density-ratio loss over token log-probabilities; see `dil_kernels.ops.density_ratio` for the arguments.

    Returns:
        loss [], losses [B] or [S], log ratios [S], log-prob sums [S], lengths [S] int32, counts [2] int32.
    """
    out_dtype = token_logps.dtype
    dtype = accumulation_dtype(token_logps.device)
    scored = torch.ones_like(token_logps, dtype=torch.bool) if labels is None else _is_scored(labels, options)
    values = torch.where(scored, token_logps.to(dtype), 0)
    num_tokens = values.shape[-1] + int(options.shift)  # torch 2.10 cannot add a bool to a symbolic size
    logps = sequence_sums(values, cu_seqlens, num_tokens)
    lengths = sequence_sums(scored.to(dtype), cu_seqlens, num_tokens)
    if ref_token_logps is not None:
        u = sequence_sums(torch.where(scored, values - ref_token_logps.to(dtype), 0), cu_seqlens, num_tokens)
    else:
        assert ref_logps is not None
        u = logps - ref_logps.to(dtype)
    # lengths is NaN where the boundaries are invalid; such a sequence stays NaN.
    u = torch.where(lengths == 0, 0, u)
    if options.average:
        u = u / lengths.clamp(min=1)
    loss, losses, counts = losses_of_logratios(u, lengths != 0, is_chosen, parameters, options, out_dtype)
    return (
        loss,
        losses,
        u.to(out_dtype),
        logps.to(out_dtype),
        lengths.nan_to_num(nan=0).to(torch.int32),
        counts,
    )


def split_pairs(values: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[2B] in the order of the sequences -> chosen [B], rejected [B]."""
    if interleaved:
        return values[0::2], values[1::2]
    B = values.shape[0] // 2
    return values[:B], values[B:]


def losses_of_logratios(
    logratios: Tensor,
    has_tokens: Tensor,
    is_chosen: Tensor | None,
    parameters: LossParameters,
    options: SequenceOptions,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], losses [B] (or [S] with `is_chosen`) and counts [2] int32, from log ratios [S] in any precision."""
    if is_chosen is None:
        u_w, u_l = split_pairs(logratios, options.interleaved)
        counted = torch.logical_and(*split_pairs(has_tokens, options.interleaved))
        losses = pair_losses(torch.where(counted, u_w, 0), torch.where(counted, u_l, 0), parameters)
        counts = counted.sum().expand(2)
    else:
        counted = has_tokens
        losses = response_losses(torch.where(counted, logratios, 0), is_chosen, parameters)
        counts = torch.stack([(counted & is_chosen).sum(), (counted & ~is_chosen).sum()])
    losses = torch.where(counted, losses, 0)
    rounded = losses.to(out_dtype)
    shares = torch.where(rounded.isinf(), rounded, losses)  # what overflows alone does so in the sum, too
    if options.mean:
        divisors = counts.clamp(min=1)
        shares = shares / (divisors[0] if is_chosen is None else torch.where(is_chosen, divisors[0], divisors[1]))
    return total(shares).to(out_dtype), rounded, counts.to(torch.int32)
