"""Log-probabilities and losses from hidden states and the language-model head, without the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from dil_kernels import reference
from dil_kernels.backends import has_autocast, resolve_backend
from dil_kernels.checks import check_flag, check_head, check_tensors, has_values, shape_of
from dil_kernels.functional.logps import LogitStatistics, eager_logps, prepare_rows
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.functional.memory import default_stash_bytes
from dil_kernels.functional.output import DILOutput
from dil_kernels.functional.reference_logps import resolve_ref_logps
from dil_kernels.functional.vocab_parallel import Checks, check_whole, checked_together, group_of, local_part
from dil_kernels.losses.options import FusedLossKeywords, FusedLossOptions
from dil_kernels.ops.head_steps import HeadProcessing
from dil_kernels.ops.linear import linear_logps
from dil_kernels.ops.linear_head import TILE_SHAPES, stash_rows_within
from dil_kernels.ops.linear_shards import linear_shard_logps
from dil_kernels.ops.vocab_parallel import IGNORED, Shard, ToShards
from dil_kernels.options import HeadKeywords, HeadOptions, split, takes


class FusedHeadKeywords(FusedLossKeywords, HeadKeywords, total=False):
    """See `FusedLossOptions` and `HeadOptions`."""


class Scored(NamedTuple):
    """Log-probs in the shape of the labels, one shorter with a shift; their statistics; the backend that ran."""

    logps: Tensor
    statistics: LogitStatistics | None
    backend: str


def _as_autocast(tensor: Tensor | None) -> Tensor | None:
    """In the precision that torch.autocast gives matrix products, where it is on."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _num_rows(targets: Tensor, options: HeadOptions) -> int:
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


def _beyond_bound(targets: Tensor, options: HeadOptions) -> Tensor:
    """Scored positions [B, T] for which `max_scored_tokens` leaves no place; on the CPU they raise."""
    scored = targets != options.ignore_index
    return scored & (scored.flatten().cumsum(0).view(scored.shape) > _num_rows(targets, options))


