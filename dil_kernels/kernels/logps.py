"""Log-probabilities from logits: one read forward, one read and one write backward.

A row is one position of a [B, T] batch. Exponentials are taken in base 2 of differences from a running maximum, which
is kept per lane and rescaled once per tile; lanes meet once per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Below every finite fp32 logit that matters, and finite, so that a lane of -inf gives exp2(-inf) = 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _logps_fwd_kernel(
    logps_ptr,  # (B, T_out) fp32, contiguous
    row_max_ptr,  # (B, T_out) fp32, contiguous
    log_sum_ptr,  # (B, T_out) fp32, contiguous
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B, T) int64
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    T_out,
    V,
    ignore_index,
    inv_temperature,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,  # vectors of BLOCK_V that a lane reduces before one rescale
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // T_out
    t = row % T_out
    label = tl.load(labels_ptr + b * stride_yb + (t + SHIFT) * stride_yt)
    if label == ignore_index:
        tl.store(logps_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        return
    x_ptr = logits_ptr + b * stride_xb + t * stride_xt
    scale = inv_temperature * LOG2E
    offsets = tl.arange(0, ROWS)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    m = tl.full((BLOCK_V,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, ROWS * BLOCK_V):
        x = tl.load(x_ptr + start + offsets, mask=start + offsets < V, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        s = s * tl.exp2((m - m_new) * scale) + tl.sum(tl.exp2((x - m_new[None, :]) * scale), axis=0)
        m = m_new
    m_row = tl.max(m, axis=0)
    s_row = tl.sum(s * tl.exp2((m - m_row) * scale), axis=0)
    log_s = tl.log(s_row)

    valid = (label >= 0) & (label < V)
    target = tl.load(x_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
    # The difference of logits first: no rounding at the size of the logits themselves.
    tl.store(logps_ptr + row, (target - m_row) * inv_temperature - log_s)
    tl.store(row_max_ptr + row, m_row)
    tl.store(log_sum_ptr + row, tl.where(valid, log_s, float("nan")))


@triton.jit
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
    T,
    T_out,
    V,
    num_blocks,
    ignore_index,
    inv_temperature,
    SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // num_blocks
    b = row // T
    t = row % T
    offsets = (pid % num_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offsets < V
    dx_ptrs = grad_logits_ptr + b * stride_dxb + t * stride_dxt + offsets
    has_label = t < T_out
    label = tl.load(labels_ptr + b * stride_yb + (t + SHIFT) * stride_yt, mask=has_label, other=ignore_index)
    if label == ignore_index:
        tl.store(dx_ptrs, tl.zeros((BLOCK_V,), grad_logits_ptr.dtype.element_ty), mask=mask)
        return
    g = tl.load(grad_logps_ptr + b * stride_gb + t * stride_gt).to(tl.float32) * inv_temperature
    row_max = tl.load(row_max_ptr + b * T_out + t)
    log_sum = tl.load(log_sum_ptr + b * T_out + t)
    x = tl.load(logits_ptr + b * stride_xb + t * stride_xt + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    p = tl.exp2(((x - row_max) * inv_temperature - log_sum) * LOG2E)
    dx = g * (tl.where(offsets == label, 1.0, 0.0) - p)
    tl.store(dx_ptrs, dx.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def fwd_launch_shape(V: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_V, num_warps) of the forward kernel for a vocabulary of V."""
    if V <= 1024:
        return 1, max(32, triton.next_power_of_2(V)), 4
    if V <= 8192:
        return 4, 1024, 4
    return 8, 2048, 8


def bwd_launch_shape(V: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps) of the backward kernel for a vocabulary of V."""
    block = min(4096, max(32, triton.next_power_of_2(V)))
    return block, 8 if block >= 4096 else 4
