"""What is watched of the training losses, on the device: pairs that are not finite, log ratios that are too large."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dil_kernels.functional import DILOutput, dil_loss
from dil_kernels.losses import LossOptions
from dil_kernels.training.checkpoints import where_to_resume

Gather = Callable[[Tensor], Tensor]

ROWS_NAMED = 8
ROW_BITS = 40  # a failure is kept as step * 2^40 + row, so that the smallest is the first
NO_FAILURE = 2**63 - 1
SIDES = ("chosen", "rejected")
# The norm of the gradients and AdamW's second moment square them: beyond the root of the largest fp32 number, the
# square of a gradient coefficient alone is infinite. LSIF's e^(2u) reaches it at u = 22.18, half way to its overflow.
LARGEST_COEFFICIENT = math.sqrt(torch.finfo(torch.float32).max)
# Per token, e^5 = 148 is more than the perplexity of any text that a language model was trained on.
LARGEST_PER_TOKEN = 5.0


class NonFinitePairs:
    """The first pairs whose loss was not finite, found without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((ROWS_NAMED,), NO_FAILURE, device=device)
        # Of each: chosen and rejected log ratio, then the scored tokens of the two.
        self._values = torch.zeros(ROWS_NAMED, 2 * len(SIDES), device=device)

    def add(self, output: DILOutput, rows: Tensor | None, step: int) -> None:
        """Look at the losses of a micro-batch of an optimizer step.

        Args:
            output: of the micro-batch.
            rows: [B], the place of each pair (unpaired, response) in the data set, from 1; None if unknown.
            step: counted from 1.
        """
        keys = torch.full_like(output.losses, step << ROW_BITS, dtype=torch.int64)
        if rows is not None:
            keys += rows
        keys = keys.masked_fill(output.losses.detach().isfinite(), NO_FAILURE)
        columns = (output.chosen_rewards, output.rejected_rewards, output.chosen_lengths, output.rejected_lengths)
        values = torch.stack([column.detach().float() for column in columns], dim=1)
        self._first, kept = torch.cat([self._first, keys]).topk(ROWS_NAMED, largest=False)
        self._values = torch.cat([self._values, values])[kept]

    def check(self, gather: Gather, output_dir: str | os.PathLike[str] | None) -> None:
        """Raise, on every process alike, if a loss was not finite. Waits for the device.

        Args:
            gather: concatenates a tensor over all processes.
            output_dir: where the checkpoints are.

        Raises:
            FloatingPointError: names the first step with such a loss, its rows, their log ratios and the last good
                checkpoint.
        """
        keys = gather(self._first).tolist()
        if min(keys) == NO_FAILURE:
            return
        step = min(keys) >> ROW_BITS
        resume = where_to_resume(str(output_dir), step)
        failures = sorted(zip(keys, gather(self._values).tolist(), strict=True), key=lambda failure: failure[0])
        named = {key - (step << ROW_BITS): values for key, values in failures if key >> ROW_BITS == step}
        rows = "; ".join(_describe_row(row, values) for row, values in list(named.items())[:ROWS_NAMED])
        suspects = "these rows, and at the weights that were given" if step == 1 else "these rows"
        raise FloatingPointError(
            f"the loss of step {step} is not finite on {rows} (rows of the training data, counted from 1, at most "
            f"{ROWS_NAMED} named): look at {suspects}, or if they are sound, lower the learning rate; {resume}"
        )


def _describe_row(row: int, values: list[float]) -> str:
    ratios, lengths = values[: len(SIDES)], values[len(SIDES) :]
    sides = [
        f"{side} {ratio:.4g} ({length:.0f} tokens)"
        for side, ratio, length in zip(SIDES, ratios, lengths, strict=True)
        if length
    ]
    return f"row {row or 'unknown'}, log ratio {', '.join(sides)}"


