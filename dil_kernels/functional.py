"""The public functions: validate, choose a backend, compose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.backends import loss_is_compiled, resolve_backend
from dil_kernels.checks import (
    LOGITS_DTYPES,
    check_choice,
    check_cu_seqlens,
    check_inplace,
    check_logits,
    check_per_pair,
    shape_of,
)
from dil_kernels.divergences import resolve_options
from dil_kernels.ops.density_ratio import density_ratio
from dil_kernels.ops.logps import TokenLogps

REDUCTIONS = ("mean", "sum", "none")
PAIR_LAYOUTS = ("concatenated", "interleaved")


class DILOutput(NamedTuple):
    """What `fused_dil_loss` returns. B is the number of pairs; lengths count scored tokens.

    The loss, the losses, the log-probs and the rewards all carry gradients.
    """

    loss: Tensor  # [] for reduction "mean" and "sum", [B] for "none"
    losses: Tensor  # [B]
    chosen_logps: Tensor  # [B], sums over tokens
    rejected_logps: Tensor  # [B], sums over tokens
    chosen_rewards: Tensor  # [B], log pi/pi_ref, per token if average_log_prob
    rejected_rewards: Tensor  # [B]
    chosen_lengths: Tensor  # [B] int32
    rejected_lengths: Tensor  # [B] int32


def _mask_boundaries(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
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
    temperature: float,
    inplace_backward: bool,
    backend: str,
) -> Tensor:
    if backend == "eager":
        return reference.token_logps(logits, labels, ignore_index=ignore_index, shift=shift, temperature=temperature)
    return TokenLogps.apply(logits, labels, ignore_index, shift, temperature, inplace_backward, backend)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), without materialising the softmax.

    Args:
        logits: [B, T, V] or [N, V] (one sequence); fp32, bf16, fp16, or fp64 (CPU). Rows may be strided.
        labels: [B, T] or [N] int64, in [0, V) or `ignore_index`. Rows with an ignored label are not read.
        ignore_index: the label of positions that are not scored.
        shift: position t scores label t + 1, as causal models are trained; no shifted copy of the logits is made.
        temperature: divides the logits; > 0.
        inplace_backward: write the gradient over the logits instead of into a new buffer. Whoever else needs the logits
            for its backward gets autograd's error, as does a second backward.
        backend: "auto", "triton" (CUDA), "cpp" (CPU) or "eager".

    Returns:
        fp32 (fp64 for fp64 logits), natural log, 0 where ignored: [B, T - 1] or [N - 1] with `shift`, else the labels'
        shape. A NaN or +inf in a row makes its log-prob NaN; -inf masks an entry. Differentiable once.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit; on the CPU also a label outside [0,
            V). On CUDA such a label makes its log-prob NaN, since checking it would synchronise with the host.
        RuntimeError: a backend that cannot run here.
    """
    check_logits(logits, labels, ignore_index=ignore_index, shift=shift, temperature=temperature)
    name = resolve_backend(backend, logits.device, logits.dtype)
    if inplace_backward:
        if name == "eager":
            raise RuntimeError("inplace_backward=True needs the triton or cpp backend; the eager backend cannot do it")
        check_inplace(logits)
    if logits.ndim == 3:
        return _token_logps(logits, labels, ignore_index, shift, temperature, inplace_backward, name)
    return _token_logps(
        logits.unsqueeze(0), labels.unsqueeze(0), ignore_index, shift, temperature, inplace_backward, name
    ).squeeze(0)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
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
        ignore_index, shift, temperature, inplace_backward, backend: as in `token_logps`.

    Returns:
        [B] or [S]; 0 for a sequence without a scored token.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`; also cu_seqlens that are not boundaries (on CUDA, where
            checking would synchronise with the host, the result is NaN instead).
    """
    logits, labels = _prepare(logits, labels, cu_seqlens, ignore_index, shift)
    logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    num_tokens = labels.shape[-1]
    dtype = reference.accumulation_dtype(logps.device)
    sums = reference.sequence_sums(logps.to(dtype), cu_seqlens, num_tokens)
    if average_log_prob:
        scored = (labels[..., 1:] if shift else labels) != ignore_index
        sums = sums / reference.sequence_sums(scored.to(dtype), cu_seqlens, num_tokens).clamp(min=1)
    return sums.to(logps.dtype)


def _prepare(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor]:
    """Padded input as it is; packed input as [N, V] and [N], where a shift cannot cross a boundary."""
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
        labels = _mask_boundaries(labels, cu_seqlens, ignore_index)
    return logits, labels


def dil_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss_type: str = "lsif",
    beta: float | None = None,
    alpha: float = 0.0,
    reduction: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Density-ratio loss from per-sequence log-probs, the contract that trainers share.

    Takes log-probs as given and normalises nothing: LSIF and UKL on summed log-probs of long responses overflow; divide
    by the lengths first, or use `fused_dil_loss`, which knows them.

    Args:
        policy_chosen_logps: [B] fp32 or fp64 (lower precisions cannot hold a sum of log-probs).
        policy_rejected_logps: [B].
        ref_chosen_logps: [B], constant.
        ref_rejected_logps: [B], constant.
        loss_type: a name in `dil_kernels.divergences`: "lsif" (DIL eq. 24), "ukl", "bce" (table 1), "dpo" (eq. 27).
        beta: inverse temperature of "dpo" (default 0.1); an error with any other loss.
        alpha: share of the chosen responses in the reference expectation, for separable losses; 0 is the paper.
        reduction: "none", "mean" or "sum".
        backend: "auto" (the extension, where it was built) or "eager".

    Returns:
        losses ([B], or [] if reduced), chosen_rewards [B] and rejected_rewards [B]: the log ratios, detached.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
    """
    divergence, beta_value = resolve_options(loss_type, beta, alpha)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, ("auto", "eager"))
    tensors = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    first = policy_chosen_logps
    for name, tensor in tensors.items():
        check_per_pair(name, tensor, first.shape[:1], first.device)
    dtype = torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype)
    loss, losses, logratios, *_ = density_ratio(
        torch.cat([policy_chosen_logps, policy_rejected_logps]).to(dtype).unsqueeze(1),
        None,
        None,
        None,
        torch.cat([ref_chosen_logps, ref_rejected_logps]).detach(),
        loss_type=loss_type,
        beta=beta_value,
        alpha=alpha,
        average=False,
        interleaved=False,
        reduction=reduction,
        ignore_index=-100,
        shift=False,
        compiled=loss_is_compiled(divergence.name, backend, first.device),
    )
    chosen_rewards, rejected_rewards = logratios.detach().chunk(2)
    return losses if reduction == "none" else loss, chosen_rewards, rejected_rewards


def fused_dil_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    loss_type: str = "lsif",
    beta: float | None = None,
    alpha: float = 0.0,
    average_log_prob: bool = True,
    cu_seqlens: Tensor | None = None,
    pair_layout: str = "concatenated",
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> DILOutput:
    """DIL loss of preference pairs straight from logits (arXiv 2503.05079, eq. 19).

    Args:
        logits: [2B, T, V], chosen and rejected responses under the policy; packed [1, N, V] or [N, V] with
            `cu_seqlens`.
        labels: [2B, T] int64; [1, N] or [N] if packed. `ignore_index` where not scored (prompt, padding).
        ref_chosen_logps: [B], summed log-probs of the chosen responses under the reference model.
        ref_rejected_logps: [B], likewise for the rejected responses.
        ref_logits: the logits of the reference model, shaped as `logits`; give either these or both sums. The log ratio
            is then summed token by token, which is more exact than the difference of two sums.
        loss_type, beta, alpha: as in `dil_loss`.
        average_log_prob: divide each log ratio by its number of scored tokens, as the authors' code does. LSIF on
            summed log ratios diverges within steps.
        cu_seqlens: int32 [2B + 1], boundaries of packed sequences.
        pair_layout: "concatenated" (pair i is sequences i and B + i) or "interleaved" (2i and 2i + 1).
        reduction: "mean" (over the pairs whose responses both have a scored token), "sum" or "none".
        ignore_index, shift, temperature, inplace_backward, backend: as in `token_logps`; temperature applies to both
            models.

    Returns:
        A `DILOutput`. A pair with a response that has no scored token has loss 0 and no gradient; a batch of nothing
        else gives a differentiable zero.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`, `sequence_logps` and `dil_loss`.
    """
    divergence, beta_value = resolve_options(loss_type, beta, alpha)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("pair_layout", pair_layout, PAIR_LAYOUTS)
    interleaved = pair_layout == "interleaved"
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits must be {shape_of(logits)} as logits, got {shape_of(ref_logits)}")
    if ref_logits is not None and ref_logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"ref_logits must be fp32, bf16, fp16 or fp64, got {ref_logits.dtype}")
    if ref_logits is not None and ref_logits.device != logits.device:
        raise ValueError(f"ref_logits are on {ref_logits.device}, but logits are on {logits.device}")
    if ref_logits is not None and cu_seqlens is not None and ref_logits.ndim == 3:
        ref_logits = ref_logits.squeeze(0)
    logits, labels = _prepare(logits, labels, cu_seqlens, ignore_index, shift)
    S = logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if S % 2:
        raise ValueError(
            f"pairs need an even number of sequences, got {S} "
            + (f"rows in logits {shape_of(logits)}" if cu_seqlens is None else f"in cu_seqlens {shape_of(cu_seqlens)}")
        )
    ref_logps = _merge_ref_logps(ref_chosen_logps, ref_rejected_logps, S // 2, logits.device, interleaved)
    if (ref_logits is None) == (ref_logps is None):
        raise ValueError("give the reference either as ref_logits, or as both ref_chosen_logps and ref_rejected_logps")

    policy_token_logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    name = resolve_backend(backend, logits.device, logits.dtype)
    ref_token_logps = None
    if ref_logits is not None:
        ref_token_logps = token_logps(
            ref_logits.detach(),
            labels,
            ignore_index=ignore_index,
            shift=shift,
            temperature=temperature,
            backend=backend,
        )
    loss, losses, logratios, logps, lengths, _ = density_ratio(
        policy_token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        loss_type=loss_type,
        beta=beta_value,
        alpha=alpha,
        average=average_log_prob,
        interleaved=interleaved,
        reduction=reduction,
        ignore_index=ignore_index,
        shift=shift,
        compiled=loss_is_compiled(divergence.name, name, logits.device),
    )
    chosen_logps, rejected_logps = _split_pairs(logps, interleaved)
    chosen_rewards, rejected_rewards = _split_pairs(logratios, interleaved)
    chosen_lengths, rejected_lengths = _split_pairs(lengths, interleaved)
    return DILOutput(
        loss=losses if reduction == "none" else loss,
        losses=losses,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )


def _split_pairs(values: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:  # [2B] -> chosen [B], rejected [B]
    if interleaved:
        return values[0::2], values[1::2]
    B = values.shape[0] // 2
    return values[:B], values[B:]


def _merge_ref_logps(
    chosen: Tensor | None, rejected: Tensor | None, B: int, device: torch.device, interleaved: bool
) -> Tensor | None:  # [2B] in the order of the sequences
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        missing = "ref_chosen_logps" if chosen is None else "ref_rejected_logps"
        raise ValueError(f"{missing} is missing; the log-probs of both responses are needed")
    for name, tensor in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
        check_per_pair(name, tensor, (B,), device)
    merged = torch.stack([chosen, rejected], dim=1).flatten() if interleaved else torch.cat([chosen, rejected])
    return merged.detach()
