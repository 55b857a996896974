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

from typing import NamedTuple

import torch
from torch import Tensor

from dil_kernels.ops.head_steps import RESCALED_ROWS, SCALED_ROWS, CppSteps, Head, TileShape
from dil_kernels.ops.products import add_product, new_result, operand_dtype, product

# Rows of the stash start at multiples of this many elements, as fast matrix products want.
STASH_ALIGNMENT = 64
# On the GPU a chunk keeps the tensor cores busy and a tile of fp32 logits stays small (134 MB); on the CPU a tile of
# logits and its part of the weight stay in the last-level cache.
TILE_SHAPES = {"cuda": TileShape(4096, 8192), "cpu": TileShape(512, 4096)}


def stash_stride(V: int) -> int:
    """Elements of a row of the stash."""
    return -(-V // STASH_ALIGNMENT) * STASH_ALIGNMENT


def stash_rows_within(stash_bytes: int, rows: int, V: int, dtype: torch.dtype) -> int:
    """How many of `rows` rows a stash of so many bytes holds."""
    return min(rows, stash_bytes // (stash_stride(V) * dtype.itemsize))


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


class TileBuffer:
    """Memory that every tile of a pass reuses, as a contiguous matrix of the size that is needed."""

    def __init__(self, like: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
        self._data = torch.empty(rows * columns, dtype=dtype, device=like.device)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """What a tile takes of it."""
        return self._data[: rows * columns].view(rows, columns)


def grad_buffer(hidden: Tensor, tile_dtype: torch.dtype, rows: int, columns: int) -> TileBuffer | None:
    """Where h goes that is not kept; None where it can take the place of its tile."""
    return None if hidden.dtype == tile_dtype else TileBuffer(hidden, hidden.dtype, rows, columns)


def _fresh_state(like: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """reference, rest, label, others_max, dot, total, uncapped: see csrc/cpu/head_kernels.h."""
    state = torch.zeros(7, rows, dtype=dtype, device=like.device)
    state[0].fill_(-torch.inf)
    state[2].fill_(torch.nan)
    state[3].fill_(-torch.inf)
    return state


def head_forward(
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # [N] int64
    head: Head,
    make_steps: type[CppSteps],
    *,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    grad_hidden: bool,
    statistics: bool,
) -> HeadForward:
    """Log-probs of the targets of at most `rows` scored rows, and what the backward needs."""
    D = hidden.shape[1]
    V = head.weight.shape[0]
    dtype = head.accumulation_dtype
    steps = make_steps(head, statistics)
    scored = steps.select(targets, ignore_index, rows)
    sums = hidden.new_empty(rows - stash_rows if grad_hidden else 0, D)
    stash = new_result(hidden, stash_rows, stash_stride(V))
    chunk_rows, columns = min(head.how.tile_rows, rows), min(head.how.tile_columns, V)
    tile_buffer = TileBuffer(hidden, dtype, chunk_rows, columns)
    grads = grad_buffer(hidden, dtype, chunk_rows if grad_hidden and stash_rows < rows else 0, columns)
    # A stash ends a chunk, so that a chunk is kept whole or not at all.
    for begin, end in head.chunks(0, stash_rows) + head.chunks(stash_rows, rows):
        chunk, R = scored.part(begin, end), end - begin
        kept = stash[begin:end, :V] if begin < stash_rows else None
        references = hidden.new_empty(len(head.tiles()) if kept is not None else 0, R, dtype=dtype)
        row_sums = torch.zeros(R, D, dtype=dtype, device=hidden.device) if grad_hidden and kept is None else None
        x = steps.gather(hidden, chunk.index)
        state = over_tiles(steps, x, chunk.labels, tile_buffer, grads, kept, references, row_sums)
        label_grad, norm = steps.finish(state, chunk, V)
        if row_sums is not None:
            out = sums[begin - stash_rows : end - stash_rows]
            steps.finish_sums(row_sums, chunk.labels, label_grad, norm, out)
        if kept is not None:
            steps.finish_stash(kept, references, state, chunk.labels, label_grad, norm)
        del x, row_sums  # before the next ones are made
    results = (scored.logps, scored.statistics, scored.index, scored.reference, scored.rest, scored.factor)
    return HeadForward(*results, sums, stash)


def over_tiles(
    steps: CppSteps,
    x: Tensor,  # [R, D]
    labels: Tensor,  # [R]
    tile_buffer: TileBuffer,
    grads: TileBuffer | None,
    kept: Tensor | None,  # [R, V] of the stash
    references: Tensor,  # [tiles, R], of what is kept
    row_sums: Tensor | None,  # [R, D]
) -> Tensor:
    """The state [7, R] of rows after all tiles; h goes to the stash, or its products with the weight are added up."""
    head, R = steps.head, x.shape[0]
    state = _fresh_state(x, head.accumulation_dtype, R)
    for number, (start, stop) in enumerate(head.tiles()):
        weight = head.weight[start:stop].to(head.operand_dtype)
        tile = product(tile_buffer.matrix(R, stop - start), x, weight.t())
        grad = reference = None
        if kept is not None:
            grad, reference = kept[:, start:stop], references[number]
        elif row_sums is not None:
            grad = tile if grads is None else grads.matrix(R, stop - start)
        steps.tile(tile, labels, state, grad, row_sums, start, reference)
        if row_sums is not None:
            assert grad is not None
            add_product(row_sums, grad.to(head.operand_dtype), weight)
        del weight  # before the next tile is converted
    return state


def head_backward(
    grad_logps: Tensor,  # [N]
    hidden: Tensor | None,  # [N, D], for the weight and the bias
    targets: Tensor | None,  # [N], where rows are beyond the stash
    head: Head,
    make_steps: type[CppSteps],
    forward: HeadForward,
    *,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [N, D], weight [V, D] and bias [V], each if asked."""
    index, weight = forward.row_index, head.weight
    M, stash_rows = index.shape[0], forward.stash.shape[0]
    steps = make_steps(head, False)
    coefs = steps.coefficients(grad_logps, index, forward.factor)
    d_hidden = None
    if grad_hidden:
        d_hidden = weight.new_zeros(grad_logps.shape[0], weight.shape[1])
        steps.scatter_scaled(_times_weight(forward.stash, head), index[:stash_rows], coefs[:stash_rows], d_hidden)
        steps.scatter_scaled(forward.sums, index[stash_rows:], coefs[stash_rows:], d_hidden)
    if not (grad_weight or grad_bias):
        return d_hidden, None, None
    assert hidden is not None
    scaled_x = steps.gather_scaled(hidden, index, coefs)
    d_weight = new_result(weight, *weight.shape) if grad_weight else None
    d_bias = weight.new_empty(weight.shape[0]) if grad_bias else None
    same_dtype = weight.dtype == head.operand_dtype
    if stash_rows == M and d_bias is None and same_dtype:
        assert d_weight is not None
        return d_hidden, product(d_weight, forward.stash[:, : weight.shape[0]].t(), scaled_x), None

    dtype = head.accumulation_dtype
    converted = not same_dtype or (grad_bias and weight.dtype != dtype)  # what of the stash is multiplied
    recompute = head.chunks(stash_rows, M)
    labels = state = None
    if recompute:
        assert targets is not None
        labels = steps.labels(targets, index)
        state = _fresh_state(hidden, dtype, M)
        state[0], state[1] = forward.reference, forward.rest
    R, columns = min(head.how.tile_rows, M - stash_rows), min(head.how.tile_columns, weight.shape[0])
    tile_buffer = TileBuffer(hidden, dtype, R, columns)
    grads = grad_buffer(hidden, dtype, R, columns)
    alone = stash_rows == 0 and len(recompute) == 1 and same_dtype  # nothing to add up
    sums_buffer = TileBuffer(hidden, dtype, 0 if alone or not grad_weight else columns, weight.shape[1])
    for start, stop in head.tiles():
        weight_sums = bias_sums = None
        if grad_weight:
            assert d_weight is not None
            weight_sums = d_weight[start:stop] if alone else sums_buffer.matrix(stop - start, weight.shape[1]).zero_()
        if grad_bias:
            bias_sums = torch.zeros(stop - start, dtype=dtype, device=weight.device)
        if stash_rows:
            for begin, end in head.chunks(0, stash_rows) if converted else [(0, stash_rows)]:
                h = forward.stash[begin:end, start:stop]
                _add_weighted_rows(h, scaled_x[begin:end], coefs[begin:end], weight_sums, bias_sums, alone=False)
        for begin, end in recompute:
            assert labels is not None
            assert state is not None
            tile = tile_buffer.matrix(end - begin, stop - start)
            x = steps.gather(hidden, index[begin:end])
            product(tile, x, weight[start:stop].to(head.operand_dtype).t())
            del x
            h = tile if grads is None else grads.matrix(end - begin, stop - start)
            steps.tile_again(tile, labels[begin:end], state[:, begin:end].contiguous(), h, start)
            _add_weighted_rows(h, scaled_x[begin:end], coefs[begin:end], weight_sums, bias_sums, alone=alone)
        if d_weight is not None and weight_sums is not None and not alone:
            d_weight[start:stop] = weight_sums
        if d_bias is not None and bias_sums is not None:
            d_bias[start:stop] = bias_sums
    return d_hidden, d_weight, d_bias


def _times_weight(stash: Tensor, head: Head) -> Tensor:
    """h @ weight [stash rows, D]."""
    V, D = head.weight.shape
    dtype = head.operand_dtype if stash.is_cuda else head.accumulation_dtype
    out = torch.zeros(stash.shape[0], D, dtype=dtype, device=stash.device)
    if stash.dtype == head.operand_dtype:
        return product(out, stash[:, :V], head.weight) if stash.shape[0] else out
    for start, stop in head.tiles() if stash.shape[0] else ():
        weight = head.weight[start:stop].to(dtype)
        for begin, end in head.chunks(0, stash.shape[0]):
            add_product(out[begin:end], stash[begin:end, start:stop].to(dtype), weight)
        del weight  # before the next tile is converted
    return out


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
        add = product if alone else add_product
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
    operand = operand_dtype(dtype, cuda=cuda).itemsize
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
    for_hidden = stash_rows * D * (operand if cuda else acc) + max(
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
        scaled = S * D * (size + acc + size * half * same)
        for_weight = rows * D * operand + max(scaled, 0 if all_kept else parts)
    return vectors + kept + max(forward, for_hidden * grad_hidden, for_weight)
