"""What the head does around its matrix products, by backend; `dil_kernels.ops.linear_head` puts it together.

`CppSteps` takes the C++ ops for tiles and PyTorch for rows. `TritonSteps` takes a kernel for each: on a GPU a few
numbers a row cost no time, but every launch does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dil_kernels.losses.scalar import tanh_slope
from dil_kernels.ops import Op
from dil_kernels.ops.products import operand_dtype

# A row's reference is renewed, and what was written with the old one rescaled, where another entry than the label
# exceeds it by more (nats): small enough that s keeps its digits, large enough that it is rare.
SLACK = 4.0
SCALED_ROWS = 1024
RESCALED_ROWS = 32
TOTAL_SCALE = 2.0**-24  # of the state `total`: csrc/cpu/row_kernels.h, kernels/scalar_math.py


_HOW = "int start, float logit_scale, float softcap, float inv_temperature"
Op(  # on the CPU, where the C++ implementation is
    "head_tile(Tensor(a!) tile, Tensor? bias, Tensor labels, Tensor(b!) state, Tensor(c!)? grad, Tensor(d!)? sums, "
    f"{_HOW}, float slack, bool statistics) -> ()",
    lambda *_: None,
)
Op(
    f"head_tile_grad(Tensor(a!) tile, Tensor? bias, Tensor labels, Tensor state, Tensor(b!) grad, {_HOW}) -> ()",
    lambda *_: None,
)


class TileShape(NamedTuple):
    """How many scored rows and vocabulary entries are computed at a time."""

    rows: int
    columns: int


class HeadProcessing(NamedTuple):
    """What the ops of the head take of its options, and the shape of a tile."""

    logit_scale: float
    softcap: float  # 0 for none
    temperature: float
    tile_rows: int
    tile_columns: int


@dataclass(frozen=True)
class Head:
    """The head and what follows it. `weight` [V, D], `bias` [V] or None."""

    weight: Tensor
    bias: Tensor | None
    how: HeadProcessing

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Of tiles and sums."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the factors of matrix products, which are summed in `accumulation_dtype`."""
        return operand_dtype(self.weight.dtype, cuda=self.weight.is_cuda)

    def tiles(self) -> list[tuple[int, int]]:
        """First and last + 1 vocabulary entry of each tile."""
        V, columns = self.weight.shape[0], self.how.tile_columns
        return [(start, min(start + columns, V)) for start in range(0, V, columns)]

    def chunks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """First and last + 1 row of each chunk."""
        rows = self.how.tile_rows
        return [(start, min(start + rows, end)) for start in range(begin, end, rows)]


@dataclass(frozen=True)
class Rows:
    """M scored rows, of N, and what becomes of them.

    Attributes:
        index: [M] int64, the row in N; N for padding, which comes last.
        labels: [M] int64, 0 for padding.
        logps: [N], 0 where not scored, NaN where scored but beyond M.
        statistics: [3, N] likewise, or [3, 0] if not asked.
        reference, rest, factor: [M]; see `dil_kernels.ops.linear_head`.
    """

    index: Tensor
    labels: Tensor
    logps: Tensor
    statistics: Tensor
    reference: Tensor
    rest: Tensor
    factor: Tensor

    def part(self, begin: int, end: int) -> Rows:
        """Some of the M rows."""
        of_rows = (x[begin:end] for x in (self.reference, self.rest, self.factor))
        return Rows(self.index[begin:end], self.labels[begin:end], self.logps, self.statistics, *of_rows)


def _row_slices(rows: int) -> list[tuple[int, int]]:
    """Rows to scale at a time, in a temporary of little size."""
    return [(begin, min(begin + SCALED_ROWS, rows)) for begin in range(0, rows, SCALED_ROWS)]


