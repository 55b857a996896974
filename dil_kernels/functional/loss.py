"""The density-ratio loss of responses, from per-sequence log-probabilities or straight from logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from dil_kernels.backends import sums_are_compiled
from dil_kernels.checks import check_choice, check_dtype, check_per_pair, check_tensors, shape_of
from dil_kernels.functional.logps import check_scored_logits, checked_logits, logps_of_labels, prepare_rows
from dil_kernels.functional.output import DILOutput
from dil_kernels.functional.reference_logps import check_is_chosen, resolve_ref_logps
from dil_kernels.losses.options import (
    FusedLossKeywords,
    FusedLossOptions,
    LossKeywords,
    LossOptions,
    SequenceOptions,
)
from dil_kernels.losses.scalar import non_negative_loss, total
from dil_kernels.ops.density_ratio import density_ratio
from dil_kernels.options import LogitsKeywords, LogitsOptions, ScoringOptions, split, takes
from dil_kernels.reference import DEFAULTS, accumulation_dtype, split_pairs


class FusedLogitsKeywords(FusedLossKeywords, LogitsKeywords, total=False):
    """See `FusedLossOptions` and `LogitsOptions`."""


@takes(LossOptions)
def dil_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    backend: str = "auto",
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, Tensor, Tensor]:
    """Density-ratio loss from per-sequence log-probs, the contract that trainers share.

    Takes log-probs as given and normalises nothing: LSIF and UKL on summed log-probs of long responses overflow; divide
    by the lengths first, or use `fused_dil_loss`, which knows them.

    Args:
        policy_chosen_logps: [B] fp32 or fp64 (lower precisions cannot hold a sum of log-probs).
        policy_rejected_logps: [B].
        ref_chosen_logps: [B], constant.
        ref_rejected_logps: [B], constant.
        backend: "auto" (the extension, where it was built) or "eager".
        options: the fields of `LossOptions`.

    Returns:
        losses ([B], or [] if reduced), chosen_rewards [B] and rejected_rewards [B]: the log ratios, detached. A loss
        that overflows is infinite, never NaN.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
    """
    (loss_options,) = split("dil_loss", options, LossOptions)
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
        loss_options,
        backend,
    )
    chosen_rewards, rejected_rewards = rewards.chunk(2)
    return loss, chosen_rewards, rejected_rewards


@takes(LossOptions)
def unpaired_dil_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    is_chosen: Tensor,
    *,
    backend: str = "auto",
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, Tensor]:
    """`dil_loss` of responses that do not come in pairs: each is chosen or rejected, in any order and number.

    A chosen response has the loss ``chosen_weight [-A(u) + alpha P(u)]``, a rejected one
    ``rejected_weight (1 - alpha) P(u)``. The mean is that over the chosen ones plus that over the rejected ones: the
    mean over pairs, where all are in pairs. The loss must be separable.

    Args:
        policy_logps: [S] fp32 or fp64.
        ref_logps: [S], constant.
        is_chosen: [S] bool.
        backend: as in `dil_loss`.
        options: the fields of `LossOptions`.

    Returns:
        losses ([S], or [] if reduced) and rewards [S]: the log ratios, detached.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
    """
    (loss_options,) = split("unpaired_dil_loss", options, LossOptions)
    check_tensors(policy_logps=policy_logps)
    for name, tensor in (("policy_logps", policy_logps), ("ref_logps", ref_logps)):
        check_per_pair(name, tensor, policy_logps.shape[:1], policy_logps.device)
    check_is_chosen(is_chosen, policy_logps.shape[0], policy_logps.device, loss_options)
    return _loss_of_sums(policy_logps, ref_logps, is_chosen, loss_options, backend)


def _loss_of_sums(
    policy_logps: Tensor, ref_logps: Tensor, is_chosen: Tensor | None, options: LossOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """Losses, reduced as asked, and detached log ratios, from sums [S]."""
    check_choice("backend", backend, ("auto", "eager"))
    every_value = SequenceOptions(False, False, options.reduction != "sum", -100, False)
    tensors = (policy_logps.unsqueeze(1), None, None, None, ref_logps.detach(), is_chosen)
    loss, losses, logratios, *_ = _loss_of_sequences(*tensors, options, every_value, backend)
    return losses if options.reduction == "none" else loss, logratios.detach()


def _loss_of_sequences(
    token_logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    is_chosen: Tensor | None,
    options: LossOptions,
    of_sequences: SequenceOptions,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `density_ratio` gives, loss and losses with all that the options ask for."""
    loss, losses, logratios, logps, lengths, counts = density_ratio(
        token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        is_chosen,
        options.parameters,
        of_sequences,
        compiled=sums_are_compiled(backend, token_logps.device),
    )
    loss = _corrected(loss, logratios, lengths, is_chosen, options, interleaved=of_sequences.interleaved)
    loss, losses = _with_nll(loss, losses, logps, lengths, counts, is_chosen, options, of_sequences)
    return loss, losses, logratios, logps, lengths, counts


def _corrected(
    loss: Tensor,
    logratios: Tensor,
    lengths: Tensor,
    is_chosen: Tensor | None,
    options: LossOptions,
    *,
    interleaved: bool,
) -> Tensor:
    """The loss with the non-negative correction, if it is asked for."""
    if options.non_negative is None:
        return loss
    u = logratios.to(accumulation_dtype(logratios.device))
    counted = lengths > 0
    if is_chosen is None:
        u_w, u_l = split_pairs(u, interleaved)
        pairs = torch.logical_and(*split_pairs(counted, interleaved))
        sides = (u_w, pairs, u_l, pairs)
    else:
        sides = (u, counted & is_chosen, u, counted & ~is_chosen)
    return non_negative_loss(loss, *sides, options.parameters, float(options.non_negative))