class CheckedHead(NamedTuple):
    """What is scored, and by what; of a head that is split over processes, the part of this one."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor
    bias: Tensor | None
    labels: Tensor  # [B, T]
    targets: Tensor  # [B, T], the label that each position predicts
    rows: int  # to make place for
    backend: str
    one_sequence: bool  # which was given without B


def checked_heads(
    options: HeadOptions,
    hidden_states: Tensor,
    weights: Mapping[str, Tensor | None],
    *,
    return_statistics: bool = False,
) -> contextlib.AbstractContextManager[Checks]:
    """While this is entered, arguments are checked, on all processes that have parts of the heads together.

    Args:
        options: how they score.
        hidden_states: for one of them.
        weights: and biases, by name, which are split alike.
        return_statistics: whether they are asked for.
    """
    check_tensors(hidden_states=hidden_states, **weights)
    split_over = {name: (weight, 0) for name, weight in weights.items()}
    return checked_together(group_of(options.process_group, split_over), hidden_states, options, return_statistics)


def check_scored_head(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    labels: Tensor,
    options: HeadOptions,
    checks: Checks,
    *,
    names: tuple[str, str, str] = ("hidden_states", "lm_head_weight", "lm_head_bias"),
) -> CheckedHead:
    """The checks of `linear_token_logps`, of a head that may be a DTensor; errors call the three tensors by `names`."""
    tensors = (hidden_states, lm_head_weight, lm_head_bias)
    check_tensors(**dict(zip(names, tensors, strict=True)), labels=labels)
    check_whole(names[0], hidden_states)
    hidden, weight, bias = (_as_autocast(local_part(tensor)) for tensor in tensors)
    assert hidden is not None
    assert weight is not None
    ignore_index, shift, split_over = options.ignore_index, options.shift, checks.group is not None
    check_head(hidden, weight, bias, labels, ignore_index=ignore_index, shift=shift, names=names, part=split_over)
    options.check_dtype(hidden.dtype)
    backend = resolve_backend(options.backend, hidden.device, hidden.dtype)
    one_sequence = labels.ndim == 1
    if one_sequence:
        hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
    # torch's pad takes a float, which does not hold every int64.
    unscored = labels.new_full((labels.shape[0], 1), ignore_index)
    targets = torch.cat([labels[:, 1:], unscored], 1) if shift else labels
    rows = _num_rows(targets, options)
    if split_over:
        sizes = {f"the hidden size of {names[0]}": hidden.shape[-1], "the number of rows": rows}
        sizes["the number of positions"] = labels.numel()
        checks.found(weight, lm_head_weight, 0, targets, **sizes)
    return CheckedHead(hidden, weight, bias, labels, targets, rows, backend, one_sequence)


def head_logps(
    checked: CheckedHead, options: HeadOptions, shard: Shard | None = None, *, return_statistics: bool = False
) -> Scored:
    """As `linear_token_logps`."""
    if shard is not None:
        labels, targets = (shard.own_labels(x, options.ignore_index) for x in (checked.labels, checked.targets))
        checked = checked._replace(labels=labels, targets=targets)
        options = replace(options, ignore_index=IGNORED)
    compute = _eager_logps if checked.backend == "eager" else _fused_logps
    logps, stats = compute(checked, options, return_statistics, shard)
    if checked.one_sequence:
        logps = logps.squeeze(0)
        stats = None if stats is None else LogitStatistics(*(s.squeeze(0) for s in stats))
    return Scored(logps, stats, checked.backend)


def _eager_logps(
    checked: CheckedHead, options: HeadOptions, return_statistics: bool, shard: Shard | None
) -> tuple[Tensor, LogitStatistics | None]:
    hidden, labels = checked.hidden, checked.labels
    if shard is not None:
        hidden = ToShards.apply(hidden, shard.group)
    logits = reference.linear_logits(hidden, checked.weight, checked.bias, labels, options)
    logps, stats = eager_logps(logits, labels, options, shard, return_statistics=return_statistics)
    if options.max_scored_tokens is not None:
        beyond = _beyond_bound(checked.targets, options)[:, : logps.shape[1]]
        logps = logps.masked_fill(beyond, torch.nan)
        if stats is not None:
            mean, entropy = (x.masked_fill(beyond, torch.nan) for x in stats[:2])
            stats = LogitStatistics(mean, entropy, stats.top1_hit & ~beyond)
    return logps, stats


def _fused_logps(
    checked: CheckedHead, options: HeadOptions, return_statistics: bool, shard: Shard | None
) -> tuple[Tensor, LogitStatistics | None]:
    """The same from the ops."""
    hidden, weight, bias, labels, targets, rows, backend, _ = checked
    T_out = labels.shape[1] - int(options.shift)
    stash_bytes = default_stash_bytes(hidden.device) if options.stash_bytes is None else options.stash_bytes
    ignore_index, _, softcap, temperature = options.processing
    how = HeadProcessing(options.logit_scale, softcap, temperature, *TILE_SHAPES["cuda" if hidden.is_cuda else "cpu"])
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight.contiguous(), bias, targets.reshape(-1), how)
    rows_to_keep = stash_rows_within(stash_bytes, rows, weight.shape[0], weight.dtype)
    given: dict[str, Any] = {"rows": rows, "stash_rows": rows_to_keep, "statistics": return_statistics}
    if shard is None:
        flat, raw = linear_logps(*inputs, ignore_index=ignore_index, backend=backend, **given)
    else:
        flat, raw = linear_shard_logps(*inputs, shard, backend=backend, **given)
    logps = flat.view(labels.shape)[:, :T_out].contiguous()
    if not return_statistics:
        return logps, None
    mean, entropy, hit = (s.view(labels.shape)[:, :T_out] for s in raw)
    return logps, LogitStatistics(mean, entropy, hit != 0)


@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = ...,
    return_statistics: Literal[False] = ...,
    **options: Unpack[HeadKeywords],
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = ...,
    return_statistics: Literal[True],
    **options: Unpack[HeadKeywords],
) -> tuple[Tensor, LogitStatistics]: ...


@takes(HeadOptions)
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[HeadKeywords],
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
        return_statistics: also return mean logit, entropy and top-1 hit of each position.
        options: the fields of `HeadOptions`.

    Returns:
        As `token_logps`. Differentiable once, in hidden states, weight and bias.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logps`.
    """
    (head,) = split("linear_token_logps", options, HeadOptions)
    weights, with_statistics = {"lm_head_weight": lm_head_weight, "lm_head_bias": lm_head_bias}, bool(return_statistics)
    with checked_heads(head, hidden_states, weights, return_statistics=with_statistics) as checks:
        checked = check_scored_head(hidden_states, lm_head_weight, lm_head_bias, labels, head, checks)
    scored = head_logps(checked, head, checks.shard(), return_statistics=with_statistics)
    return scored.logps if scored.statistics is None else (scored.logps, scored.statistics)


