"""The language-model head from hidden states to log-probabilities and back, one tile of logits at a time.

Logits are x = hidden @ weight^T + bias, z = softcap tanh(logit_scale x / softcap), p = softmax(z / temperature). Only
scored rows are computed. They come in chunks of rows and tiles of the vocabulary: a matrix product with fp32
accumulation writes a tile of x, and one pass over it (`head_tile`) takes what the log-sum-exp needs and writes the row
gradient

    h = -s dz/d(logit_scale x), at the label rest dz/d(logit_scale x)        s = exp((z - reference) / temperature)

which is the gradient of the log-prob up to a factor of the row, 1 / sum(s), and constants; `rest` is the sum of s
without the label's, so that 1 - p keeps its digits where p is near 1. So any upstream gradient c of the rows is applied
outside the matrix: d hidden = c factor (h @ weight) and d weight = h^T @ (c factor hidden). Rows whose h is kept (the
stash) take both products in the backward. For the others the forward takes the first while the tile is there, and the
backward, if the weight needs a gradient, computes the tile again for the second. That makes three products of the size
of the head, four for rows without a stash, two for a frozen weight, one without gradients.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dil_kernels.scalar_losses import tanh_slope

# A row's reference is renewed, and what was written with the old one rescaled, where another entry than the label
# exceeds it by more (nats): small enough that s keeps its digits, large enough that it is rare.
SLACK = 4.0
# Rows of the stash start at multiples of this many elements, as fast matrix products want.
STASH_ALIGNMENT = 64
SCALED_ROWS = 1024
RESCALED_ROWS = 32
TOTAL_SCALE = 2.0**-24  # of the state `total`: csrc/cpu/row_kernels.h, kernels/scalar_math.py


def stash_stride(V: int) -> int:
    """Elements of a row of the stash."""
    return -(-V // STASH_ALIGNMENT) * STASH_ALIGNMENT


def stash_rows_within(stash_bytes: int, rows: int, V: int, dtype: torch.dtype) -> int:
    """How many of `rows` rows a stash of so many bytes holds."""
    return min(rows, stash_bytes // (stash_stride(V) * dtype.itemsize))


class TileShape(NamedTuple):
    """How many scored rows and vocabulary entries are computed at a time."""

    rows: int
    columns: int


# On the GPU a chunk keeps the tensor cores busy and a tile of fp32 logits stays small (134 MB); on the CPU a tile of
# logits and its part of the weight stay in the last-level cache.
TILE_SHAPES = {"cuda": TileShape(4096, 8192), "cpu": TileShape(512, 4096)}


@dataclass(frozen=True)
class Head:
    """The head and what follows it. `weight` [V, D], `bias` [V] or None; `softcap` 0 for none."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float
    temperature: float
    tile: TileShape
    backend: str

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Of tiles and sums."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the factors of matrix products: CPUs accumulate half precisions no better than they store them."""
        return self.weight.dtype if self.weight.is_cuda else self.accumulation_dtype

    def tiles(self) -> list[tuple[int, int]]:
        """First and last + 1 vocabulary entry of each tile."""
        V = self.weight.shape[0]
        return [(start, min(start + self.tile.columns, V)) for start in range(0, V, self.tile.columns)]

    def chunks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """First and last + 1 row of each chunk."""
        return [(start, min(start + self.tile.rows, end)) for start in range(begin, end, self.tile.rows)]


class HeadForward(NamedTuple):
    """What the forward returns; M scored rows, of N."""

    logps: Tensor  # [N], 0 where not scored, NaN where scored but beyond M
    statistics: Tensor  # [3, N] mean logit, entropy, 1 where the label is the largest; [3, 0] if not asked
    row_index: Tensor  # [M] int64, the row in N; N for padding
    reference: Tensor  # [M]
    rest: Tensor  # [M]
    factor: Tensor  # [M]
    sums: Tensor  # [M - stash rows, D], h @ weight of the others; [0, D] if not asked
    stash: Tensor  # [stash rows, V padded], h of the first rows


