"""The density-ratio loss of responses, from per-sequence log-probabilities or straight from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dil_kernels.backends import resolve_backend, sums_are_compiled
from dil_kernels.checks import LOGITS_DTYPES, check_choice, check_per_pair, check_tensors, shape_of
from dil_kernels.functional.logps import prepare_rows, token_logps
from dil_kernels.functional.loss_options import (
    DILOutput,
    LossOptions,
    check_is_chosen,
    resolve_loss_options,
    resolve_ref_logps,
)
from dil_kernels.losses.divergences import floor_of_P
from dil_kernels.losses.scalar import non_negative_loss
from dil_kernels.ops.density_ratio import density_ratio
from dil_kernels.reference import accumulation_dtype, split_pairs


def dil_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss_type: str = "lsif",
    beta: float | None = None,
    power: float | None = None,
    alpha: float = 0.0,
    max_log_ratio: float | None = None,
    non_negative: float | None = None,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
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
        loss_type: a name in `dil_kernels.losses.divergences`; docs/losses.md describes each.
        beta: inverse temperature of "dpo" (default 0.1); an error with any other loss.
        power: exponent of "power" (default 0.5): 1 is "lsif", 0 "ukl", -1 "is", up to constants; an error with any
            other loss.
        alpha: share of the chosen responses in the reference expectation, for separable losses; 0 is the paper.
        max_log_ratio: soft bound M on the log ratios, u -> M tanh(u / M), whose gradient is that of the loss there
            times 1 / cosh(u / M)^2; the rewards stay unbounded. None for no bound.
        non_negative: C of the non-negative correction (`dil_kernels.losses.scalar.non_negative_loss`), which needs
            reduction "mean" and is exact only for the responses of this call; the losses stay uncorrected.
        chosen_weight, rejected_weight: factors of the two terms of a separable loss.
        reduction: "none", "mean" or "sum".
        backend: "auto" (the extension, where it was built) or "eager".

    Returns:
        losses ([B], or [] if reduced), chosen_rewards [B] and rejected_rewards [B]: the log ratios, detached. A loss
        that overflows is infinite, never NaN.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
    """
    options = resolve_loss_options(
        loss_type,
        beta,
        alpha,
        False,
        "concatenated",
        reduction,
        power=power,
        max_log_ratio=max_log_ratio,
        non_negative=non_negative,
        chosen_weight=chosen_weight,
        rejected_weight=rejected_weight,
    )
    tensors = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        check_per_pair(name, tensor, policy_chosen_logps.shape[:1], policy_chosen_logps.device)
    loss, rewards = _loss_of_sums(
        torch.cat([policy_chosen_logps, policy_rejected_logps]),
        torch.cat([ref_chosen_logps, ref_rejected_logps]),
        None,
        options,
        backend,
    )
    chosen_rewards, rejected_rewards = rewards.chunk(2)
    return loss, chosen_rewards, rejected_rewards


def unpaired_dil_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    is_chosen: Tensor,
    *,
    loss_type: str = "lsif",
    power: float | None = None,
    alpha: float = 0.0,
    max_log_ratio: float | None = None,
    non_negative: float | None = None,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
    reduction: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`dil_loss` of responses that do not come in pairs: each is chosen or rejected, in any order and number.

    A chosen response has the loss ``chosen_weight [-A(u) + alpha P(u)]``, a rejected one
    ``rejected_weight (1 - alpha) P(u)``. The mean is that over the chosen ones plus that over the rejected ones: the
    mean over pairs, where all are in pairs.

    Args:
        policy_logps: [S] fp32 or fp64.
        ref_logps: [S], constant.
        is_chosen: [S] bool.
        loss_type, power, alpha, max_log_ratio, non_negative, chosen_weight, rejected_weight, reduction, backend: as in
            `dil_loss`; the loss must be separable.

    Returns:
        losses ([S], or [] if reduced) and rewards [S]: the log ratios, detached.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
    """
    options = resolve_loss_options(
        loss_type,
        None,
        alpha,
        False,
        "concatenated",
        reduction,
        power=power,
        max_log_ratio=max_log_ratio,
        non_negative=non_negative,
        chosen_weight=chosen_weight,
        rejected_weight=rejected_weight,
    )
    check_tensors(policy_logps=policy_logps)
    for name, tensor in (("policy_logps", policy_logps), ("ref_logps", ref_logps)):
        check_per_pair(name, tensor, policy_logps.shape[:1], policy_logps.device)
    check_is_chosen(is_chosen, policy_logps.shape[0], policy_logps.device, options)
    return _loss_of_sums(policy_logps, ref_logps, is_chosen, options, backend)


def _loss_of_sums(
    policy_logps: Tensor, ref_logps: Tensor, is_chosen: Tensor | None, options: LossOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """Losses, reduced as asked, and detached log ratios, from sums [S]."""
    check_choice("backend", backend, ("auto", "eager"))
    loss, losses, logratios, _, lengths, _ = density_ratio(
        policy_logps.unsqueeze(1),
        None,
        None,
        None,
        ref_logps.detach(),
        is_chosen,
        options.parameters,
        average=False,
        interleaved=False,
        mean=options.reduction != "sum",
        ignore_index=-100,
        shift=False,
        compiled=sums_are_compiled(backend, policy_logps.device),
    )
    loss = _corrected(loss, logratios, lengths, is_chosen, options)
    return losses if options.reduction == "none" else loss, logratios.detach()


def _corrected(
    loss: Tensor, logratios: Tensor, lengths: Tensor, is_chosen: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss with the non-negative correction, if it is asked for."""
    if options.non_negative is None:
        return loss
    u = logratios.to(accumulation_dtype(logratios.device))
    counted = lengths > 0
    if is_chosen is None:
        u_w, u_l = split_pairs(u, options.interleaved)
        pairs = torch.logical_and(*split_pairs(counted, options.interleaved))
        sides = (u_w, pairs, u_l, pairs)
    else:
        sides = (u, counted & is_chosen, u, counted & ~is_chosen)
    floor = floor_of_P(options.parameters, u.dtype, u.device)
    return non_negative_loss(loss, *sides, options.parameters, options.non_negative, floor)