class CppSteps:
    """On the CPU."""

    def __init__(self, head: Head, statistics: bool) -> None:
        self.head = head
        self.statistics = statistics
        bias = head.bias
        self._bias = None if bias is None else bias.to(head.accumulation_dtype).contiguous()
        scale, softcap, temperature = head.how[:3]
        self._options = (scale, softcap, 1.0 / temperature)
        self._slope = scale / temperature
        self._slack = SLACK * temperature

    def _bias_of(self, start: int, end: int) -> Tensor | None:
        return None if self._bias is None else self._bias[start:end]

    def _empty_rows(self, targets: Tensor, rows: int) -> Rows:
        N, dtype = targets.shape[0], self.head.accumulation_dtype
        logps, reference, rest, factor = (
            torch.empty(size, dtype=dtype, device=targets.device) for size in (N, rows, rows, rows)
        )
        statistics = logps.new_empty(3, N if self.statistics else 0)
        index, labels = (targets.new_empty(rows) for _ in range(2))
        return Rows(index, labels, logps, statistics, reference, rest, factor)

    def select(self, targets: Tensor, ignore_index: int, rows: int) -> Rows:
        """At most `rows` of those of targets [N] that are scored, without a host sync."""
        found = self._empty_rows(targets, rows)
        N = targets.shape[0]
        scored = targets != ignore_index
        place = scored.cumsum(0) - 1
        kept = scored & (place < rows)
        index = targets.new_full((rows + 1,), N)
        index.scatter_(0, torch.where(kept, place, rows), torch.arange(N, device=targets.device))
        found.index.copy_(index[:rows])
        found.labels.copy_(_gathered(targets, found.index))
        for values in (found.logps, found.statistics):
            values.zero_()
        found.logps.masked_fill_(scored & ~kept, torch.nan)
        found.statistics[:2].masked_fill_((scored & ~kept)[: found.statistics.shape[1]], torch.nan)
        return found

    def labels(self, targets: Tensor, index: Tensor) -> Tensor:
        """Of rows by their index [M]; 0 for padding."""
        return _gathered(targets, index)

    def gather(self, values: Tensor, index: Tensor) -> Tensor:
        """Rows [M, D] of values [N, D] as factors of a product; what is not scored may hold anything."""
        return _gathered(values, index).to(self.head.operand_dtype)

    def gather_scaled(self, values: Tensor, index: Tensor, coefs: Tensor) -> Tensor:
        """The same, each times its coefficient, rounded once."""
        out = values.new_empty(index.shape[0], values.shape[1], dtype=self.head.operand_dtype)
        for begin, end in _row_slices(index.shape[0]):
            out[begin:end] = _scaled(_gathered(values, index[begin:end]), coefs[begin:end], out.dtype)
        return out

    def scatter_scaled(self, values: Tensor, index: Tensor, coefs: Tensor, out: Tensor) -> None:
        """Rows of out [N, D] by index [M] = coefs [M] times values [M, D]."""
        for begin, end in _row_slices(int((index < out.shape[0]).sum())):
            out.index_copy_(0, index[begin:end], _scaled(values[begin:end], coefs[begin:end], out.dtype))

    def coefficients(self, grad_logps: Tensor, index: Tensor, factor: Tensor) -> Tensor:
        """What each row of h [M] is still to be multiplied by."""
        return _gathered(grad_logps, index).to(factor.dtype) * self._slope * factor

    def tile(
        self,
        tile: Tensor,
        labels: Tensor,
        state: Tensor,
        grad: Tensor | None,
        sums: Tensor | None,
        start: int,
        reference: Tensor | None,
    ) -> None:
        """Take a tile of logits into the state; write h if asked, bring sums to a new reference, copy it if asked."""
        bias = self._bias_of(start, start + tile.shape[1])
        options = (start, *self._options, self._slack, self.statistics)
        self._head_tile(tile, bias, labels, state, grad, sums, *options, reference=reference)

    def _head_tile(self, *inputs: Any, reference: Tensor | None) -> None:
        torch.ops.dil_kernels.head_tile(*inputs)
        if reference is not None:
            state = inputs[3]
            reference.copy_(state[0])

    def tile_again(self, tile: Tensor, labels: Tensor, state: Tensor, grad: Tensor, start: int) -> None:
        """Write h, given the state of whole rows."""
        bias = self._bias_of(start, start + tile.shape[1])
        self._head_tile_grad(tile, bias, labels, state, grad, start, *self._options)

    def _head_tile_grad(self, *inputs: Any) -> None:
        torch.ops.dil_kernels.head_tile_grad(*inputs)

    def finish(self, state: Tensor, rows: Rows, V: int) -> tuple[Tensor, Tensor]:
        """Put the label's entry in: log-probs, statistics and what the backward needs of rows.

        Args:
            state: of rows, over all V entries of the vocabulary; a label that is none of them is NaN there.
            rows: the rows.
            V: what the sum of the logits is divided by for their mean.

        Returns:
            label_grad, norm [R]: h at the label, and what all of h is to be multiplied by.
        """
        head = self.head
        reference, rest, label, others_max, dot, total, uncapped = state
        T, unlabelled = head.how.temperature, label.isnan()
        label = label.masked_fill(label == math.inf, math.nan)
        # In units of whichever is larger, the label's term or the reference: neither overflows, and where the label
        # dominates, 1 - p keeps its digits, and so does log p.
        d = (label - reference) / T
        e = torch.exp(-d.abs())
        ahead = d >= 0
        factor = torch.where(ahead, e / (1 + rest * e), 1 / (rest + e))  # 1 / sum of s, the label's included
        behind = torch.where(e >= rest, -torch.log1p(rest / e), d - torch.log(rest + e))
        logps = torch.where(ahead, -torch.log1p(rest * e), behind)
        placed = int((rows.index < rows.logps.shape[0]).sum())
        rows.logps[rows.index[:placed]] = logps[:placed]
        if self.statistics:
            spread = torch.where(ahead, rest * d - dot / T, -dot / T - torch.where(e == 0, 0, e * d))
            spread = torch.where(rest == 0, 0, spread) * factor
            measured = (
                (total / V / TOTAL_SCALE / T).masked_fill(unlabelled, math.nan),
                spread + torch.where(ahead, torch.log1p(rest * e), torch.log(rest + e)),
                (((uncapped if head.how.softcap else label) >= others_max) & ~logps.isnan()).to(rest.dtype),
            )
            for whole, values in zip(rows.statistics, measured, strict=True):
                whole[rows.index[:placed]] = values[:placed]
        label_grad = rest
        if head.how.softcap:
            label_grad = rest * tanh_slope(uncapped / head.how.softcap)
        norm = torch.ones_like(rest)
        if head.weight.dtype == torch.float16:
            # So that neither h nor c factor hidden leaves the range of fp16: the sum of -h is between 1 and 2.
            exponent = torch.where(rest > 0, torch.log2(rest).floor(), 0)
            norm = torch.exp2(-exponent)
            reference = reference + exponent * (math.log(2.0) * T)
        rows.reference.copy_(reference)
        torch.mul(rest, norm, out=rows.rest)
        torch.div(factor, norm, out=rows.factor)
        return label_grad, norm

    def finish_sums(self, sums: Tensor, labels: Tensor, label_grad: Tensor, norm: Tensor, out: Tensor) -> None:
        """out [R, D] = norm (sums + label_grad times the label's row of the weight, if there is one)."""
        elsewhere = ~self._labelled(labels)
        own, label_grad = labels.masked_fill(elsewhere, 0), label_grad.masked_fill(elsewhere, 0)
        for begin, end in _row_slices(labels.shape[0]):
            own_weight = self.head.weight.index_select(0, own[begin:end])
            sums[begin:end].addcmul_(label_grad[begin:end].unsqueeze(1), own_weight)
        out.copy_(sums.mul_(norm.unsqueeze(1)))

    def finish_stash(
        self, stash: Tensor, references: Tensor, state: Tensor, labels: Tensor, label_grad: Tensor, norm: Tensor
    ) -> None:
        """Bring every tile of stash [R, V] from its references [tiles, R] to the last one, times norm; h at the label,
        if there is one.

        What does not change is not read.
        """
        last = state[0]
        ratio = torch.where(references == last, 1, torch.exp((references - last) / self.head.how.temperature)) * norm
        for (start, end), factor in zip(self.head.tiles(), ratio, strict=True):
            # A product of other dtypes than its output's takes wide copies: a few rows at a time.
            for part, by in zip(stash[:, start:end].split(RESCALED_ROWS), factor.split(RESCALED_ROWS), strict=True):
                if bool((by != 1).any()):
                    part.mul_(by.unsqueeze(1))
        # Not scatter_, which copies 16-bit tensors on the CPU.
        (here,) = self._labelled(labels).nonzero(as_tuple=True)
        stash.index_put_((here, labels[here]), (label_grad * norm)[here].to(stash.dtype))

    def _labelled(self, labels: Tensor) -> Tensor:
        """Whether this weight has the labels' entries. That of no weight is NaN, and so is its row's `factor`."""
        return (labels >= 0) & (labels < self.head.weight.shape[0])


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values [N, ...] by index, 0 for padding."""
    N = values.shape[0]
    if N == 0:
        return values.new_zeros((index.shape[0], *values.shape[1:]))
    padding = (index == N).view(-1, *[1] * (values.ndim - 1))
    return values.index_select(0, index.clamp(max=N - 1)).masked_fill_(padding, 0)


def _scaled(values: Tensor, coefs: Tensor, dtype: torch.dtype) -> Tensor:
    """Row r of values [R, D] times coefs[r], rounded once; the product itself would convert a copy of its own."""
    if values.dtype == coefs.dtype:
        return (values * coefs.unsqueeze(1)).to(dtype)
    return values.to(coefs.dtype).mul_(coefs.unsqueeze(1)).to(dtype)


class TritonSteps(CppSteps):
    """On the GPU, and in Triton's interpreter."""

    @override
    def select(self, targets: Tensor, ignore_index: int, rows: int) -> Rows:
        from dil_kernels.kernels import head_rows

        found = self._empty_rows(targets, rows)
        head_rows.select_rows(targets, ignore_index, rows, found.index, found.labels, found.logps, found.statistics)
        return found

    @override
    def gather(self, values: Tensor, index: Tensor) -> Tensor:
        return self._gather(values, index, None)

    @override
    def gather_scaled(self, values: Tensor, index: Tensor, coefs: Tensor) -> Tensor:
        return self._gather(values, index, coefs)

    def _gather(self, values: Tensor, index: Tensor, coefs: Tensor | None) -> Tensor:
        from dil_kernels.kernels import head_rows

        out = values.new_empty(index.shape[0], values.shape[1], dtype=self.head.operand_dtype)
        return head_rows.gather_rows(values, index, coefs, out)

    @override
    def scatter_scaled(self, values: Tensor, index: Tensor, coefs: Tensor, out: Tensor) -> None:
        from dil_kernels.kernels import head_rows

        head_rows.scatter_rows(values, index, coefs, out)

    @override
    def coefficients(self, grad_logps: Tensor, index: Tensor, factor: Tensor) -> Tensor:
        from dil_kernels.kernels import head_rows

        return head_rows.coefficients(grad_logps, index, factor, self._slope)

    @override
    def _head_tile(self, *inputs: Any, reference: Tensor | None) -> None:
        from dil_kernels.kernels.linear_head import head_tile

        head_tile(*inputs, reference=reference)

    @override
    def _head_tile_grad(self, *inputs: Any) -> None:
        from dil_kernels.kernels.linear_head import head_tile_grad

        head_tile_grad(*inputs)

    @override
    def finish(self, state: Tensor, rows: Rows, V: int) -> tuple[Tensor, Tensor]:
        from dil_kernels.kernels import head_rows

        head = self.head
        return head_rows.finish_rows(
            state,
            rows.index,
            rows.logps,
            rows.statistics,
            rows.reference,
            rows.rest,
            rows.factor,
            V,
            head.how.softcap,
            head.how.temperature,
            head.weight.dtype == torch.float16,
        )

    @override
    def finish_sums(self, sums: Tensor, labels: Tensor, label_grad: Tensor, norm: Tensor, out: Tensor) -> None:
        from dil_kernels.kernels import head_rows

        head_rows.finish_sums(sums, self.head.weight, labels, label_grad, norm, out)

    @override
    def finish_stash(
        self, stash: Tensor, references: Tensor, state: Tensor, labels: Tensor, label_grad: Tensor, norm: Tensor
    ) -> None:
        from dil_kernels.kernels.linear_head import head_rescale

        columns, inv_temperature = self.head.how.tile_columns, 1.0 / self.head.how.temperature
        head_rescale(stash, references, state[0], labels, label_grad, norm, columns, inv_temperature)
