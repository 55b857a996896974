"""The log-prob sums under the reference that a fused loss is given, and the sides of unpaired responses."""

from __future__ import annotations

import torch
from torch import Tensor

from dil_kernels.checks import check_per_pair, check_tensors, shape_of
from dil_kernels.losses.options import FusedLossOptions, LossOptions


def resolve_ref_logps(
    rows: Tensor,
    cu_seqlens: Tensor | None,
    options: FusedLossOptions,
    *,
    name: str,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    is_chosen: Tensor | None = None,
) -> Tensor | None:
    """The reference sums [S] in the order of the sequences, S = 2B for pairs; None if none are given.

    Args:
        rows: [S, ...], or packed with `cu_seqlens` [S + 1].
        cu_seqlens: boundaries.
        options: of the loss.
        name: of the rows, for errors.
        ref_chosen_logps, ref_rejected_logps: [B] of pairs.
        ref_logps: [S] of unpaired responses.
        is_chosen: [S] bool, their sides; None for pairs.
    """
    S = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if is_chosen is None:
        if S % 2:
            what, counted = (f"rows in {name}", rows) if cu_seqlens is None else ("in cu_seqlens", cu_seqlens)
            raise ValueError(f"pairs need an even number of sequences, got {S} {what} {shape_of(counted)}")
        if ref_logps is not None:
            raise ValueError(
                "ref_logps is for unpaired responses (is_chosen); pairs take ref_chosen_logps and ref_rejected_logps"
            )
        return _merge(ref_chosen_logps, ref_rejected_logps, S // 2, rows.device, options.pair_layout == "interleaved")
    if options.pair_layout == "interleaved":
        raise ValueError("pair_layout was given, but with is_chosen there are no pairs; leave it 'concatenated'")
    check_is_chosen(is_chosen, S, rows.device, options)
    if ref_chosen_logps is not None or ref_rejected_logps is not None:
        raise ValueError("ref_chosen_logps and ref_rejected_logps are for pairs; with is_chosen give ref_logps")
    if ref_logps is None:
        return None
    check_per_pair("ref_logps", ref_logps, (S,), rows.device)
    return ref_logps.detach()


def check_is_chosen(is_chosen: Tensor, num_sequences: int, device: torch.device, options: LossOptions) -> None:
    """Sides of unpaired responses, bool [S], and a loss that can do without pairs."""
    check_tensors(is_chosen=is_chosen)
    if not options.separable:
        what = f"link={options.link!r}" if options.divergence.separable else f"loss_type={options.loss_type!r}"
        raise ValueError(f"{what} couples the chosen and the rejected response of a pair: it has no unpaired form")
    if is_chosen.ndim != 1 or is_chosen.shape[0] != num_sequences:
        raise ValueError(f"is_chosen must be [{num_sequences}], got {shape_of(is_chosen)}")
    if is_chosen.dtype != torch.bool:
        raise TypeError(f"is_chosen must be bool, got {is_chosen.dtype}")
    if is_chosen.device != device:
        raise ValueError(f"is_chosen is on {is_chosen.device}, but {device} is needed")


def _merge(
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
