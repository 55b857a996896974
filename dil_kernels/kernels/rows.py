"""Reading rows of logits: where to cut them for 16-byte vectors, and the online log-sum-exp over a part of one.

A row is cut at 16-byte boundaries into a body, which moves in 16-byte vectors whatever the vocabulary and the strides,
and two edges shorter than a vector. Exponentials are taken in base 2 of differences from a running maximum, which is
kept per lane and rescaled once per tile; lanes meet once per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dil_kernels.kernels.scalar_math import TOTAL_SCALE, processed

# Below every finite fp32 logit that matters, and finite, so that a lane of -inf gives exp2(-inf) = 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# exp2 of it is 0, and 0 times it is 0: what e * t takes for t = -inf.
TINY_EXPONENT = tl.constexpr(-150.0)


@triton.constexpr_function
def vector_elements(ptr):
    """Elements of 16 bytes."""
    return 128 // ptr.dtype.element_ty.primitive_bitwidth


@triton.jit
def cut(row_ptr, V):
    """Elements before the first 16-byte boundary of a row, and those up to the last one."""
    VEC: tl.constexpr = vector_elements(row_ptr)
    head = ((16 - row_ptr.to(tl.int64) % 16) % 16).to(tl.int32) // (16 // VEC)
    head = tl.minimum(head, V)
    return head, (V - head) // VEC * VEC


@triton.jit
def edges(head, body, V, VEC: tl.constexpr):
    """Indices in the row of both edges, (2 VEC,), -1 where a lane has none, and whether it has one."""
    lane = tl.arange(0, 2 * VEC)
    index = tl.where(lane < VEC, lane, head + body + lane - VEC)
    mask = index < tl.where(lane < VEC, head, V)
    return tl.where(mask, index, -1), mask


@triton.jit
def aligned(ptr, offsets, BLOCK_V: tl.constexpr):
    """ptr + offsets (BLOCK_V,), which the compiler may take to start at a 16-byte boundary."""
    return tl.max_contiguous(tl.multiple_of(ptr + offsets, 16), BLOCK_V)


@triton.jit
def aligned_rows(ptr, offsets, BLOCK_V: tl.constexpr):
    """The same of each row of offsets (ROWS, BLOCK_V)."""
    return tl.max_contiguous(tl.multiple_of(ptr + offsets, [1, 16]), [1, BLOCK_V])


@triton.jit
def rescale(m, m_new, s, w, scale, STATISTICS: tl.constexpr):
    """Sums of 2^t and of t 2^t, t = (v - m) scale, under another maximum."""
    step = (m - m_new) * scale
    shrink = tl.exp2(step)
    if STATISTICS:
        w = shrink * (w + s * tl.maximum(step, TINY_EXPONENT))
    return s * shrink, w


@triton.jit
def accumulate(m, s, w, v, scale, STATISTICS: tl.constexpr):
    """Take v (ROWS, BLOCK_V) into the lanes (BLOCK_V,); -inf adds nothing."""
    m_new = tl.maximum(m, tl.max(v, axis=0))
    s, w = rescale(m, m_new, s, w, scale, STATISTICS)
    t = (v - m_new[None, :]) * scale
    e = tl.exp2(t)
    if STATISTICS:
        w += tl.sum(e * tl.maximum(t, TINY_EXPONENT), axis=0)
    return m_new, s + tl.sum(e, axis=0), w


@triton.jit
def meet(m, s, w, total, top, scale, STATISTICS: tl.constexpr):
    """Lanes or splits to one."""
    m_all = tl.max(m, axis=0)
    s, w = rescale(m, m_all, s, w, scale, STATISTICS)
    return m_all, tl.sum(s, axis=0), tl.sum(w, axis=0), tl.sum(total, axis=0), tl.max(top, axis=0)


@triton.jit
def reduce_span(
    span_ptr,
    length,
    label,
    scale,
    inv_cap,
    HAS_CAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over a part of a body without its label: maximum, sums of 2^t and of t 2^t, TOTAL_SCALE times the sum of the
    values, and the largest logit before softcapping, which may round different ones to the same value.

    The part starts at a 16-byte boundary and is whole vectors long, or empty where its length is negative; the label
    counts from its start. With more than one stage, tiles are copied to shared memory ahead of their use.
    """
    VEC: tl.constexpr = vector_elements(span_ptr)
    TILE: tl.constexpr = ROWS * BLOCK_V
    offsets = tl.arange(0, ROWS)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    m = tl.full((BLOCK_V,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    w = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    top = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    num_full = tl.maximum(length, 0) // TILE
    label_tile = tl.where(label >= 0, tl.minimum(label // TILE, num_full), num_full).to(tl.int32)
    has_label = (label_tile < num_full).to(tl.int32)
    # Full tiles but the label's need no mask.
    for i in tl.range(0, num_full - has_label, num_stages=STAGES):
        tile = i + (i >= label_tile).to(tl.int32)
        x = tl.load(aligned_rows(span_ptr, tile * TILE + offsets, BLOCK_V))
        v = processed(x, inv_cap, HAS_CAP)
        m, s, w = accumulate(m, s, w, v, scale, STATISTICS)
        if STATISTICS:
            total += tl.sum(v * TOTAL_SCALE, axis=0)
            if HAS_CAP:
                top = tl.maximum(top, tl.max(x.to(tl.float32), axis=0))
    # The tile that the span ends in, if any, and the label's, if it is another.
    for j in range((num_full * TILE >= length).to(tl.int32), 1 + has_label):
        index = tl.where(j == 0, num_full, label_tile) * TILE + offsets
        x = tl.load(aligned_rows(span_ptr, index, BLOCK_V), mask=index // VEC < length // VEC, other=0.0)
        keep = (index < length) & (index != label)
        v = tl.where(keep, processed(x, inv_cap, HAS_CAP), -float("inf"))
        m, s, w = accumulate(m, s, w, v, scale, STATISTICS)
        if STATISTICS:
            total += tl.sum(tl.where(keep, v * TOTAL_SCALE, 0.0), axis=0)
            if HAS_CAP:
                top = tl.maximum(top, tl.max(tl.where(keep, x.to(tl.float32), -float("inf")), axis=0))
    return meet(m, s, w, total, top, scale, STATISTICS)