class LogRatioRange:
    """The extreme log ratios since they were last looked at, found without waiting for the device; warned of once.

    Too large is a sum whose gradient could not be squared in fp32 (`safe_log_ratios`), or +-5 per token.

    Args:
        loss_options: the keywords of the fused losses that define the loss.
        average_log_prob: whether the log ratios are per token.
        device: of the losses.
    """

    def __init__(self, loss_options: Mapping[str, Any], average_log_prob: bool, device: torch.device) -> None:
        self._loss_type = str(loss_options["loss_type"])
        self._per_token = average_log_prob
        limits = torch.tensor(safe_log_ratios(loss_options))
        self._unbounded = bool(limits.isfinite().any()) and loss_options.get("link", "imitation") == "imitation"
        self._limits = limits.clamp(max=LARGEST_PER_TOKEN) if average_log_prob else limits
        self._extremes = torch.zeros(4, device=device)  # the largest u_w, -u_w, u_l and -u_l
        self._warned = False

    def add(self, output: DILOutput) -> None:
        """Look at the log ratios of a micro-batch; `NonFinitePairs` reports those that are NaN."""
        chosen, rejected = output.chosen_rewards.detach(), output.rejected_rewards.detach()
        extremes = torch.stack([chosen, -chosen, rejected, -rejected]).float().nan_to_num(0.0, math.inf, -math.inf)
        self._extremes = torch.maximum(self._extremes, extremes.amax(1))

    def warning(self, gather: Gather) -> str | None:
        """What to say, the first time that a log ratio was too large; None otherwise. Waits for the device.

        Args:
            gather: concatenates a tensor over all processes, on all of which this is called.
        """
        if self._warned:
            return None
        extremes = gather(self._extremes.unsqueeze(0)).amax(0).cpu()
        self._extremes.zero_()
        excess = torch.where(extremes > self._limits, extremes / self._limits, 0)
        if not excess.any():
            return None
        self._warned = True
        worst = int(excess.argmax())
        sign = "-" if worst % 2 else ""
        return self._describe(SIDES[worst // 2], f"{sign}{extremes[worst]:.4g}", f"{sign}{self._limits[worst]:.4g}")

    def _describe(self, side: str, value: str, limit: str) -> str:
        remedies = ["lower learning_rate"]
        if self._per_token:
            reached = f"{value} per token, beyond {limit}: the model has moved very far from the reference"
        else:
            remedies.append("set average_log_prob=True")
            reached = (
                f"{value}, beyond {limit}: the square of the gradient of {self._loss_type!r}, which the gradient norm "
                "and AdamW take, overflows there in fp32"
            )
        remedies.append("bound the log ratios with max_log_ratio")
        if self._unbounded:
            remedies += ["give the chosen responses an optimum with alpha > 0", "take a bounded loss_type (bce, brier)"]
        return f"a {side} log ratio reached {reached}; {', or '.join(remedies)} (said once)"


def safe_log_ratios(loss_options: Mapping[str, Any]) -> list[float]:
    """How large u_w, -u_w, u_l and -u_l may be before the square of the gradient there overflows in fp32, to 0.01.

    Args:
        loss_options: keywords of `dil_loss`; a bounded gradient has the limit inf.
    """
    link = loss_options.get("link", "imitation")
    factor = LossOptions(**loss_options).factor
    farthest = max(1.0, 1.0 / factor) if factor > 0.0 else 1.0
    u = torch.arange(-8900, 8901, dtype=torch.float64) / 100 * farthest  # beyond 88.7, exp(beta u) is infinite in fp32
    zeros = torch.zeros_like(u)
    limits = []
    for side in range(len(SIDES)):
        ratios = u.clone().requires_grad_()
        other = -u if link == "ratio" else zeros  # only their difference counts: at its largest
        u_w, u_l = (ratios, other) if side == 0 else (other, ratios)
        losses, _, _ = dil_loss(u_w, u_l, zeros, zeros, backend="eager", **loss_options)
        (gradient,) = torch.autograd.grad(losses.sum(), ratios)
        unsafe = ~(gradient.abs() <= LARGEST_COEFFICIENT)
        limits += [
            min(u[unsafe & (u > 0)].tolist(), default=math.inf),
            -max(u[unsafe & (u < 0)].tolist(), default=-math.inf),
        ]
    return limits
