"""Log-probabilities from logits: one read forward, one read and one write backward.

A row is one position of a [B, T] batch. The label's own term is kept out of its sum until the end: where it dominates,
log p = -log1p(rest) is exact in relative terms. Few rows are split over several programs each, whose sums a second
kernel merges in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dil_kernels.kernels.rows import (
    TINY_EXPONENT,
    aligned,
    cut,
    edges,
    meet,
    reduce_span,
    rescale,
    vector_elements,
)
from dil_kernels.kernels.scalar_math import LN2, LOG2E, TOTAL_SCALE, log1p, one_minus_exp, processed, tanh_slope

# Sizes and strides that differ from batch to batch. Addresses of rows come from them, widths of loads do not, and
# specialised on 1 and on multiples of 16 they would compile a kernel again whenever a batch has a new kind of length.
OF_THE_BATCH = ("num_rows", "T", "T_out", "stride_xb", "stride_dxb", "stride_yb", "stride_gb", "stride_gt")


@triton.jit
def _finish_row(
    logps_ptr,
    row_max_ptr,
    log_sum_ptr,
    statistics_ptr,
    x_ptr,
    row,
    num_rows,
    label,
    m,
    s,
    w,
    total,
    top,
    head,
    body,
    V,
    multiplier,
    inv_cap,
    HAS_CAP: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Add the edges and the label to the sums over the body, and store."""
    scale = multiplier * LOG2E
    VEC: tl.constexpr = vector_elements(x_ptr)
    index, mask = edges(head, body, V, VEC)
    keep = mask & (index != label)
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    v = tl.where(keep, processed(x, inv_cap, HAS_CAP), -float("inf"))
    x_label = tl.load(x_ptr + label, mask=(label >= 0) & (label < V), other=float("nan"))
    target = processed(x_label, inv_cap, HAS_CAP)
    m_row = tl.maximum(tl.maximum(m, tl.max(v, axis=0)), target)
    s, w = rescale(m, m_row, s, w, scale, STATISTICS)
    t = (v - m_row) * scale
    e = tl.exp2(t)
    rest = s + tl.sum(e, axis=0)
    t_own = (target - m_row) * scale
    own = tl.exp2(t_own)
    log_sum = tl.where(target == m_row, log1p(rest), tl.log(rest + own))
    # The difference of values first: no rounding at the size of the logits themselves.
    logp = (target - m_row) * multiplier - log_sum
    tl.store(logps_ptr + row, logp)
    tl.store(row_max_ptr + row, m_row)
    tl.store(log_sum_ptr + row, log_sum)
    if STATISTICS:
        w += tl.sum(e * tl.maximum(t, TINY_EXPONENT), axis=0) + own * tl.maximum(t_own, TINY_EXPONENT)
        total += tl.sum(tl.where(keep, v * TOTAL_SCALE, 0.0), axis=0) + target * TOTAL_SCALE
        tl.store(statistics_ptr + row, total / V / TOTAL_SCALE * multiplier)
        # Both parts are positive, so that an entropy near 0 is exact too.
        tl.store(statistics_ptr + num_rows + row, log_sum - w * LN2 / (rest + own))
        hit = target >= m_row
        if HAS_CAP:
            top = tl.maximum(top, tl.max(tl.where(keep, x.to(tl.float32), -float("inf")), axis=0))
            hit = x_label.to(tl.float32) >= top
        tl.store(statistics_ptr + 2 * num_rows + row, (hit & (logp == logp)).to(tl.float32))