@takes(HeadOptions)
def linear_sequence_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average_log_prob: bool = False,
    lm_head_bias: Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> Tensor:
    """Log-probability of each sequence from hidden states and the head.

    Args:
        hidden_states: [B, T, D]; packed [1, N, D] or [N, D] with `cu_seqlens`.
        lm_head_weight: [V, D].
        labels: [B, T]; [1, N] or [N] with `cu_seqlens`.
        cu_seqlens, average_log_prob: as in `sequence_logps`.
        lm_head_bias: [V].
        options: the fields of `HeadOptions`.

    Returns:
        [B] or [S]; 0 for a sequence without a scored token.

    Raises:
        ValueError, TypeError, RuntimeError: as `sequence_logps`.
    """
    (head,) = split("linear_sequence_logps", options, HeadOptions)
    check_flag("average_log_prob", average_log_prob)
    with checked_heads(head, hidden_states, {"lm_head_weight": lm_head_weight, "lm_head_bias": lm_head_bias}) as checks:
        hidden_states, labels = prepare_rows(hidden_states, labels, cu_seqlens, head, "hidden_states", "D")
        checked = check_scored_head(hidden_states, lm_head_weight, lm_head_bias, labels, head, checks)
    logps = head_logps(checked, head, checks.shard()).logps
    return reference.sequence_logps(logps, labels, cu_seqlens, average_log_prob=average_log_prob, options=head)


@takes(FusedLossOptions, HeadOptions)
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
    cu_seqlens: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    **options: Unpack[FusedHeadKeywords],
) -> DILOutput:
    """DIL loss from hidden states and the head (arXiv 2503.05079, eq. 19), without the logits.

    What is done to logits (scale, softcapping, temperature) is done to those of both models.

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
        cu_seqlens: int32 [2B + 1], boundaries of packed sequences.
        lm_head_bias: [V].
        options: the fields of `FusedLossOptions` and `HeadOptions`.

    Returns:
        A `DILOutput`, as of `fused_dil_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_token_logps` and `fused_dil_loss`.
    """
    loss_options, head = split("fused_linear_dil_loss", options, FusedLossOptions, HeadOptions)
    check_tensors(hidden_states=hidden_states, ref_hidden_states=ref_hidden_states)
    heads = {"lm_head_weight": lm_head_weight, "lm_head_bias": lm_head_bias}
    heads |= {"ref_lm_head_weight": ref_lm_head_weight, "ref_lm_head_bias": ref_lm_head_bias}
    with checked_heads(head, hidden_states, heads) as checks:
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
        hidden_states, labels = prepare_rows(hidden_states, labels, cu_seqlens, head, "hidden_states", "D")
        ref_logps = resolve_ref_logps(
            hidden_states,
            cu_seqlens,
            loss_options,
            name="hidden_states",
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            ref_logps=ref_logps,
            is_chosen=is_chosen,
        )
        if (ref_hidden_states is None) == (ref_logps is None):
            sums = "both ref_chosen_logps and ref_rejected_logps" if is_chosen is None else "ref_logps"
            raise ValueError(f"give the reference either as ref_hidden_states and ref_lm_head_weight, or as {sums}")
        of_reference = None
        if ref_hidden_states is not None:
            assert ref_lm_head_weight is not None
            names = ("ref_hidden_states", "ref_lm_head_weight", "ref_lm_head_bias")
            tensors = (ref_hidden_states, ref_lm_head_weight, ref_lm_head_bias)
            of_reference = check_scored_head(*tensors, labels, head, checks, names=names)
        of_policy = check_scored_head(hidden_states, lm_head_weight, lm_head_bias, labels, head, checks)
    shard = checks.shard()
    policy = head_logps(of_policy, head, shard)
    ref_token_logps = None
    if of_reference is not None:
        with torch.no_grad():
            ref_token_logps = head_logps(of_reference, head, shard).logps
    return loss_of_token_logps(
        policy.logps,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        loss_options,
        head,
        is_chosen=is_chosen,
        backend=policy.backend,
    )
