"""Correctness before speed: every provider against the fp64 oracle, on the inputs that are timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dil_kernels import reference
from harness.cases import IGNORE_INDEX, Inputs
from harness.providers import SequenceLogps

# A provider may err this many times as much as the eager reference in the same dtype, or as one rounding of its output.
MULTIPLE = 4
ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class Oracle:
    """Results in fp64."""

    logps: Tensor  # [B]
    scored: Tensor  # [B, T] bool, rows that predict a scored label
    grad_rows: Tensor  # [scored rows, V], gradient of those rows; every other row's is zero
    row_upstream: Tensor  # [scored rows], |upstream| of the sequence that a row belongs to


@dataclass(frozen=True)
class Errors:
    """Largest errors against the oracle.

    Attributes:
        logps: of a sequence's log-prob, relative.
        grad: of a gradient element, relative to its size plus |upstream| / V, so that small probabilities count as well
            as the label's; infinite if a row that is not scored has a gradient.
    """

    logps: float
    grad: float

    def problem(self, allowed: Errors) -> str | None:
        """What exceeds the allowed errors, or None. NaN exceeds."""
        if not self.logps <= allowed.logps:
            return f"wrong log-probs: relative error {self.logps:.1e}, allowed {allowed.logps:.1e}"
        if math.isinf(self.grad):
            return "wrong gradient: rows that are not scored have one"
        if not self.grad <= allowed.grad:
            return f"wrong gradient: relative error {self.grad:.1e}, allowed {allowed.grad:.1e}"
        return None


def make_oracle(inputs: Inputs) -> Oracle:
    """The reference in fp64, one sequence at a time to bound its memory."""
    next_labels = inputs.labels[:, 1:] != IGNORE_INDEX
    scored = torch.nn.functional.pad(next_labels, (0, 1))
    logps, grad_rows = [], []
    for b in range(inputs.labels.shape[0]):
        logits = inputs.logits.detach()[b : b + 1].double().requires_grad_()
        sequence = reference.token_logps(logits, inputs.labels[b : b + 1], ignore_index=IGNORE_INDEX).sum(-1)
        (grad,) = torch.autograd.grad(sequence, logits, inputs.upstream[b : b + 1].double())
        logps.append(sequence.detach())
        grad_rows.append(grad[0, scored[b]])
    row_upstream = inputs.upstream.double().abs().repeat_interleave(scored.sum(-1))
    return Oracle(torch.cat(logps), scored, torch.cat(grad_rows), row_upstream)


def measure_errors(fn: SequenceLogps, inputs: Inputs, oracle: Oracle) -> Errors:
    """Errors of a provider, forward both with and without a gradient asked; the inputs are left as they are."""
    logits = inputs.logits.detach().clone()
    with torch.no_grad():
        plain = fn(logits, inputs.labels)
    logits = inputs.logits.detach().clone().requires_grad_()
    logps = fn(logits, inputs.labels)
    (grad,) = torch.autograd.grad(logps, logits, inputs.upstream.to(logps.dtype))
    logps_error = max(_relative_error(plain, oracle), _relative_error(logps.detach(), oracle), key=_nan_last)
    return Errors(logps_error, _gradient_error(grad, oracle))


def allowed_errors(eager: Errors, logits_dtype: torch.dtype, logps_in_logits_dtype: bool) -> Errors:
    """What a provider may err.

    Args:
        eager: errors of the eager reference in the dtype of the logits.
        logits_dtype: of the logits and hence of the gradient.
        logps_in_logits_dtype: the provider rounds token log-probs to that dtype.
    """
    logps_dtype = logits_dtype if logps_in_logits_dtype else torch.float32
    return Errors(
        logps=MULTIPLE * max(eager.logps, _rounding(logps_dtype)),
        grad=MULTIPLE * max(eager.grad, _rounding(logits_dtype)),
    )


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _relative_error(logps: Tensor, oracle: Oracle) -> float:
    if logps.shape != oracle.logps.shape:
        return math.inf
    return ((logps.double() - oracle.logps).abs() / oracle.logps.abs()).max().item()


def _gradient_error(grad: Tensor, oracle: Oracle) -> float:
    B, T, V = grad.shape
    if bool(grad[~oracle.scored].any()):
        return math.inf
    grad_rows = grad.reshape(B * T, V)
    chunks = oracle.scored.flatten().nonzero().squeeze(1).split(ROWS_PER_CHUNK)
    worst = 0.0
    for start, rows in zip(range(0, len(oracle.grad_rows), ROWS_PER_CHUNK), chunks, strict=True):
        truth = oracle.grad_rows[start : start + len(rows)]
        unit = truth.abs() + (oracle.row_upstream[start : start + len(rows)] / V).unsqueeze(1)
        error = ((grad_rows[rows].double() - truth).abs() / unit).max().item()
        worst = max(worst, error, key=_nan_last)
    return worst
