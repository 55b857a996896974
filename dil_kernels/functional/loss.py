"""The density-ratio loss of preference pairs, from per-sequence log-probabilities or straight from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dil_kernels.backends import loss_is_compiled, resolve_backend
from dil_kernels.checks import LOGITS_DTYPES, check_choice, check_per_pair, shape_of
from dil_kernels.divergences import resolve_options
from dil_kernels.functional.logps import prepare_rows, token_logps
from dil_kernels.ops.density_ratio import density_ratio

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


@dataclass(frozen=True)
class LossOptions:
    """How a fused loss is taken, checked."""

    loss_type: str
    beta: float
    alpha: float
    average_log_prob: bool
    interleaved: bool
    reduction: str


def resolve_loss_options(
    loss_type: str, beta: float | None, alpha: float, average_log_prob: bool, pair_layout: str, reduction: str
) -> LossOptions:
    """Check the options that all fused losses share.

    Raises:
        ValueError: an unknown name, or an option that the loss does not use.
    """
    divergence, beta_value = resolve_options(loss_type, beta, alpha)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("pair_layout", pair_layout, PAIR_LAYOUTS)
    return LossOptions(
        loss_type=divergence.name,
        beta=beta_value,
        alpha=alpha,
        average_log_prob=average_log_prob,
        interleaved=pair_layout == "interleaved",
        reduction=reduction,
    )


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
    options = resolve_loss_options(loss_type, beta, alpha, average_log_prob, pair_layout, reduction)
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits must be {shape_of(logits)} as logits, got {shape_of(ref_logits)}")
    if ref_logits is not None and ref_logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"ref_logits must be fp32, bf16, fp16 or fp64, got {ref_logits.dtype}")
    if ref_logits is not None and ref_logits.device != logits.device:
        raise ValueError(f"ref_logits are on {ref_logits.device}, but logits are on {logits.device}")
    if ref_logits is not None and cu_seqlens is not None and ref_logits.ndim == 3:
        ref_logits = ref_logits.squeeze(0)
    logits, labels = prepare_rows(logits, labels, cu_seqlens, ignore_index, shift)
    S = logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    counted_in = f"rows in logits {shape_of(logits)}" if cu_seqlens is None else f"in cu_seqlens {shape_of(cu_seqlens)}"
    ref_logps = resolve_ref_logps(ref_chosen_logps, ref_rejected_logps, S, counted_in, logits.device, options)
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
    return loss_of_token_logps(
        policy_token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        options,
        ignore_index=ignore_index,
        shift=shift,
        backend=resolve_backend(backend, logits.device, logits.dtype),
    )


def loss_of_token_logps(
    policy_token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    options: LossOptions,
    *,
    ignore_index: int,
    shift: bool,
    backend: str,
) -> DILOutput:
    """The second half of every fused loss: from token log-probs, checked arguments only.

    Args:
        policy_token_logps: [2B, T - shift], or packed [N - shift] with `cu_seqlens`.
        labels: [2B, T] or [N].
        cu_seqlens: int32 [2B + 1] or None.
        ref_token_logps: shaped as `policy_token_logps`, or None.
        ref_logps: [2B] sums in the order of the sequences, or None.
        options: how the loss is taken.
        ignore_index, shift: what counts as scored.
        backend: the resolved backend that computed the log-probs.
    """
    loss, losses, logratios, logps, lengths, _ = density_ratio(
        policy_token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        loss_type=options.loss_type,
        beta=options.beta,
        alpha=options.alpha,
        average=options.average_log_prob,
        interleaved=options.interleaved,
        reduction=options.reduction,
        ignore_index=ignore_index,
        shift=shift,
        compiled=loss_is_compiled(options.loss_type, backend, policy_token_logps.device),
    )
    chosen_logps, rejected_logps = _split_pairs(logps, options.interleaved)
    chosen_rewards, rejected_rewards = _split_pairs(logratios, options.interleaved)
    chosen_lengths, rejected_lengths = _split_pairs(lengths, options.interleaved)
    return DILOutput(
        loss=losses if options.reduction == "none" else loss,
        losses=losses,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )


def resolve_ref_logps(
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    num_sequences: int,
    counted_in: str,
    device: torch.device,
    options: LossOptions,
) -> Tensor | None:
    """The reference sums [2B] in the order of the sequences; None if neither is given."""
    if num_sequences % 2:
        raise ValueError(f"pairs need an even number of sequences, got {num_sequences} {counted_in}")
    return _merge_ref_logps(ref_chosen_logps, ref_rejected_logps, num_sequences // 2, device, options.interleaved)


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
