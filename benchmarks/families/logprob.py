"""Per-sequence log-probs from logits, forward and forward+backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.options import ScoringOptions
from families.logprob_providers import (
    BASELINE,
    IGNORE_INDEX,
    PROVIDERS,
    SequenceLogps,
    eager_sequence_logps,
    next_token_labels,
)
from harness.check import relative_error, rounding, worst
from harness.family import DTYPE_NAMES, Errors, Family, Pass, WrongResultError

ROWS_PER_CHUNK = 256  # of fp64 rows that the check holds at a time, beside the true gradient


@dataclass(frozen=True)
class LogprobCase:
    """One batch of logits [B, T, V] with the same share of every sequence scored.

    Attributes:
        sequences: B.
        tokens: T, tokens of each sequence.
        vocab: V.
        dtype: of the logits.
        scored_percent: share of the B * T rows that are scored. The last row of a sequence predicts nothing, so 100
            means T - 1 rows of each sequence.
    """

    sequences: int
    tokens: int
    vocab: int
    dtype: torch.dtype
    scored_percent: int

    @property
    def name(self) -> str:
        """By which the case is chosen on the command line."""
        dtype = DTYPE_NAMES[self.dtype]
        return f"{self.sequences}x{self.tokens}-v{self.vocab}-{dtype}-{self.scored_percent}pct"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.rows} rows, V={self.vocab}, {DTYPE_NAMES[self.dtype]}, {self.scored_percent}% scored"

    @property
    def columns(self) -> dict[str, int | str]:
        """For the CSV."""
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "vocab": self.vocab,
            "dtype": DTYPE_NAMES[self.dtype],
            "scored_percent": self.scored_percent,
            "rows": self.rows,
            "scored_rows": self.scored_rows,
        }

    @property
    def rows(self) -> int:
        """B * T."""
        return self.sequences * self.tokens

    @property
    def scored_per_sequence(self) -> int:
        """Scored rows of each sequence."""
        return min(round(self.tokens * self.scored_percent / 100), self.tokens - 1)

    @property
    def scored_rows(self) -> int:
        """Scored rows of the batch."""
        return self.sequences * self.scored_per_sequence

    @property
    def rotated_bytes(self) -> int:
        """Bytes of all logits."""
        return self.rows * self.vocab * self.dtype.itemsize


def _bytes_counted(scored_row_moves: int, ignored_row_moves: int) -> Callable[[LogprobCase], int]:
    """Bytes of a pass that moves each row so often. Labels and results are a few bytes a row and are not counted."""

    def count(case: LogprobCase) -> int:
        moves = scored_row_moves * case.scored_rows + ignored_row_moves * (case.rows - case.scored_rows)
        return case.vocab * case.dtype.itemsize * moves

    return count


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case."""

    logits: Tensor  # [B, T, V], a leaf that requires a gradient
    labels: Tensor  # [B, T] int64, IGNORE_INDEX where not scored
    upstream: Tensor  # [B] fp32, the gradient with respect to each sequence's log-prob


def make_inputs(case: LogprobCase, device: torch.device) -> Inputs:
    """Random logits, a response scored at the end of each sequence, an upstream gradient that differs by sequence."""
    B, T, V = case.sequences, case.tokens, case.vocab
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(B, T, V, dtype=case.dtype, device=device).normal_(0.0, 3.0, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator, device=device)
    labels[:, : T - case.scored_per_sequence] = IGNORE_INDEX
    upstream = torch.linspace(0.5, 2.0, B, device=device) * torch.where(
        torch.arange(B, device=device) % 2 == 0, 1.0, -1.0
    )
    return Inputs(logits.requires_grad_(), labels, upstream)


def fresh(inputs: Inputs) -> Inputs:
    """Equal logits in other memory."""
    return Inputs(inputs.logits.detach().clone().requires_grad_(), inputs.labels, inputs.upstream)


def _run_forward(fn: SequenceLogps, inputs: Inputs) -> None:
    with torch.no_grad():
        fn(inputs.logits, inputs.labels)


def _run_forward_backward(fn: SequenceLogps, inputs: Inputs) -> None:
    torch.autograd.grad(fn(inputs.logits, inputs.labels), inputs.logits, inputs.upstream)


@dataclass(frozen=True)
class Truth:
    """Results in fp64."""

    logps: Tensor  # [B]
    rows: Tensor  # [R] int64, the rows of [B * T, V] that predict a scored label; every other row's gradient is zero
    grad_rows: Tensor  # [R, V], the gradient of those
    row_upstream: Tensor  # [R], upstream gradient of the sequence that a row belongs to