def scored_rows(targets: Tensor, ignore_index: int, rows: int) -> tuple[Tensor, Tensor]:
    """Where the scored ones of targets [N] are, without a host sync.

    Returns:
        index [rows], padded with N where there are fewer; dropped [N] bool, scored rows for which there was no place.
    """
    N = targets.shape[0]
    scored = targets != ignore_index
    place = scored.cumsum(0) - 1
    kept = scored & (place < rows)
    index = targets.new_full((rows + 1,), N)
    index.scatter_(0, torch.where(kept, place, rows), torch.arange(N, device=targets.device))
    return index[:rows], scored & ~kept


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values [N, ...] by index, 0 for padding (what is not scored may hold anything)."""
    N = values.shape[0]
    if N == 0:
        return values.new_zeros((index.shape[0], *values.shape[1:]))
    padding = (index == N).view(-1, *[1] * (values.ndim - 1))
    return values.index_select(0, index.clamp(max=N - 1)).masked_fill_(padding, 0)


def scatter_rows(values: Tensor, index: Tensor, N: int) -> Tensor:
    """[N, ...] with the given rows, 0 elsewhere; padding is dropped."""
    out = values.new_zeros((N + 1, *values.shape[1:]))
    return out.index_copy_(0, index, values)[:N]


def _product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b with accumulation in the dtype of `out`."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, likewise."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


class _Buffer:
    """Memory that every tile of a pass reuses, as a contiguous matrix of the size that is needed."""

    def __init__(self, like: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
        self._data = torch.empty(rows * columns, dtype=dtype, device=like.device)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return self._data[: rows * columns].view(rows, columns)


def _grad_buffer(hidden: Tensor, tile_dtype: torch.dtype, rows: int, columns: int) -> _Buffer | None:
    """Where h goes that is not kept; None where it can take the place of its tile."""
    return None if hidden.dtype == tile_dtype else _Buffer(hidden, hidden.dtype, rows, columns)


class _TileSteps:
    """`head_tile` and `head_tile_grad` of the backend, with the options of a head."""

    def __init__(self, head: Head, statistics: bool) -> None:
        self.head = head
        self.statistics = statistics
        bias = head.bias
        self._bias = None if bias is None else bias.to(head.accumulation_dtype).contiguous()
        self._options = (head.logit_scale, head.softcap, 1.0 / head.temperature)

    def _bias_of(self, start: int, end: int) -> Tensor | None:
        return None if self._bias is None else self._bias[start:end]

    def forward(
        self, tile: Tensor, labels: Tensor, state: Tensor, grad: Tensor | None, sums: Tensor | None, start: int
    ) -> None:
        bias = self._bias_of(start, start + tile.shape[1])
        options = (start, *self._options, SLACK * self.head.temperature, self.statistics)
        if self.head.backend == "cpp":
            torch.ops.dil_kernels.cpp_head_tile(tile, bias, labels, state, grad, sums, *options)
        else:
            from dil_kernels.kernels.linear_head import head_tile

            head_tile(tile, bias, labels, state, grad, sums, *options)

    def gradient(self, tile: Tensor, labels: Tensor, state: Tensor, grad: Tensor, start: int) -> None:
        bias = self._bias_of(start, start + tile.shape[1])
        if self.head.backend == "cpp":
            torch.ops.dil_kernels.cpp_head_tile_grad(tile, bias, labels, state, grad, start, *self._options)
        else:
            from dil_kernels.kernels.linear_head import head_tile_grad

            head_tile_grad(tile, bias, labels, state, grad, start, *self._options)

    def rescale(self, stash: Tensor, factors: Tensor) -> None:
        """Multiply tile t of stash [R, V] by factors [t, R], reading only what changes."""
        if self.head.backend != "cpp":
            from dil_kernels.kernels.linear_head import head_rescale

            return head_rescale(stash, factors, self.head.tile.columns)
        for (start, end), factor in zip(self.head.tiles(), factors, strict=True):
            # A product of other dtypes than its output's takes wide copies: a few rows at a time.
            for part, by in zip(stash[:, start:end].split(RESCALED_ROWS), factor.split(RESCALED_ROWS), strict=True):
                if bool((by != 1).any()):
                    part.mul_(by.unsqueeze(1))
        return None


def _fresh_state(like: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """reference, rest, label, others_max, dot, total, uncapped: see csrc/cpu/head_kernels.h."""
    state = torch.zeros(7, rows, dtype=dtype, device=like.device)
    state[0].fill_(-math.inf)
    state[2].fill_(math.nan)
    state[3].fill_(-math.inf)
    return state


def head_forward(
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # [N] int64
    head: Head,
    *,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    grad_hidden: bool,
    statistics: bool,
) -> HeadForward:
    """Log-probs of the targets of at most `rows` scored rows, and what the backward needs."""
    N, D = hidden.shape
    V = head.weight.shape[0]
    dtype = head.accumulation_dtype
    index, dropped = scored_rows(targets, ignore_index, rows)
    labels = gather_rows(targets, index)
    logps, factor, reference, rest = (torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(4))
    stats = torch.empty(3, rows if statistics else 0, dtype=dtype, device=hidden.device)
    sums = hidden.new_empty(rows - stash_rows if grad_hidden else 0, D)
    stash = hidden.new_empty(stash_rows, stash_stride(V))
    steps = _TileSteps(head, statistics)
    chunk_rows = min(head.tile.rows, rows)
    columns = min(head.tile.columns, V)
    tile_buffer = _Buffer(hidden, dtype, chunk_rows, columns)
    grads = _grad_buffer(hidden, dtype, chunk_rows if grad_hidden and stash_rows < rows else 0, columns)
    # A stash ends a chunk, so that a chunk is kept whole or not at all.
    for begin, end in head.chunks(0, stash_rows) + head.chunks(stash_rows, rows):
        R, kept = end - begin, begin < stash_rows
        chunk = _Chunk(
            hidden=gather_rows(hidden, index[begin:end]).to(head.operand_dtype),
            labels=labels[begin:end],
            state=_fresh_state(hidden, dtype, R),
            sums=torch.zeros(R, D, dtype=dtype, device=hidden.device) if grad_hidden and not kept else None,
            stash=stash[begin:end, :V] if kept else None,
        )
        references = []
        for start, stop in head.tiles():
            weight = head.weight[start:stop].to(head.operand_dtype)
            tile = _product(tile_buffer.matrix(R, stop - start), chunk.hidden, weight.t())
            grad = None
            if chunk.stash is not None:
                grad = chunk.stash[:, start:stop]
            elif grad_hidden:
                grad = tile if grads is None else grads.matrix(R, stop - start)
            steps.forward(tile, chunk.labels, chunk.state, grad, chunk.sums, start)
            if chunk.sums is not None:
                assert grad is not None
                _add_product(chunk.sums, grad.to(head.operand_dtype), weight)
            if chunk.stash is not None:
                references.append(chunk.state[0].clone())
            del weight  # before the next tile is converted
        finished = _finish(chunk, head, torch.stack(references) if references else None, steps)
        for whole, part in zip((logps, reference, rest, factor), finished[:4], strict=True):
            whole[begin:end] = part
        if statistics:
            stats[:, begin:end] = finished.statistics
        if chunk.sums is not None:
            sums[begin - stash_rows : end - stash_rows] = chunk.sums
        del chunk  # before the next one is gathered
    all_logps = scatter_rows(logps, index, N).masked_fill(dropped, torch.nan)
    all_stats = stats
    if statistics:
        all_stats = torch.stack([scatter_rows(s, index, N) for s in stats])
        all_stats[:2].masked_fill_(dropped, torch.nan)
    return HeadForward(all_logps, all_stats, index, reference, rest, factor, sums, stash)


@dataclass
class _Chunk:
    hidden: Tensor  # [R, D]
    labels: Tensor  # [R]
    state: Tensor  # [7, R]
    sums: Tensor | None  # [R, D], sum of h @ weight without the label's entry
    stash: Tensor | None  # [R, V]


class _Finished(NamedTuple):
    logps: Tensor
    reference: Tensor
    rest: Tensor
    factor: Tensor
    statistics: Tensor


def _finish(chunk: _Chunk, head: Head, references: Tensor | None, steps: _TileSteps) -> _Finished:
    """Put the label's entry in, and bring everything to the row's last reference."""
    reference, rest, label, others_max, dot, total, uncapped = chunk.state
    T, V = head.temperature, head.weight.shape[0]
    invalid = (chunk.labels < 0) | (chunk.labels >= V)
    columns = chunk.labels.masked_fill(invalid, 0)
    label = torch.where(invalid | (label == math.inf), math.nan, label)
    # In units of whichever is larger, the label's term or the reference: neither overflows, and where the label
    # dominates, 1 - p keeps its digits, and so does log p.
    d = (label - reference) / T
    e = torch.exp(-d.abs())
    ahead = d >= 0
    factor = torch.where(ahead, e / (1 + rest * e), 1 / (rest + e))  # 1 / sum of s, the label's included
    behind = torch.where(e >= rest, -torch.log1p(rest / e), d - torch.log(rest + e))
    logps = torch.where(ahead, -torch.log1p(rest * e), behind)
    label_grad = rest
    if head.softcap:
        label_grad = rest * tanh_slope(uncapped / head.softcap)
    label_grad = label_grad.masked_fill(invalid, math.nan)
    spread = torch.where(ahead, rest * d - dot / T, -dot / T - torch.where(e == 0, 0, e * d))
    spread = torch.where(rest == 0, 0, spread) * factor
    statistics = torch.stack(
        [
            (total / V / TOTAL_SCALE / T).masked_fill(invalid, math.nan),
            spread + torch.where(ahead, torch.log1p(rest * e), torch.log(rest + e)),
            (((uncapped if head.softcap else label) >= others_max) & ~logps.isnan()).to(rest.dtype),
        ]
    )
    norm = torch.ones_like(rest)
    if head.weight.dtype == torch.float16:
        # So that neither h nor c factor hidden leaves the range of fp16: the sum of -h is between 1 and 2.
        exponent = torch.where(rest > 0, torch.log2(rest).floor(), 0)
        norm = torch.exp2(-exponent)
        reference = reference + exponent * (math.log(2.0) * T)
    if chunk.sums is not None:
        for begin, end in _row_slices(columns.shape[0]):
            own_weight = head.weight.index_select(0, columns[begin:end])
            chunk.sums[begin:end].addcmul_(label_grad[begin:end].unsqueeze(1), own_weight)
        chunk.sums.mul_(norm.unsqueeze(1))
    if chunk.stash is not None:
        assert references is not None
        steps.rescale(chunk.stash, _ratio(references, chunk.state[0], T) * norm)
        # Not scatter_, which copies 16-bit tensors on the CPU.
        own = (torch.arange(columns.shape[0], device=columns.device), columns)
        chunk.stash.index_put_(own, (label_grad * norm).to(chunk.stash.dtype))
    return _Finished(logps, reference, rest * norm, factor / norm, statistics)


def _ratio(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """exp((old - new) / temperature), exactly 1 where nothing changed."""
    return torch.where(old == new, 1, torch.exp((old - new) / temperature))


def head_backward(
    grad_logps: Tensor,  # [N]
    hidden: Tensor | None,  # [N, D], for the weight and the bias
    targets: Tensor | None,  # [N], where rows are beyond the stash
    head: Head,
    forward: HeadForward,
    *,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [N, D], weight [V, D] and bias [V], each if asked."""
    index, weight = forward.row_index, head.weight
    c = gather_rows(grad_logps, index).to(head.accumulation_dtype) * (head.logit_scale / head.temperature)
    coefs = c * forward.factor
    stash_rows = forward.stash.shape[0]
    d_hidden = None
    if grad_hidden:
        N = grad_logps.shape[0]
        d_hidden = weight.new_zeros(N + 1, weight.shape[1])
        parts = ((_times_weight(forward.stash, head), 0), (forward.sums, stash_rows))
        for values, offset in parts:
            for begin, end in _row_slices(values.shape[0]):
                r = slice(offset + begin, offset + end)
                d_hidden.index_copy_(0, index[r], _scaled(values[begin:end], coefs[r], d_hidden.dtype))
        del parts, values
        d_hidden = d_hidden[:N]
    if not (grad_weight or grad_bias):
        return d_hidden, None, None
    assert hidden is not None
    scaled_x = hidden.new_empty(index.shape[0], hidden.shape[1], dtype=head.operand_dtype)
    for begin, end in _row_slices(index.shape[0]):
        scaled_x[begin:end] = _scaled(gather_rows(hidden, index[begin:end]), coefs[begin:end], scaled_x.dtype)
    d_weight = weight.new_empty(weight.shape) if grad_weight else None
    d_bias = weight.new_empty(weight.shape[0]) if grad_bias else None
    same_dtype = weight.dtype == head.operand_dtype
    if stash_rows == index.shape[0] and d_bias is None and same_dtype:
        assert d_weight is not None
        return d_hidden, _product(d_weight, forward.stash[:, : weight.shape[0]].t(), scaled_x), None

    converted = not same_dtype or (grad_bias and weight.dtype != c.dtype)  # what of the stash is multiplied
    steps = _TileSteps(head, statistics=False)
    recompute = head.chunks(stash_rows, index.shape[0])
    labels = state = None
    if recompute:
        assert targets is not None
        labels = gather_rows(targets, index)
        state = _fresh_state(hidden, c.dtype, index.shape[0])
        state[0], state[1] = forward.reference, forward.rest
    R, columns = min(head.tile.rows, index.shape[0] - stash_rows), min(head.tile.columns, weight.shape[0])
    tile_buffer = _Buffer(hidden, c.dtype, R, columns)
    grads = _grad_buffer(hidden, c.dtype, R, columns)
    alone = stash_rows == 0 and len(recompute) == 1 and same_dtype  # nothing to add up
    sums_buffer = _Buffer(hidden, c.dtype, 0 if alone or not grad_weight else columns, weight.shape[1])
    for start, stop in head.tiles():
        weight_sums = bias_sums = None
        if grad_weight:
            assert d_weight is not None
            weight_sums = d_weight[start:stop] if alone else sums_buffer.matrix(stop - start, weight.shape[1]).zero_()
        if grad_bias:
            bias_sums = torch.zeros(stop - start, dtype=c.dtype, device=weight.device)
        if stash_rows:
            for begin, end in head.chunks(0, stash_rows) if converted else [(0, stash_rows)]:
                h = forward.stash[begin:end, start:stop]
                _add_weighted_rows(h, scaled_x[begin:end], coefs[begin:end], weight_sums, bias_sums, alone=False)
        for begin, end in recompute:
            assert labels is not None
            assert state is not None
            tile = tile_buffer.matrix(end - begin, stop - start)
            x = gather_rows(hidden, index[begin:end]).to(head.operand_dtype)
            _product(tile, x, weight[start:stop].to(head.operand_dtype).t())
            del x
            h = tile if grads is None else grads.matrix(end - begin, stop - start)
            steps.gradient(tile, labels[begin:end], state[:, begin:end].contiguous(), h, start)
            _add_weighted_rows(h, scaled_x[begin:end], coefs[begin:end], weight_sums, bias_sums, alone=alone)
        if d_weight is not None and weight_sums is not None and not alone:
            d_weight[start:stop] = weight_sums
        if d_bias is not None and bias_sums is not None:
            d_bias[start:stop] = bias_sums
    return d_hidden, d_weight, d_bias