def fused_dil_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
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
    ignore_index: int = -100,
    shift: bool = True,
    final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> DILOutput:
    """DIL loss of preference pairs, or of unpaired responses, straight from logits (arXiv 2503.05079, eq. 19).

    Args:
        logits: [2B, T, V], chosen and rejected responses under the policy; packed [1, N, V] or [N, V] with
            `cu_seqlens`.
        labels: [2B, T] int64; [1, N] or [N] if packed. `ignore_index` where not scored (prompt, padding).
        ref_chosen_logps: [B], summed log-probs of the chosen responses under the reference model.
        ref_rejected_logps: [B], likewise for the rejected responses.
        ref_logits: the logits of the reference model, shaped as `logits`; give either these or both sums. The log ratio
            is then summed token by token, which is more exact than the difference of two sums.
        is_chosen: [S] bool, for S responses that do not come in pairs, as in `unpaired_dil_loss`; each row of logits
            (or segment) is then one of them, and the reference sums come as `ref_logps`.
        ref_logps: [S], summed log-probs under the reference model, with `is_chosen`.
        loss_type, beta, power, alpha, max_log_ratio, non_negative, chosen_weight, rejected_weight: as in `dil_loss`.
        average_log_prob: divide each log ratio by its number of scored tokens, as the authors' code does. LSIF on
            summed log ratios overflows or diverges easily.
        cu_seqlens: int32 [2B + 1], boundaries of packed sequences.
        pair_layout: "concatenated" (pair i is sequences i and B + i) or "interleaved" (2i and 2i + 1).
        reduction: "mean" (over the pairs whose responses both have a scored token; unpaired, over the chosen responses
            with one, plus over the rejected), "sum" or "none".
        ignore_index, shift, final_logit_softcapping, temperature, inplace_backward, backend: as in `token_logps`;
            softcapping and temperature apply to both models.

    Returns:
        A `DILOutput`. A pair with a response that has no scored token has loss 0 and no gradient; a batch of nothing
        else gives a differentiable zero.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`, `sequence_logps` and `dil_loss`.
    """
    options = resolve_loss_options(
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
    check_tensors(logits=logits, ref_logits=ref_logits)
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
    counted_in = ("rows in logits", logits) if cu_seqlens is None else ("in cu_seqlens", cu_seqlens)
    ref_logps = resolve_ref_logps(
        ref_chosen_logps,
        ref_rejected_logps,
        S,
        counted_in,
        logits.device,
        options,
        ref_logps=ref_logps,
        is_chosen=is_chosen,
    )
    if (ref_logits is None) == (ref_logps is None):
        sums = "both ref_chosen_logps and ref_rejected_logps" if is_chosen is None else "ref_logps"
        raise ValueError(f"give the reference either as ref_logits, or as {sums}")

    policy_token_logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        final_logit_softcapping=final_logit_softcapping,
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
            final_logit_softcapping=final_logit_softcapping,
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
        is_chosen=is_chosen,
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
    is_chosen: Tensor | None = None,
    ignore_index: int,
    shift: bool,
    backend: str,
) -> DILOutput:
    """The second half of every fused loss: from token log-probs, checked arguments only.

    Args:
        policy_token_logps: [S, T - shift], or packed [N - shift] with `cu_seqlens`; S = 2B for pairs.
        labels: [S, T] or [N].
        cu_seqlens: int32 [S + 1] or None.
        ref_token_logps: shaped as `policy_token_logps`, or None.
        ref_logps: [S] sums in the order of the sequences, or None.
        options: how the loss is taken.
        is_chosen: [S] bool of unpaired responses, or None for pairs.
        ignore_index, shift: what counts as scored.
        backend: the resolved backend that computed the log-probs.
    """
    loss, losses, logratios, logps, lengths, counts = density_ratio(
        policy_token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        is_chosen,
        options.parameters,
        average=options.average_log_prob,
        interleaved=options.interleaved,
        mean=options.reduction != "sum",
        ignore_index=ignore_index,
        shift=shift,
        compiled=sums_are_compiled(backend, policy_token_logps.device),
    )
    loss = _corrected(loss, logratios, lengths, is_chosen, options)
    (chosen_logps, rejected_logps), (chosen_rewards, rejected_rewards), (chosen_lengths, rejected_lengths) = (
        _sides(values, is_chosen, options.interleaved) for values in (logps, logratios, lengths)
    )
    return DILOutput(
        loss=losses if options.reduction == "none" else loss,
        losses=losses,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        counts=counts,
    )


def _sides(values: Tensor, is_chosen: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Chosen and rejected [B] of pairs; of unpaired [S], with 0 on the other side."""
    if is_chosen is None:
        return split_pairs(values, interleaved)
    return torch.where(is_chosen, values, 0), torch.where(is_chosen, 0, values)
