"""What the fused losses return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dil_kernels.losses.scalar import total


class DILOutput(NamedTuple):
    """What the fused losses return. B is the number of pairs; lengths count scored tokens.

    The loss, the losses, the log-probs and the rewards all carry gradients. Of unpaired data (`is_chosen`) every field
    has an entry for each of the S sequences, and the fields of the side that a sequence is not on hold 0, its length
    included.
    """

    loss: Tensor  #: [] for reduction "mean" and "sum", [B] for "none"
    losses: Tensor  #: [B]
    chosen_logps: Tensor  #: [B], sums over tokens
    rejected_logps: Tensor  #: [B], sums over tokens
    chosen_rewards: Tensor  #: [B], log pi/pi_ref, per token if average_log_prob
    rejected_rewards: Tensor  #: [B]
    chosen_lengths: Tensor  #: [B] int32
    rejected_lengths: Tensor  #: [B] int32
    counts: Tensor  #: [2] int32, what the mean divides by, the pairs, twice; unpaired, chosen and rejected sequences

    def share(self, counts: Tensor) -> Tensor:
        """This batch's share in the mean over several, [].

        Summed over micro-batches (and processes) it is the loss of one batch of all of them, exactly; but for the
        correction of `non_negative`, which couples the responses of one call and is no part of it.

        Args:
            counts: [2], the `counts` of all batches together.
        """
        chosen, rejected = counts.clamp(min=1).to(self.losses.device)
        return total(self.losses / torch.where(self.chosen_lengths > 0, chosen, rejected))
