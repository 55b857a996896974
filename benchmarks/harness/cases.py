"""What is timed: the cases, their inputs, and the bytes that no implementation can avoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
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
    def row_bytes(self) -> int:
        """Bytes of the logits of one row."""
        return self.vocab * self.dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of all logits."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Pass:
    """What one timed call does.

    Attributes:
        name: as it appears in tables and files.
        words: the bytes it counts, in words. Labels and results are a few bytes a row and are not counted.
        scored_row_moves: reads and writes of each scored row.
        ignored_row_moves: reads and writes of each ignored row.
    """

    name: str
    words: str
    scored_row_moves: int
    ignored_row_moves: int

    def bytes_counted(self, case: Case) -> int:
        """Bytes that no implementation can avoid in this pass over a case."""
        ignored_rows = case.rows - case.scored_rows
        return case.row_bytes * (self.scored_row_moves * case.scored_rows + self.ignored_row_moves * ignored_rows)


FORWARD = Pass("forward", "read scored rows", scored_row_moves=1, ignored_row_moves=0)
FORWARD_BACKWARD = Pass(
    "forward+backward",
    "forward: read scored rows; backward: read scored rows, write all rows",
    scored_row_moves=3,
    ignored_row_moves=1,
)
PASSES = (FORWARD, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case."""

    logits: Tensor  # [B, T, V], a leaf that requires a gradient
    labels: Tensor  # [B, T] int64, IGNORE_INDEX where not scored
    upstream: Tensor  # [B] fp32, the gradient with respect to each sequence's log-prob


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random logits, a response scored at the end of each sequence, an upstream gradient that differs by sequence."""
    B, T, V = case.sequences, case.tokens, case.vocab
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(B, T, V, dtype=case.dtype, device=device).normal_(0.0, 3.0, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator, device=device)
    labels[:, : T - case.scored_per_sequence] = IGNORE_INDEX
    upstream = torch.linspace(0.5, 2.0, B, device=device) * torch.where(
        torch.arange(B, device=device) % 2 == 0, 1.0, -1.0
    )
    return Inputs(logits.requires_grad_(), labels, upstream)


CPU_GRID = (
    Case(4, 128, 32000, torch.float32, 50),
    Case(4, 128, 32000, torch.bfloat16, 50),
    Case(4, 96, 49152, torch.float32, 50),
    Case(4, 96, 49152, torch.bfloat16, 50),
    Case(4, 48, 128256, torch.float32, 50),
    Case(4, 48, 128256, torch.bfloat16, 50),
    Case(4, 48, 128256, torch.float32, 100),
    Case(4, 48, 128256, torch.bfloat16, 100),
)
CUDA_GRID = (
    Case(4, 2048, 32000, torch.bfloat16, 50),
    Case(4, 2048, 49152, torch.bfloat16, 50),
    Case(4, 2048, 128256, torch.bfloat16, 50),
    Case(4, 2048, 128256, torch.bfloat16, 100),
    Case(4, 2048, 152064, torch.bfloat16, 50),
    Case(4, 1024, 128256, torch.float16, 50),
    Case(4, 1024, 128256, torch.float32, 50),
    Case(4, 64, 128256, torch.bfloat16, 100),
)
QUICK_GRID = (
    Case(2, 8, 1000, torch.float32, 50),
    Case(2, 8, 1003, torch.bfloat16, 100),
)


def default_grid(device: torch.device) -> tuple[Case, ...]:
    """The full grid of a kind of device."""
    return CUDA_GRID if device.type == "cuda" else CPU_GRID