def make_truth(inputs: Inputs) -> Truth:
    """The eager reference of the package in fp64, a few rows at a time."""
    B, T = inputs.labels.shape
    labels = next_token_labels(inputs.labels).flatten()
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    row_upstream = inputs.upstream.double()[rows // T]
    logits = inputs.logits.detach().flatten(0, 1)
    logps = torch.zeros(B * T, dtype=torch.float64, device=logits.device)
    grad_rows = torch.empty(len(rows), logits.shape[-1], dtype=torch.float64, device=logits.device)
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        part = slice(start, start + ROWS_PER_CHUNK)
        x = logits[rows[part]].double().requires_grad_()
        y = reference.token_logps(x.unsqueeze(0), labels[rows[part]].unsqueeze(0), ScoringOptions(shift=False)).squeeze(
            0
        )
        (grad_rows[part],) = torch.autograd.grad(y, x, row_upstream[part])
        logps[rows[part]] = y.detach()
    return Truth(logps.view(B, T).sum(-1), rows, grad_rows, row_upstream)


def measure_errors(fn: SequenceLogps, inputs: Inputs, truth: Truth) -> Errors:
    """Of a sequence's log-prob, forward both with and without a gradient asked; of a gradient element."""
    with torch.no_grad():
        plain = fn(inputs.logits.detach().clone(), inputs.labels)
    own = fresh(inputs)
    logps = fn(own.logits, own.labels)
    (grad,) = torch.autograd.grad(logps, own.logits, own.upstream.to(logps.dtype))
    return {
        "log-probs": worst(relative_error(plain, truth.logps), relative_error(logps.detach(), truth.logps)),
        "gradient": _gradient_error(grad, truth),
    }


def _gradient_error(grad: Tensor, truth: Truth) -> float:
    V = grad.shape[-1]
    rows = grad.flatten(0, 1)
    ignored = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, truth.rows, False)
    if any(bool(rows[part].any()) for part in ignored.nonzero().squeeze(1).split(ROWS_PER_CHUNK)):
        raise WrongResultError("wrong gradient: rows that are not scored have one")
    largest = 0.0
    for start in range(0, len(truth.rows), ROWS_PER_CHUNK):
        part = slice(start, start + ROWS_PER_CHUNK)
        true = truth.grad_rows[part]
        # The unit makes small probabilities count as well as the label's.
        unit = true.abs() + (truth.row_upstream[part].abs() / V).unsqueeze(1)
        largest = worst(largest, ((rows[truth.rows[part]].double() - true).abs() / unit).max().item())
    return math.inf if math.isnan(largest) else largest


def roundings(inputs_dtype: torch.dtype, results_dtype: torch.dtype) -> Errors:
    """Log-probs are results; the gradient has the dtype of the logits."""
    return {"log-probs": rounding(results_dtype), "gradient": rounding(inputs_dtype)}


def _grid(rows: list[tuple[int, int, int, torch.dtype, int]]) -> tuple[LogprobCase, ...]:
    return tuple(LogprobCase(*row) for row in rows)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Bars first, then the curve over V (384 rows; 50257 and 32001 are odd) and the curve over rows (V = 49152).
CPU_GRID = _grid(
    [
        *((4, 96, 49152, dtype, 50) for dtype in (FP32, BF16)),
        *((4, 48, 128256, dtype, percent) for percent in (50, 100) for dtype in (FP32, BF16)),
        *((4, 96, vocab, BF16, 50) for vocab in (8192, 32000, 32001, 50257, 128256)),
        (4, 96, 32001, FP32, 50),
        *((4, tokens, 49152, BF16, 50) for tokens in (4, 16, 48, 192)),
    ]
)
# Bars first, then V, dtypes and rows.
CUDA_GRID = _grid(
    [
        *((4, 2048, 128256, BF16, percent) for percent in (50, 100)),
        (4, 16, 128256, BF16, 100),
        (4, 128, 128256, BF16, 100),
        *((4, 2048, 128256, dtype, 50) for dtype in (FP32, FP16)),
        *((4, 2048, vocab, BF16, 50) for vocab in (32000, 49152, 50257, 152064, 262144)),
        *((4, tokens, 128256, BF16, 100) for tokens in (32, 64, 512)),
        *((4, 2048, vocab, dtype, 50) for vocab in (32000, 49152, 152064, 262144) for dtype in (FP32, FP16)),
    ]
)
QUICK_GRID = _grid([(2, 8, 1000, FP32, 50), (2, 8, 1003, BF16, 100)])

FORWARD = Pass("forward", "read scored rows", "log-probs", _run_forward, _bytes_counted(1, 0))
FORWARD_BACKWARD = Pass(
    "forward+backward",
    "forward: read scored rows; backward: read scored rows, write all rows",
    "gradient",
    _run_forward_backward,
    _bytes_counted(3, 1),
)

LOGPROB = Family(
    name="logprob",
    title="Per-sequence log-probs from logits",
    error_words="forward: of a sequence's log-prob, relative; forward+backward: of a gradient element, relative to it "
    "+ |upstream|/V",
    passes=(FORWARD, FORWARD_BACKWARD),
    providers=PROVIDERS,
    baseline=BASELINE,
    baseline_words="the authors' way: fp32 log_softmax over every row of a slice",
    grids={"cpu": CPU_GRID, "cuda": CUDA_GRID, "quick": QUICK_GRID},
    curves={
        "vocab": "{rows} rows, {dtype}, {scored_percent}% scored",
        "rows": "V={vocab}, {dtype}, {scored_percent}% scored",
    },
    curve_value="share_of_floor",
    columns=("median ms", "p20 - p80", "GB/s", "of floor", "x baseline", "max error", "peak MB"),
    make_inputs=make_inputs,
    fresh=fresh,
    make_truth=make_truth,
    measure_errors=measure_errors,
    yardstick=eager_sequence_logps,
    roundings=roundings,
)