def _times_weight(stash: Tensor, head: Head) -> Tensor:
    """h @ weight [stash rows, D]."""
    V, D = head.weight.shape
    out = torch.zeros(stash.shape[0], D, dtype=head.operand_dtype, device=stash.device)
    if stash.dtype == head.operand_dtype:
        return _product(out, stash[:, :V], head.weight) if stash.shape[0] else out
    for start, stop in head.tiles() if stash.shape[0] else ():
        weight = head.weight[start:stop].to(out.dtype)
        for begin, end in head.chunks(0, stash.shape[0]):
            _add_product(out[begin:end], stash[begin:end, start:stop].to(out.dtype), weight)
        del weight  # before the next tile is converted
    return out


def _scaled(values: Tensor, coefs: Tensor, dtype: torch.dtype) -> Tensor:
    """Row r of values [R, D] times coefs[r], rounded once."""
    if values.dtype == coefs.dtype or values.is_cuda:
        return (values * coefs.unsqueeze(1)).to(dtype)
    return values.to(coefs.dtype).mul_(coefs.unsqueeze(1)).to(dtype)  # the product would convert a copy of its own


def _row_slices(rows: int) -> list[tuple[int, int]]:
    """Rows to scale at a time, in a temporary of little size."""
    return [(begin, min(begin + SCALED_ROWS, rows)) for begin in range(0, rows, SCALED_ROWS)]