@triton.jit
def _store_ignored(logps_ptr, row_max_ptr, log_sum_ptr, statistics_ptr, row, num_rows, STATISTICS: tl.constexpr):
    tl.store(logps_ptr + row, 0.0)
    tl.store(row_max_ptr + row, 0.0)
    tl.store(log_sum_ptr + row, 0.0)
    if STATISTICS:
        for k in tl.static_range(3):
            tl.store(statistics_ptr + k * num_rows + row, 0.0)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _logps_fwd_kernel(
    logps_ptr,  # (B, T_out) fp32, contiguous
    row_max_ptr,  # (B, T_out) fp32, contiguous
    log_sum_ptr,  # (B, T_out) fp32, contiguous
    statistics_ptr,  # (3, B, T_out) fp32, contiguous; unused without STATISTICS
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B, T) int64
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    num_rows,  # B T_out
    T_out,
    V,
    ignore_index,
    multiplier,  # 1 / temperature, or cap / temperature
    inv_cap,
    SHIFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,  # vectors of BLOCK_V that a lane reduces before one rescale
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    b = (row // T_out).to(tl.int64)
    t = (row % T_out).to(tl.int64)
    row = row.to(tl.int64)
    label = tl.load(labels_ptr + b * stride_yb + (t + SHIFT) * stride_yt)
    if label == ignore_index:
        _store_ignored(logps_ptr, row_max_ptr, log_sum_ptr, statistics_ptr, row, num_rows, STATISTICS)
        return
    x_ptr = logits_ptr + b * stride_xb + t * stride_xt
    head, body = cut(x_ptr, V)
    m, s, w, total, top = reduce_span(
        x_ptr + head, body, label - head, multiplier * LOG2E, inv_cap, HAS_CAP, STATISTICS, ROWS, BLOCK_V, STAGES
    )
    _finish_row(
        logps_ptr, row_max_ptr, log_sum_ptr, statistics_ptr, x_ptr, row, num_rows, label, m, s, w, total, top, head,
        body, V, multiplier, inv_cap, HAS_CAP, STATISTICS,
    )  # fmt: skip


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _logps_split_kernel(
    partials_ptr,  # (2 to 5, B T_out, SPLITS) fp32, as `reduce_span` returns them
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B, T) int64
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    num_rows,
    T_out,
    V,
    span,  # elements of a body for one split; a multiple of BLOCK_V
    ignore_index,
    multiplier,
    inv_cap,
    SHIFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    row = pid // SPLITS
    split = pid % SPLITS
    b = (row // T_out).to(tl.int64)
    t = (row % T_out).to(tl.int64)
    label = tl.load(labels_ptr + b * stride_yb + (t + SHIFT) * stride_yt)
    if label == ignore_index:
        return
    x_ptr = logits_ptr + b * stride_xb + t * stride_xt
    head, body = cut(x_ptr, V)
    begin = split * span
    m, s, w, total, top = reduce_span(
        x_ptr + head + begin,
        tl.minimum(span, body - begin),
        label - head - begin,
        multiplier * LOG2E,
        inv_cap,
        HAS_CAP,
        STATISTICS,
        ROWS,
        BLOCK_V,
        STAGES,
    )
    partial_ptr = partials_ptr + row.to(tl.int64) * SPLITS + split
    stride = num_rows * SPLITS
    tl.store(partial_ptr, m)
    tl.store(partial_ptr + stride, s)
    if STATISTICS:
        tl.store(partial_ptr + 2 * stride, w)
        tl.store(partial_ptr + 3 * stride, total)
        if HAS_CAP:
            tl.store(partial_ptr + 4 * stride, top)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _logps_merge_kernel(
    logps_ptr,  # (B, T_out) fp32, contiguous
    row_max_ptr,  # (B, T_out) fp32, contiguous
    log_sum_ptr,  # (B, T_out) fp32, contiguous
    statistics_ptr,  # (3, B, T_out) fp32, contiguous; unused without STATISTICS
    partials_ptr,  # (2 to 5, B T_out, SPLITS) fp32
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B, T) int64
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    num_rows,
    T_out,
    V,
    ignore_index,
    multiplier,
    inv_cap,
    SHIFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    b = (row // T_out).to(tl.int64)
    t = (row % T_out).to(tl.int64)
    row = row.to(tl.int64)
    label = tl.load(labels_ptr + b * stride_yb + (t + SHIFT) * stride_yt)
    if label == ignore_index:
        _store_ignored(logps_ptr, row_max_ptr, log_sum_ptr, statistics_ptr, row, num_rows, STATISTICS)
        return
    x_ptr = logits_ptr + b * stride_xb + t * stride_xt
    head, body = cut(x_ptr, V)
    stride = num_rows * SPLITS  # of a split launch there are few rows
    partial_ptrs = partials_ptr + row * SPLITS + tl.arange(0, SPLITS)
    m = tl.load(partial_ptrs)
    s = tl.load(partial_ptrs + stride)
    w = tl.zeros((SPLITS,), tl.float32)
    total = tl.zeros((SPLITS,), tl.float32)
    top = tl.zeros((SPLITS,), tl.float32)
    if STATISTICS:
        w = tl.load(partial_ptrs + 2 * stride)
        total = tl.load(partial_ptrs + 3 * stride)
        if HAS_CAP:
            top = tl.load(partial_ptrs + 4 * stride)
    m, s, w, total, top = meet(m, s, w, total, top, multiplier * LOG2E, STATISTICS)
    _finish_row(
        logps_ptr, row_max_ptr, log_sum_ptr, statistics_ptr, x_ptr, row, num_rows, label, m, s, w, total, top, head,
        body, V, multiplier, inv_cap, HAS_CAP, STATISTICS,
    )  # fmt: skip


@triton.jit
def _row_gradient(x, index, label, has_label, g, row_max, log_sum, multiplier, inv_cap, HAS_CAP: tl.constexpr):
    """g d logp / d x of some elements of a row; has_label says whether the label may be among them."""
    d = processed(x, inv_cap, HAS_CAP) - row_max
    dx = -g * tl.exp2(d * (multiplier * LOG2E) - log_sum * LOG2E)
    if has_label:
        own = tl.sum(tl.where(index == label, d * multiplier - log_sum, 0.0), axis=0)  # log p
        dx = tl.where(index == label, g * one_minus_exp(own), dx)
    if HAS_CAP:
        dx *= tanh_slope(x.to(tl.float32) * inv_cap)
    return dx


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _logps_bwd_kernel(
    grad_logits_ptr,  # (B, T, V); may be the logits themselves
    grad_logps_ptr,  # (B, T_out)
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B, T) int64
    row_max_ptr,  # (B, T_out) fp32, contiguous
    log_sum_ptr,  # (B, T_out) fp32, contiguous
    stride_dxb,
    stride_dxt,
    stride_gb,
    stride_gt,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    num_rows,  # B T
    T,
    T_out,
    V,
    ignore_index,
    inv_temperature,
    multiplier,  # 1 / temperature, or cap / temperature
    inv_cap,
    SHIFT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SAME_PHASE: tl.constexpr,  # rows of logits and gradient start alike relative to 16-byte boundaries
    TILES: tl.constexpr,  # of BLOCK_V that a program takes
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Blocks of a row lie side by side in a launch: y and z, of which each holds 65535, count the rows.
    block = tl.program_id(0)
    row = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    if row >= num_rows:
        return
    b = (row // T).to(tl.int64)
    t = (row % T).to(tl.int64)
    VEC: tl.constexpr = vector_elements(grad_logits_ptr)
    dtype: tl.constexpr = grad_logits_ptr.dtype.element_ty
    dx_ptr = grad_logits_ptr + b * stride_dxb + t * stride_dxt
    head, body = cut(dx_ptr, V)
    edge, edge_mask = edges(head, body, V, VEC)
    # As a tensor: the interpreter of Triton 3.9 gives a comparison of scalars their own type.
    edge_mask &= tl.full((2 * VEC,), block, tl.int32) == 0
    has_label = t < T_out
    label = tl.load(labels_ptr + b * stride_yb + (t + SHIFT) * stride_yt, mask=has_label, other=ignore_index)
    first = block * TILES * BLOCK_V
    if label == ignore_index:
        for i in range(TILES):
            offsets = first + i * BLOCK_V + tl.arange(0, BLOCK_V)
            dx_ptrs = aligned(dx_ptr, head + offsets, BLOCK_V)
            tl.store(dx_ptrs, tl.zeros((BLOCK_V,), dtype), mask=offsets // VEC < body // VEC)
        tl.store(dx_ptr + edge, tl.zeros((2 * VEC,), dtype), mask=edge_mask)
        return
    g = tl.load(grad_logps_ptr + b * stride_gb + t * stride_gt).to(tl.float32) * inv_temperature
    row_max = tl.load(row_max_ptr + b * T_out + t)
    log_sum = tl.load(log_sum_ptr + b * T_out + t)
    x_ptr = logits_ptr + b * stride_xb + t * stride_xt
    for i in tl.range(TILES, num_stages=STAGES):
        offsets = first + i * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = offsets // VEC < body // VEC
        index = head + offsets
        x_ptrs = aligned(x_ptr, index, BLOCK_V) if SAME_PHASE else x_ptr + index
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        begin = head + first + i * BLOCK_V
        here = (label >= begin) & (label < begin + BLOCK_V)
        dx = _row_gradient(x, index, label, here, g, row_max, log_sum, multiplier, inv_cap, HAS_CAP)
        tl.store(aligned(dx_ptr, index, BLOCK_V), dx.to(dtype), mask=mask)
    if block == 0:
        x_edge = tl.load(x_ptr + edge, mask=edge_mask, other=0.0)
        dx_edge = _row_gradient(x_edge, edge, label, True, g, row_max, log_sum, multiplier, inv_cap, HAS_CAP)
        tl.store(dx_ptr + edge, dx_edge.to(dtype), mask=edge_mask)
