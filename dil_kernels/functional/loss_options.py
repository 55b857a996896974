"""What the fused losses share: their result, their options, and the checks of reference sums and sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dil_kernels.checks import check_choice, check_per_pair, check_tensors, shape_of
from dil_kernels.losses.divergences import LossParameters, get_divergence, resolve_non_negative, resolve_options
from dil_kernels.losses.scalar import total

REDUCTIONS = ("mean", "sum", "none")
PAIR_LAYOUTS = ("concatenated", "interleaved")


class DILOutput(NamedTuple):
    """What the fused losses return. B is the number of pairs; lengths count scored tokens.

    The loss, the losses, the log-probs and the rewards all carry gradients. Of unpaired data (`is_chosen`) every field
    has an entry for each of the S sequences, and the fields of the side that a sequence is not on hold 0, its length
    included.
    """

    loss: Tensor  # [] for reduction "mean" and "sum", [B] for "none"
    losses: Tensor  # [B]
    chosen_logps: Tensor  # [B], sums over tokens
    rejected_logps: Tensor  # [B], sums over tokens
    chosen_rewards: Tensor  # [B], log pi/pi_ref, per token if average_log_prob
    rejected_rewards: Tensor  # [B]
    chosen_lengths: Tensor  # [B] int32
    rejected_lengths: Tensor  # [B] int32
    counts: Tensor  # [2] int32, what the mean divides by: the pairs, twice; unpaired, chosen and rejected sequences

    def share(self, counts: Tensor) -> Tensor:
        """This batch's share in the mean over several, [].

        Summed over micro-batches (and processes) it is the loss of one batch of all of them, exactly.

        Args:
            counts: [2], the `counts` of all batches together.
        """
        chosen, rejected = counts.clamp(min=1).to(self.losses.device)
        return total(self.losses / torch.where(self.chosen_lengths > 0, chosen, rejected))


@dataclass(frozen=True)
class LossOptions:
    """How a fused loss is taken, checked."""

    parameters: LossParameters
    non_negative: float | None
    average_log_prob: bool
    interleaved: bool
    reduction: str


def resolve_loss_options(
    loss_type: str,
    beta: float | None,
    alpha: float,
    average_log_prob: bool,
    pair_layout: str,
    reduction: str,
    *,
    power: float | None = None,
    max_log_ratio: float | None = None,
    non_negative: float | None = None,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> LossOptions:
    """Check the options that all fused losses share.

    Raises:
        ValueError: an unknown name, or an option that the loss does not use.
    """
    parameters = resolve_options(
        loss_type,
        beta,
        alpha,
        power=power,
        max_log_ratio=max_log_ratio,
        chosen_weight=chosen_weight,
        rejected_weight=rejected_weight,
    )
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("pair_layout", pair_layout, PAIR_LAYOUTS)
    return LossOptions(
        parameters=parameters,
        non_negative=resolve_non_negative(parameters, non_negative, reduction),
        average_log_prob=average_log_prob,
        interleaved=pair_layout == "interleaved",
        reduction=reduction,
    )


def resolve_ref_logps(
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    num_sequences: int,
    counted_in: tuple[str, Tensor],
    device: torch.device,
    options: LossOptions,
    *,
    ref_logps: Tensor | None = None,
    is_chosen: Tensor | None = None,
) -> Tensor | None:
    """The reference sums [S] in the order of the sequences, S = 2B for pairs; None if none are given."""
    if is_chosen is None:
        if num_sequences % 2:
            what, tensor = counted_in
            raise ValueError(f"pairs need an even number of sequences, got {num_sequences} {what} {shape_of(tensor)}")
        if ref_logps is not None:
            raise ValueError(
                "ref_logps is for unpaired responses (is_chosen); pairs take ref_chosen_logps and ref_rejected_logps"
            )
        return _merge_ref_logps(ref_chosen_logps, ref_rejected_logps, num_sequences // 2, device, options.interleaved)
    check_is_chosen(is_chosen, num_sequences, device, options)
    if ref_chosen_logps is not None or ref_rejected_logps is not None:
        raise ValueError("ref_chosen_logps and ref_rejected_logps are for pairs; with is_chosen give ref_logps")
    if ref_logps is None:
        return None
    check_per_pair("ref_logps", ref_logps, (num_sequences,), device)
    return ref_logps.detach()


def check_is_chosen(is_chosen: Tensor, num_sequences: int, device: torch.device, options: LossOptions) -> None:
    """Sides of unpaired responses, bool [S], and a loss and a layout that can do without pairs."""
    check_tensors(is_chosen=is_chosen)
    loss_type = options.parameters.loss_type
    if not get_divergence(loss_type).separable:
        raise ValueError(
            f"loss_type={loss_type!r} couples the chosen and the rejected response of a pair: it has no unpaired form"
        )
    if options.interleaved:
        raise ValueError("pair_layout was given, but with is_chosen there are no pairs; leave it 'concatenated'")
    if is_chosen.ndim != 1 or is_chosen.shape[0] != num_sequences:
        raise ValueError(f"is_chosen must be [{num_sequences}], got {shape_of(is_chosen)}")
    if is_chosen.dtype != torch.bool:
        raise TypeError(f"is_chosen must be bool, got {is_chosen.dtype}")
    if is_chosen.device != device:
        raise ValueError(f"is_chosen is on {is_chosen.device}, but {device} is needed")


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