def _add_weighted_rows(
    h: Tensor,  # [R, n]
    scaled_x: Tensor,  # [R, D]
    coefs: Tensor,  # [R]
    weight_sums: Tensor | None,  # [n, D]
    bias_sums: Tensor | None,  # [n]
    *,
    alone: bool,
) -> None:
    """weight_sums += h^T @ scaled_x, or = where it is the only part; bias_sums += h^T @ coefs."""
    if weight_sums is not None:
        add = _product if alone else _add_product
        add(weight_sums, h.to(scaled_x.dtype).t(), scaled_x)
    if bias_sums is not None:
        bias_sums.addmv_(h.to(coefs.dtype).t(), coefs)


def peak_memory(
    rows: int,
    N: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    *,
    tile: TileShape,
    cuda: bool,
    stash_bytes: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> int:
    """An upper bound of the bytes beyond inputs, log-probs and gradients, over forward and backward."""
    with_head = grad_weight or grad_bias
    size, acc = dtype.itemsize, 8 if dtype == torch.float64 else 4
    operand = size if cuda else acc
    same, half = operand == size, size != acc
    stash_rows = stash_rows_within(stash_bytes, rows, V, dtype) if with_head else 0
    others = rows - stash_rows
    recomputed = others > 0
    columns, tiles = min(tile.columns, V), -(-V // tile.columns)
    R, R_kept, R_others = (min(tile.rows, n) for n in (rows, stash_rows, others))
    S = min(SCALED_ROWS, rows)
    # Index, labels, states and the other vectors of a few numbers a row; the bias.
    vectors = 4096 + 80 * N + (24 * acc + 24) * rows + 6 * tiles * acc * R + acc * V * (1 + grad_bias)
    kept = stash_rows * stash_stride(V) * size + others * D * size * grad_hidden
    weight_tile = 0 if same or rows == 0 else columns * D * acc  # converted
    # Each: what is held throughout, then the largest of what is needed in turns.
    forward = R * (columns * acc + D * operand)
    if grad_hidden and recomputed:
        forward += R * columns * size * half + R_others * D * acc
    forward += max(
        0 if same else R * D * size,  # hidden states before their conversion
        weight_tile + (R_others * columns * acc if grad_hidden and not same else 0),
        S * D * (size + acc * half * (not cuda)) * grad_hidden,  # the labels' rows of the weight
        2 * min(RESCALED_ROWS, R_kept) * columns * acc * half * (not cuda),
    )
    for_hidden = stash_rows * D * operand + max(
        S * D * (acc + size * half), 0 if same else weight_tile + R_kept * columns * acc
    )
    for_weight = 0
    if with_head:
        converted = not same or (grad_bias and half)
        all_kept = not recomputed and same and not grad_bias
        alone = stash_rows == 0 and 0 < rows <= tile.rows and same
        parts = R_others * columns * (acc + size * half)
        if grad_weight and not alone and not all_kept:
            parts += columns * D * acc
        parts += max(
            R_kept * columns * acc * converted,
            (weight_tile + R_others * D * (size + (0 if same else operand))) * recomputed,
            R_others * columns * acc * converted,
        )
        scaled = S * D * (size + acc + size * half * cuda)
        for_weight = rows * D * operand + max(scaled, 0 if all_kept else parts)
    return vectors + kept + max(forward, for_hidden * grad_hidden, for_weight)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of a tensor made current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