def _with_nll(
    loss: Tensor,
    losses: Tensor,
    logps: Tensor,
    lengths: Tensor,
    counts: Tensor,
    is_chosen: Tensor | None,
    options: LossOptions,
    of_sequences: SequenceOptions,
) -> tuple[Tensor, Tensor]:
    """Loss [] and losses [B] or [S], with the weighted negative log-likelihood per token of the chosen responses."""
    if options.nll_weight == 0.0:
        return loss, losses
    if is_chosen is None:
        counted = torch.logical_and(*split_pairs(lengths > 0, of_sequences.interleaved))
        logps, lengths = (split_pairs(values, of_sequences.interleaved)[0] for values in (logps, lengths))
    else:
        counted = (lengths > 0) & is_chosen
    wide = logps.to(accumulation_dtype(logps.device))
    nll = torch.where(counted, options.nll_weight * (-wide / lengths.clamp(min=1)), 0)
    share = nll.sum() / counts[0].clamp(min=1) if of_sequences.mean else nll.sum()
    # What is infinite against each other is +inf, as in every sum of losses.
    both = torch.where(nll.isposinf() & losses.isneginf(), nll, losses + nll)
    return total(torch.stack([loss.to(wide.dtype), share])).to(loss.dtype), both.to(losses.dtype)


@takes(FusedLossOptions, LogitsOptions)
def fused_dil_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    is_chosen: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[FusedLogitsKeywords],
) -> DILOutput:
    """DIL loss of preference pairs, or of unpaired responses, straight from logits (arXiv 2503.05079, eq. 19).

    What is done to logits (softcapping, temperature) is done to those of both models.

    Args:
        logits: [2B, T, V], chosen and rejected responses under the policy; packed [1, N, V] or [N, V] with
            `cu_seqlens`.
        labels: [2B, T] int64; [1, N] or [N] if packed. `ignore_index` where not scored (prompt, padding).
        ref_chosen_logps: [B], summed log-probs of the chosen responses under the reference model.
        ref_rejected_logps: [B], likewise for the rejected responses.
        ref_logits: the logits of the reference model, shaped as `logits`; give either these or both sums. The log ratio
            is then summed token by token, which is more exact than the difference of two sums.
        ref_logps: [S], summed log-probs under the reference model, with `is_chosen`.
        is_chosen: [S] bool, for S responses that do not come in pairs, as in `unpaired_dil_loss`; each row of logits
            (or segment) is then one of them, and the reference sums come as `ref_logps`.
        cu_seqlens: int32 [2B + 1], boundaries of packed sequences.
        options: the fields of `FusedLossOptions` and `LogitsOptions`.

    Returns:
        A `DILOutput`. A pair with a response that has no scored token has loss 0 and no gradient; a batch of nothing
        else gives a differentiable zero.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`, `sequence_logps` and `dil_loss`.
    """
    loss_options, scoring = split("fused_dil_loss", options, FusedLossOptions, LogitsOptions)
    with checked_logits(logits, scoring, ref_logits=ref_logits) as checks:
        check_dtype("logits", logits)
        if ref_logits is not None and ref_logits.shape != logits.shape:
            raise ValueError(f"ref_logits must be {shape_of(logits)} as logits, got {shape_of(ref_logits)}")
        if ref_logits is not None:
            check_dtype("ref_logits", ref_logits)
        if ref_logits is not None and ref_logits.device != logits.device:
            raise ValueError(f"ref_logits are on {ref_logits.device}, but logits are on {logits.device}")
        if ref_logits is not None and cu_seqlens is not None and ref_logits.ndim == 3:
            ref_logits = ref_logits.squeeze(0)
        logits, labels = prepare_rows(logits, labels, cu_seqlens, scoring)
        ref_logps = resolve_ref_logps(
            logits,
            cu_seqlens,
            loss_options,
            name="logits",
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            ref_logps=ref_logps,
            is_chosen=is_chosen,
        )
        if (ref_logits is None) == (ref_logps is None):
            sums = "both ref_chosen_logps and ref_rejected_logps" if is_chosen is None else "ref_logps"
            raise ValueError(f"give the reference either as ref_logits, or as {sums}")
        of_reference, out_of_place = None, replace(scoring, inplace_backward=False)
        if ref_logits is not None:
            of_reference = check_scored_logits(ref_logits.detach(), labels, out_of_place, checks)
        checked = check_scored_logits(logits, labels, scoring, checks)
    shard = checks.shard()
    policy_token_logps, _ = logps_of_labels(checked, scoring, shard)
    ref_token_logps = None
    if of_reference is not None:
        ref_token_logps, _ = logps_of_labels(of_reference, out_of_place, shard)
    return loss_of_token_logps(
        policy_token_logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        loss_options,
        scoring,
        is_chosen=is_chosen,
        backend=checked.backend,
    )


def loss_of_token_logps(
    policy_token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    options: FusedLossOptions,
    scoring: ScoringOptions = DEFAULTS,
    *,
    is_chosen: Tensor | None = None,
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
        scoring: what counts as scored.
        is_chosen: [S] bool of unpaired responses, or None for pairs.
        backend: the resolved backend that computed the log-probs.
    """
    of_sequences = options.of_sequences(scoring)
    tensors = (policy_token_logps, labels, cu_seqlens, ref_token_logps, ref_logps, is_chosen)
    results = _loss_of_sequences(*tensors, options, of_sequences, backend)
    loss, losses, logratios, logps, lengths, counts = results
    sides = [_sides(values, is_chosen, of_sequences.interleaved) for values in (logps, logratios, lengths)]
    (chosen_logps, rejected_logps), (chosen_rewards, rejected_rewards), (chosen_lengths, rejected_lengths) = sides
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
