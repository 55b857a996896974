"""What happens to the rows of the head around its tiles, on the GPU: which are scored, gathered, finished, scattered.

Each of these is one launch where PyTorch takes several of a few microseconds; `dil_kernels.ops.head_steps` says what
they compute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dil_kernels.kernels.scalar_math import LN2, LOG2E, TOTAL_SCALE, log1p, tanh_slope

# log(2) in two parts, of which the first times an integer below 2^9 is exact in fp32.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.4286068203094173e-06)

# What differs from batch to batch, or tile to tile: specialised on 1 and on multiples of 16, it would compile a kernel
# again for each kind.
OF_THE_BATCH = ("N", "M", "R")


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _select_rows_kernel(
    index_ptr,  # (M,) int64
    labels_ptr,  # (M,) int64
    logps_ptr,  # (N,) fp32
    statistics_ptr,  # (3, N) fp32; unused without STATISTICS
    targets_ptr,  # (N,) int64
    stride_targets,
    N,
    M,
    ignore_index,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In one program, which keeps the rows in order."""
    placed = tl.zeros((), tl.int64)
    lane = tl.arange(0, BLOCK)
    for first in range(0, N, BLOCK):
        row = first + lane
        mask = row < N
        target = tl.load(targets_ptr + row.to(tl.int64) * stride_targets, mask=mask, other=0)
        scored = mask & (target != ignore_index)
        place = placed + tl.cumsum(scored.to(tl.int32), axis=0) - 1
        kept = scored & (place < M)
        tl.store(index_ptr + place, row.to(tl.int64), mask=kept)
        tl.store(labels_ptr + place, target, mask=kept)
        value = tl.where(scored & (place >= M), float("nan"), 0.0)
        tl.store(logps_ptr + row, value, mask=mask)
        if STATISTICS:
            tl.store(statistics_ptr + row, value, mask=mask)
            tl.store(statistics_ptr + N + row, value, mask=mask)
            tl.store(statistics_ptr + 2 * N + row, tl.zeros((BLOCK,), tl.float32), mask=mask)
        placed += tl.sum(scored.to(tl.int32), axis=0)
    for first in range(placed, M, BLOCK):
        row = first + lane
        tl.store(index_ptr + row, tl.zeros((BLOCK,), tl.int64) + N, mask=row < M)
        tl.store(labels_ptr + row, tl.zeros((BLOCK,), tl.int64), mask=row < M)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _gather_rows_kernel(
    out_ptr,  # (M, D), contiguous
    values_ptr,  # (N, D)
    index_ptr,  # (M,) int64
    coefs_ptr,  # (M,) fp32; unused without SCALED
    stride_values,
    N,
    D,
    SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(index_ptr + row)
    # As a number: the interpreter of Triton 3.9 gives a comparison of scalars their own type.
    available = D * (source < N).to(tl.int32)
    x = tl.load(values_ptr + source * stride_values + columns, mask=columns < available, other=0.0)
    if SCALED:
        x = x.to(tl.float32) * tl.load(coefs_ptr + row)
    tl.store(out_ptr + row * D + columns, x.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _scatter_rows_kernel(
    out_ptr,  # (N, D), contiguous
    values_ptr,  # (M, D), contiguous
    index_ptr,  # (M,) int64
    coefs_ptr,  # (M,) fp32
    N,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(index_ptr + row)
    mask = columns < D * (target < N).to(tl.int32)
    x = tl.load(values_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32) * tl.load(coefs_ptr + row)
    tl.store(out_ptr + target * D + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _coefficients_kernel(
    coefs_ptr,  # (M,) fp32
    grad_logps_ptr,  # (N,)
    index_ptr,  # (M,) int64
    factor_ptr,  # (M,) fp32
    stride_grad,
    N,
    M,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < M
    source = tl.load(index_ptr + row, mask=mask, other=0)
    grad = tl.load(grad_logps_ptr + source * stride_grad, mask=mask & (source < N), other=0.0).to(tl.float32)
    tl.store(coefs_ptr + row, grad * scale * tl.load(factor_ptr + row, mask=mask, other=0.0), mask=mask)


@triton.jit
def _exp(x):
    """e^x for x <= 0, whose error does not grow with x: 2^n e^r with x = n log(2) + r."""
    x = tl.where(x < -200.0, -200.0, x)  # 0 from -104 on
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(n) * tl.exp2(r * LOG2E)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _finish_rows_kernel(
    logps_ptr,  # (N,) fp32
    statistics_ptr,  # (3, N) fp32; unused without STATISTICS
    reference_ptr,  # (R,) fp32
    rest_ptr,  # (R,) fp32
    factor_ptr,  # (R,) fp32
    label_grad_ptr,  # (R,) fp32
    norm_ptr,  # (R,) fp32
    state_ptr,  # (7, R) fp32: reference, rest, label, others_max, dot, total, uncapped
    index_ptr,  # (R,) int64
    N,
    R,
    V,
    softcap,
    temperature,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < R
    reference = tl.load(state_ptr + row, mask=mask, other=0.0)
    rest = tl.load(state_ptr + R + row, mask=mask, other=1.0)
    label = tl.load(state_ptr + 2 * R + row, mask=mask, other=0.0)
    uncapped = label
    if SOFTCAP:
        uncapped = tl.load(state_ptr + 6 * R + row, mask=mask, other=0.0)
    has_label = label == label
    label = tl.where(label == float("inf"), float("nan"), label)
    # In units of whichever is larger, the label's term or the reference: neither overflows, and where the label
    # dominates, 1 - p keeps its digits, and so does log p.
    d = (label - reference) / temperature
    e = _exp(-tl.abs(d))
    ahead = d >= 0
    factor = tl.where(ahead, e / (1.0 + rest * e), 1.0 / (rest + e))
    behind = tl.where(e >= rest, -log1p(rest / e), d - tl.log(rest + e))
    logp = tl.where(ahead, -log1p(rest * e), behind)
    target = tl.load(index_ptr + row, mask=mask, other=N)
    placed = mask & (target < N)
    tl.store(logps_ptr + target, logp, mask=placed)
    if STATISTICS:
        dot = tl.load(state_ptr + 4 * R + row, mask=mask, other=0.0) / temperature
        total = tl.load(state_ptr + 5 * R + row, mask=mask, other=0.0)
        mean = total / V / TOTAL_SCALE / temperature
        tl.store(statistics_ptr + target, tl.where(has_label, mean, float("nan")), mask=placed)
        spread = tl.where(ahead, rest * d - dot, -dot - tl.where(e == 0.0, 0.0, e * d))
        spread = tl.where(rest == 0.0, 0.0, spread) * factor
        log_sum = tl.where(ahead, log1p(rest * e), tl.log(rest + e))
        tl.store(statistics_ptr + N + target, spread + log_sum, mask=placed)
        highest = tl.load(state_ptr + 3 * R + row, mask=mask, other=0.0)
        hit = (uncapped if SOFTCAP else label) >= highest
        tl.store(statistics_ptr + 2 * N + target, (hit & (logp == logp)).to(tl.float32), mask=placed)
    label_grad = rest
    if SOFTCAP:
        label_grad = rest * tanh_slope(uncapped / softcap)
    norm = tl.full((BLOCK,), 1.0, tl.float32)
    if NORMALISE:
        # So that neither h nor c factor hidden leaves the range of fp16: the sum of -h is between 1 and 2.
        exponent = tl.where(rest > 0.0, tl.floor(tl.log2(rest)), 0.0)
        norm = tl.exp2(-exponent)
        reference += exponent * (LN2 * temperature)
    tl.store(reference_ptr + row, reference, mask=mask)
    tl.store(rest_ptr + row, rest * norm, mask=mask)
    tl.store(factor_ptr + row, factor / norm, mask=mask)
    tl.store(label_grad_ptr + row, label_grad, mask=mask)
    tl.store(norm_ptr + row, norm, mask=mask)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _finish_sums_kernel(
    out_ptr,  # (R, D), contiguous
    sums_ptr,  # (R, D) fp32, contiguous
    weight_ptr,  # (V, D)
    labels_ptr,  # (R,) int64
    label_grad_ptr,  # (R,) fp32
    norm_ptr,  # (R,) fp32
    stride_weight,
    V,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < D
    label = tl.load(labels_ptr + row)
    # As a number: the interpreter of Triton 3.9 gives a comparison of scalars their own type.
    available = D * ((label >= 0) & (label < V)).to(tl.int32)
    own = tl.load(weight_ptr + label * stride_weight + columns, mask=columns < available, other=0.0).to(tl.float32)
    total = tl.load(sums_ptr + row * D + columns, mask=mask, other=0.0) + tl.load(label_grad_ptr + row) * own
    tl.store(out_ptr + row * D + columns, (total * tl.load(norm_ptr + row)).to(out_ptr.dtype.element_ty), mask=mask)


ROW_BLOCK, ROW_WARPS = 256, 4
SELECT_BLOCK, SELECT_WARPS = 4096, 16
COLUMNS, COLUMN_WARPS = 2048, 4


def _block(size: int, largest: int) -> int:
    return min(largest, max(32, triton.next_power_of_2(size)))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def select_rows(
    targets: Tensor,  # [N]
    ignore_index: int,
    rows: int,
    index: Tensor,  # [rows]
    labels: Tensor,  # [rows]
    logps: Tensor,  # [N]
    statistics: Tensor,  # [3, N], or [3, 0]
) -> None:
    """Write where the scored targets are and what they are, and what the results are of what is not scored."""
    N, measured = targets.shape[0], statistics.numel() > 0
    block = _block(max(N, rows), SELECT_BLOCK)
    _select_rows_kernel[(1,)](
        index, labels, logps, statistics, targets, targets.stride(0), N, rows, ignore_index,
        STATISTICS=measured, BLOCK=block, num_warps=max(1, min(SELECT_WARPS, block // 256)),
    )  # fmt: skip


def gather_rows(values: Tensor, index: Tensor, coefs: Tensor | None, out: Tensor) -> Tensor:
    """out [M, D] = values [N, D] by index [M], times coefs [M] if given; 0 for padding."""
    (N, D), M = values.shape, index.shape[0]
    if M and D:
        values, block = _unit_stride(values), _block(D, COLUMNS)
        _gather_rows_kernel[(M, triton.cdiv(D, block))](
            out, values, index, coefs, values.stride(0), N, D,
            SCALED=coefs is not None, BLOCK_D=block, num_warps=COLUMN_WARPS,
        )  # fmt: skip
    return out


def scatter_rows(values: Tensor, index: Tensor, coefs: Tensor, out: Tensor) -> None:
    """out [N, D] = coefs [M] times values [M, D] at index [M]; padding goes nowhere."""
    (M, D), block = values.shape, _block(values.shape[1], COLUMNS)
    if M and D:
        _scatter_rows_kernel[(M, triton.cdiv(D, block))](
            out, values, index, coefs, out.shape[0], D, BLOCK_D=block, num_warps=COLUMN_WARPS
        )


def coefficients(grad_logps: Tensor, index: Tensor, factor: Tensor, scale: float) -> Tensor:
    """scale factor [M] times grad_logps [N] by index [M]; 0 for padding."""
    M, coefs = index.shape[0], torch.empty_like(factor)
    if M:
        _coefficients_kernel[(triton.cdiv(M, ROW_BLOCK),)](
            coefs, grad_logps, index, factor, grad_logps.stride(0), grad_logps.shape[0], M, scale,
            BLOCK=ROW_BLOCK, num_warps=ROW_WARPS,
        )  # fmt: skip
    return coefs


def finish_rows(
    state: Tensor,  # [7, R]
    index: Tensor,  # [R]
    logps: Tensor,  # [N]
    statistics: Tensor,  # [3, N], or [3, 0]
    reference: Tensor,  # [R]
    rest: Tensor,  # [R]
    factor: Tensor,  # [R]
    V: int,
    softcap: float,
    temperature: float,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Write log-probs and statistics where the rows are, and what the backward needs; label_grad and norm [R]."""
    R = index.shape[0]
    label_grad, norm = torch.empty_like(reference), torch.empty_like(reference)
    _finish_rows_kernel[(triton.cdiv(R, ROW_BLOCK),)](
        logps, statistics, reference, rest, factor, label_grad, norm, state, index, logps.shape[0], R, V,
        softcap, temperature, SOFTCAP=softcap != 0.0, STATISTICS=statistics.numel() > 0, NORMALISE=normalise,
        BLOCK=ROW_BLOCK, num_warps=ROW_WARPS,
    )  # fmt: skip
    return label_grad, norm


def finish_sums(
    sums: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [R]
    label_grad: Tensor,  # [R]
    norm: Tensor,  # [R]
    out: Tensor,  # [R, D]
) -> None:
    """out = norm (sums + label_grad times the label's row of the weight, if there is one)."""
    (R, D), weight = sums.shape, _unit_stride(weight)
    block = _block(D, COLUMNS)
    _finish_sums_kernel[(R, triton.cdiv(D, block))](
        out, sums, weight, labels, label_grad, norm, weight.stride(0), weight.shape[0], D,
        BLOCK_D=block, num_warps=COLUMN_WARPS,
    )  # fmt: skip
