"""What training and evaluation report of pairs and unpaired responses, kept on the device until it is read."""

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
SUMMED = (*METRICS, "loss/chosen", "loss/rejected")
ROWS_NAMED = 8
ROW_BITS = 40  # a failure is kept as step * 2^40 + row, so that the smallest is the first
NO_FAILURE = 2**63 - 1


def response_metrics(output: DILOutput, unpaired: bool) -> Tensor:
    """SUMMED of every pair or unpaired response, then which of them count: [items, 2 len(SUMMED)], zeros where not."""
    chosen, rejected = output.chosen_lengths > 0, output.rejected_lengths > 0
    pairs = chosen & rejected
    if not unpaired:
        chosen = rejected = pairs
    columns = {
        "loss": (output.losses, pairs),
        "loss/chosen": (output.losses, chosen if unpaired else torch.zeros_like(pairs)),
        "loss/rejected": (output.losses, rejected if unpaired else torch.zeros_like(pairs)),
        "rewards/chosen": (output.chosen_rewards, chosen),
        "rewards/rejected": (output.rejected_rewards, rejected),
        "rewards/margins": (output.chosen_rewards - output.rejected_rewards, pairs),
        "rewards/accuracies": (output.chosen_rewards > output.rejected_rewards, pairs),
        "logps/chosen": (output.chosen_logps, chosen),
        "logps/rejected": (output.rejected_logps, rejected),
    }
    dtype = accumulation_dtype(pairs.device)
    values, counts = zip(*(columns[name] for name in SUMMED), strict=True)
    counted = torch.stack(counts, dim=1)
    summed = torch.where(counted, torch.stack([value.detach().to(dtype) for value in values], dim=1), 0)
    return torch.cat([summed, counted.to(dtype)], dim=1)


def zero_sums(device: torch.device) -> Tensor:
    """The sum of `response_metrics` over nothing: [2 len(SUMMED)]."""
    return torch.zeros(2 * len(SUMMED), dtype=accumulation_dtype(device), device=device)


def means(sums: Tensor) -> dict[str, float]:
    """What is reported, from the sum of `response_metrics`; NaN where nothing counts. Waits for the device.

    Of pairs, METRICS. Of unpaired responses, the means of each side: the loss is the sum of those of the two sides,
    and the margin the difference of their rewards.
    """
    totals, counts = sums.view(2, -1).tolist()
    mean = {name: t / n if n else math.nan for name, t, n in zip(SUMMED, totals, counts, strict=True)}
    sides = [name for name, n in zip(SUMMED, counts, strict=True) if n and name in ("loss/chosen", "loss/rejected")]
    if not sides:
        return {name: mean[name] for name in METRICS}
    mean["loss"] = sum(mean[name] for name in sides)
    mean["rewards/margins"] = mean["rewards/chosen"] - mean["rewards/rejected"]
    return {name: mean[name] for name in SUMMED if name != "rewards/accuracies"}


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
