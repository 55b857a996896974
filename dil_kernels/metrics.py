"""What training and evaluation report of the pairs, kept on the device until it is read."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dil_kernels.functional import DILOutput
from dil_kernels.reference import accumulation_dtype

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
ROWS_NAMED = 8
ROW_BITS = 40  # a failure is kept as step * 2^40 + row, so that the smallest is the first
NO_FAILURE = 2**63 - 1


def counted_pairs(output: DILOutput) -> Tensor:
    """Which pairs are in the means, [B] bool: those whose responses both have a scored token."""
    return (output.chosen_lengths > 0) & (output.rejected_lengths > 0)


def pair_metrics(output: DILOutput) -> Tensor:
    """METRICS of every pair and, last, whether it is in the means: [B, len(METRICS) + 1], zeros where it is not."""
    counted = counted_pairs(output)
    metrics = (
        output.losses,
        output.chosen_rewards,
        output.rejected_rewards,
        output.chosen_rewards - output.rejected_rewards,
        output.chosen_rewards > output.rejected_rewards,
        output.chosen_logps,
        output.rejected_logps,
        counted,
    )
    values = torch.stack([metric.detach().to(accumulation_dtype(counted.device)) for metric in metrics], dim=1)
    return torch.where(counted.unsqueeze(1), values, 0)


def zero_sums(device: torch.device) -> Tensor:
    """The sum of `pair_metrics` over no pair: [len(METRICS) + 1]."""
    return torch.zeros(len(METRICS) + 1, dtype=accumulation_dtype(device), device=device)


def means(sums: Tensor) -> dict[str, float]:
    """METRICS averaged over pairs, from the sum of their `pair_metrics`; NaN without a pair. Waits for the device."""
    *totals, count = sums.tolist()
    return {name: total / count if count else math.nan for name, total in zip(METRICS, totals, strict=True)}


class NonFinitePairs:
    """The first pairs whose loss was not finite, found without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((ROWS_NAMED,), NO_FAILURE, device=device)

    def add(self, losses: Tensor, rows: Tensor | None, step: int) -> None:
        """Look at the losses [B] of a micro-batch of an optimizer step.

        Args:
            losses: of each pair.
            rows: the place of each pair in the data set, counted from 1; None if unknown.
            step: counted from 1.
        """
        keys = torch.full_like(losses, step << ROW_BITS, dtype=torch.int64)
        if rows is not None:
            keys += rows
        keys = keys.masked_fill(losses.detach().isfinite(), NO_FAILURE)
        self._first = torch.cat([self._first, keys]).topk(ROWS_NAMED, largest=False).values

    def check(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Raise, on every process alike, if a loss was not finite. Waits for the device.

        Args:
            gather: concatenates a tensor over all processes.

        Raises:
            FloatingPointError: names the first step with such a loss, and its rows.
        """
        failures = sorted(key for key in gather(self._first).tolist() if key != NO_FAILURE)
        if not failures:
            return
        step = failures[0] >> ROW_BITS
        rows = sorted({key - (step << ROW_BITS) for key in failures if key >> ROW_BITS == step} - {0})
        raise FloatingPointError(
            f"the loss of step {step} is not finite on row(s) {', '.join(map(str, rows[:ROWS_NAMED])) or 'unknown'} of "
            f"the training data (counted from 1, at most {ROWS_NAMED} named): look at these rows, or if they are "
            "sound, lower the learning rate; no checkpoint was written since"
        )
