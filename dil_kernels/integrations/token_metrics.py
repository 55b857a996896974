"""What TRL logs of the scored tokens, as sums that stay on the device until they are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dil_kernels.data.batches import Batch
from dil_kernels.functional import DILOutput
from dil_kernels.functional.logps import LogitStatistics
from dil_kernels.reference import accumulation_dtype
from dil_kernels.training.metrics import counted_pairs

COLUMNS = ("chosen_tokens", "rejected_tokens", "entropy", "chosen_logits", "rejected_logits", "chosen_hits")


def token_sums(statistics: LogitStatistics, output: DILOutput, batch: Batch) -> Tensor:
    """COLUMNS of every pair [B, len(COLUMNS)], zeros where it does not count.

    Args:
        statistics: [2B, T - 1] each, or [1, N - 1] of joined rows.
        output: of the same batch.
        batch: of B pairs.
    """
    dtype = accumulation_dtype(output.losses.device)
    entropy, mean_logit, hits = (
        batch.sums(batch.of_rows(values)).chunk(2)
        for values in (statistics.entropy, statistics.mean_logit, statistics.top1_hit)
    )
    columns = (
        output.chosen_lengths.to(dtype),
        output.rejected_lengths.to(dtype),
        entropy[0] + entropy[1],
        *mean_logit,
        hits[0],
    )
    return torch.where(counted_pairs(output).unsqueeze(1), torch.stack(columns, dim=1), 0)


def token_means(sums: Tensor) -> dict[str, float]:
    """The metrics under TRL's names, from the sum of `token_sums` over pairs. Waits for the device.

    Returns:
        entropy (nats) over all tokens, logits/chosen and logits/rejected (means over the vocabulary), and
        mean_token_accuracy: how often a chosen token was the likeliest. NaN without a token.
    """
    values = dict(zip(COLUMNS, sums.tolist(), strict=True))
    chosen, rejected = values["chosen_tokens"], values["rejected_tokens"]
    ratios = {
        "entropy": (values["entropy"], chosen + rejected),
        "logits/chosen": (values["chosen_logits"], chosen),
        "logits/rejected": (values["rejected_logits"], rejected),
        "mean_token_accuracy": (values["chosen_hits"], chosen),
    }
    return {name: total / count if count else math.nan for name, (total, count) in ratios.items()}
