"""What training and evaluation report of pairs and unpaired responses, kept on the device until it is read."""

from __future__ import annotations

import math

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
SIDE_METRICS = ("loss", "rewards", "logps")
# What `DILTrainer.predict` returns of every pair or unpaired response: fields of `DILOutput`.
PREDICTIONS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_lengths",
    "rejected_lengths",
)


def counted_pairs(output: DILOutput) -> Tensor:
    """Which pairs are in the means, [B] bool: those whose responses both have a scored token."""
    return (output.chosen_lengths > 0) & (output.rejected_lengths > 0)


def pair_metrics(output: DILOutput, beta: float) -> Tensor:
    """METRICS of every pair and, last, whether it is in the means: [B, len(METRICS) + 1], zeros where it is not.

    Args:
        output: of the pairs.
        beta: what makes rewards of log ratios; `LossOptions.factor`.
    """
    counted = counted_pairs(output)
    chosen_rewards, rejected_rewards = beta * output.chosen_rewards, beta * output.rejected_rewards
    metrics = (
        output.losses,
        chosen_rewards,
        rejected_rewards,
        chosen_rewards - rejected_rewards,
        chosen_rewards > rejected_rewards,
        output.chosen_logps,
        output.rejected_logps,
        counted,
    )
    values = torch.stack([metric.detach().to(accumulation_dtype(counted.device)) for metric in metrics], dim=1)
    return torch.where(counted.unsqueeze(1), values, 0)


def predictions(output: DILOutput) -> Tensor:
    """PREDICTIONS of every pair or unpaired response, [B, len(PREDICTIONS)] fp32."""
    return torch.stack([getattr(output, name).detach().float() for name in PREDICTIONS], dim=1)


def means(sums: Tensor) -> dict[str, float]:
    """METRICS averaged over pairs, from the sum of their `pair_metrics`; NaN without a pair. Waits for the device."""
    *totals, count = sums.tolist()
    return {name: total / count if count else math.nan for name, total in zip(METRICS, totals, strict=True)}


def side_metrics(output: DILOutput, beta: float) -> Tensor:
    """SIDE_METRICS of unpaired responses: of the chosen ones and whether each counts, then of the rejected ones.

    Args:
        output, beta: as of `pair_metrics`.

    Returns:
        [S, 2 (len(SIDE_METRICS) + 1)], zeros on the other side and where a response has no scored token.
    """
    columns = []
    for log_ratios, logps, lengths in (
        (output.chosen_rewards, output.chosen_logps, output.chosen_lengths),
        (output.rejected_rewards, output.rejected_logps, output.rejected_lengths),
    ):
        counted = lengths > 0
        dtype = accumulation_dtype(counted.device)
        metrics = (output.losses, beta * log_ratios, logps, counted)
        values = torch.stack([value.detach().to(dtype) for value in metrics], dim=1)
        columns.append(torch.where(counted.unsqueeze(1), values, 0))
    return torch.cat(columns, dim=1)


def side_means(sums: Tensor) -> dict[str, float]:
    """SIDE_METRICS averaged over each side, from the sum of `side_metrics`. Waits for the device.

    The loss is the sum of those of the two sides, and the margin the difference of their rewards; NaN without them.
    """
    out = {}
    for side, (*totals, count) in zip(("chosen", "rejected"), sums.view(2, -1).tolist(), strict=True):
        for name, total in zip(SIDE_METRICS, totals, strict=True):
            out[f"{name}/{side}"] = total / count if count else math.nan
    sides = [loss for loss in (out["loss/chosen"], out["loss/rejected"]) if not math.isnan(loss)]
    return {
        "loss": sum(sides) if sides else math.nan,
        "rewards/margins": out["rewards/chosen"] - out["rewards/rejected"],
        **out,
    }


def batch_metrics(output: DILOutput, unpaired: bool, beta: float) -> Tensor:
    """`pair_metrics` or `side_metrics` of a batch, beside zeros for the other: [items, len(zero_sums)]."""
    paired = torch.zeros(len(output.losses), len(METRICS) + 1, device=output.losses.device)
    sides = torch.zeros(len(output.losses), 2 * (len(SIDE_METRICS) + 1), device=output.losses.device)
    of_batch = [paired, side_metrics(output, beta)] if unpaired else [pair_metrics(output, beta), sides]
    return torch.cat(of_batch, dim=1)


def zero_sums(device: torch.device) -> Tensor:
    """The sum of `batch_metrics` over nothing."""
    size = len(METRICS) + 1 + 2 * (len(SIDE_METRICS) + 1)
    return torch.zeros(size, dtype=accumulation_dtype(device), device=device)


def batch_means(sums: Tensor) -> dict[str, float]:
    """What is reported, from the sum of `batch_metrics`: `side_means` of unpaired responses, else `means` of pairs."""
    pairs, sides = sums.split([len(METRICS) + 1, 2 * (len(SIDE_METRICS) + 1)])
    unpaired = bool(sides[len(SIDE_METRICS)] + sides[-1] > 0)
    return side_means(sides) if unpaired else means(pairs)
