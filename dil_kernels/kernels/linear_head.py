"""Tiles of the language-model head on the GPU: what happens between its matrix products.

The arithmetic is that of csrc/cpu/head_kernels.h; `dil_kernels.ops.linear_head` says what it is for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dil_kernels.kernels.scalar_math import LOG2E, TOTAL_SCALE, tanh, tanh_slope


@triton.jit
def _post_process(x, bias_ptr, columns, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """From the product x to y = logit_scale (x + bias), z, and dz / dy."""
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    y = x * logit_scale
    z = y
    slope = 1.0
    if SOFTCAP:
        u = y / softcap
        z = tanh(u) * softcap
        slope = tanh_slope(u)
    return y, z, slope


@triton.jit
def _head_tile_kernel(
    tile_ptr,  # (R, n) fp32
    bias_ptr,  # (n,) fp32
    labels_ptr,  # (R,) int64
    state_ptr,  # (7, R) fp32: reference, rest, label, others_max, dot, total, uncapped
    grad_ptr,  # (R, n); may be the tile
    sums_ptr,  # (R, D) fp32
    stride_tile,
    stride_grad,
    R,
    n,
    D,
    start,
    logit_scale,
    softcap,
    inv_temperature,
    slack,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,  # >= n
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    mask = columns < n
    x = tl.load(tile_ptr + row * stride_tile + columns, mask=mask, other=0.0)
    y, z, slope = _post_process(x, bias_ptr, columns, mask, logit_scale, softcap, HAS_BIAS, SOFTCAP)
    if STATISTICS:
        total = tl.load(state_ptr + 5 * R + row)
        tl.store(state_ptr + 5 * R + row, total + tl.sum(tl.where(mask, z * TOTAL_SCALE, 0.0), axis=0))
    label = tl.load(labels_ptr + row) - start
    has_label = (label >= 0) & (label < n)
    others = tl.where(mask & (columns != label), z, -float("inf"))
    others_max = tl.max(others, axis=0)
    if has_label:
        tl.store(state_ptr + 2 * R + row, tl.sum(tl.where(columns == label, z, 0.0), axis=0))
        if SOFTCAP:
            tl.store(state_ptr + 6 * R + row, tl.sum(tl.where(columns == label, y, 0.0), axis=0))

    reference = tl.load(state_ptr + row)
    rest = tl.load(state_ptr + R + row)
    scale = inv_temperature * LOG2E
    new_reference = tl.where(others_max > reference + slack, others_max, reference)
    # While all is -inf, differences from any finite number are as good.
    origin = tl.where(new_reference == -float("inf"), 0.0, new_reference)
    change = tl.where(reference == -float("inf"), 0.0, reference - origin)
    rescale = tl.where(new_reference == reference, 1.0, tl.exp2(change * scale))
    d = others - origin
    s = tl.exp2(d * scale)
    # Every thread has loaded the reference when this sum has met across warps: only then may it be overwritten.
    sum_s = tl.sum(s, axis=0)
    tl.store(state_ptr + row, new_reference)
    tl.store(state_ptr + R + row, rest * rescale + sum_s)
    if STATISTICS:
        highest = others_max
        if SOFTCAP:  # tanh may round different ones to the same z
            highest = tl.max(tl.where(mask & (columns != label), y, -float("inf")), axis=0)
        tl.store(state_ptr + 3 * R + row, tl.maximum(tl.load(state_ptr + 3 * R + row), highest))
        dot = rescale * (tl.load(state_ptr + 4 * R + row) + tl.where(rest == 0.0, 0.0, change * rest))
        dot = tl.where(new_reference == reference, tl.load(state_ptr + 4 * R + row), dot)
        tl.store(state_ptr + 4 * R + row, dot + tl.sum(s * tl.where(s == 0.0, 0.0, d), axis=0))
    if HAS_GRAD:
        tl.store(grad_ptr + row * stride_grad + columns, (-s * slope).to(grad_ptr.dtype.element_ty), mask=mask)
    if HAS_SUMS:  # noqa: SIM102 (one is known when compiling)
        if rescale != 1.0:
            for first in range(0, D, BLOCK_D):
                offsets = first + tl.arange(0, BLOCK_D)
                ptrs = sums_ptr + row * D + offsets
                tl.store(ptrs, tl.load(ptrs, mask=offsets < D, other=0.0) * rescale, mask=offsets < D)


@triton.jit
def _head_tile_grad_kernel(
    tile_ptr,  # (R, n) fp32
    bias_ptr,  # (n,) fp32
    labels_ptr,  # (R,) int64
    state_ptr,  # (7, R) fp32, of which reference and rest are read
    grad_ptr,  # (R, n); may be the tile
    stride_tile,
    stride_grad,
    R,
    n,
    start,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < n
    x = tl.load(tile_ptr + row * stride_tile + columns, mask=mask, other=0.0)
    _, z, slope = _post_process(x, bias_ptr, columns, mask, logit_scale, softcap, HAS_BIAS, SOFTCAP)
    reference = tl.load(state_ptr + row)
    rest = tl.load(state_ptr + R + row)
    origin = tl.where(reference == -float("inf"), 0.0, reference)
    label = tl.load(labels_ptr + row) - start
    g = tl.where(columns == label, rest, -tl.exp2((z - origin) * (inv_temperature * LOG2E))) * slope
    tl.store(grad_ptr + row * stride_grad + columns, g.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head_rescale_kernel(
    stash_ptr,  # (R, V)
    factors_ptr,  # (tiles, R) fp32
    stride_stash,
    R,
    V,
    tile_columns,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    factor = tl.load(factors_ptr + tile * R + row)
    if factor != 1.0:
        begin = tile * tile_columns
        end = tl.minimum(begin + tile_columns, V)
        for first in range(begin, end, BLOCK_V):
            offsets = first + tl.arange(0, BLOCK_V)
            ptrs = stash_ptr + row * stride_stash + offsets
            h = tl.load(ptrs, mask=offsets < end, other=0.0).to(tl.float32) * factor
            tl.store(ptrs, h.to(stash_ptr.dtype.element_ty), mask=offsets < end)


def tile_launch_shape(columns: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps) of the tile kernel, whose block is a whole row of the tile: 16 to 32 elements a thread."""
    block = max(32, triton.next_power_of_2(columns))
    return block, min(16, max(1, block // 512))


GRAD_BLOCK_V, GRAD_WARPS = 4096, 8
RESCALE_BLOCK_V, RESCALE_WARPS = 4096, 8
SUMS_BLOCK_D = 1024


def head_tile(
    tile: Tensor,  # [R, n]
    bias: Tensor | None,  # [n]
    labels: Tensor,  # [R]
    state: Tensor,  # [7, R]
    grad: Tensor | None,  # [R, n]
    sums: Tensor | None,  # [R, D]
    start: int,
    logit_scale: float,
    softcap: float,
    inv_temperature: float,
    slack: float,
    statistics: bool,
) -> None:
    """As the op cpp_head_tile."""
    R, n = tile.shape
    BLOCK_V, num_warps = tile_launch_shape(n)
    _head_tile_kernel[(R,)](
        tile,
        bias,
        labels,
        state,
        grad,
        sums,
        tile.stride(0),
        0 if grad is None else grad.stride(0),
        R,
        n,
        0 if sums is None else sums.shape[1],
        start,
        logit_scale,
        softcap,
        inv_temperature,
        slack,
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap != 0.0,
        HAS_GRAD=grad is not None,
        HAS_SUMS=sums is not None,
        STATISTICS=statistics,
        BLOCK_V=BLOCK_V,
        BLOCK_D=SUMS_BLOCK_D,
        num_warps=num_warps,
    )


def head_tile_grad(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    grad: Tensor,
    start: int,
    logit_scale: float,
    softcap: float,
    inv_temperature: float,
) -> None:
    """As the op cpp_head_tile_grad."""
    R, n = tile.shape
    BLOCK_V = min(GRAD_BLOCK_V, max(32, triton.next_power_of_2(n)))
    _head_tile_grad_kernel[(R, triton.cdiv(n, BLOCK_V))](
        tile,
        bias,
        labels,
        state,
        grad,
        tile.stride(0),
        grad.stride(0),
        R,
        n,
        start,
        logit_scale,
        softcap,
        inv_temperature,
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap != 0.0,
        BLOCK_V=BLOCK_V,
        num_warps=GRAD_WARPS,
    )


def head_rescale(stash: Tensor, factors: Tensor, tile_columns: int) -> None:
    """Multiply the columns of tile t of stash [R, V] by factors [t, R]; what does not change is not read."""
    R, V = stash.shape
    _head_rescale_kernel[(R, factors.shape[0])](
        stash,
        factors.to(torch.float32).contiguous(),
        stash.stride(0),
        R,
        V,
        tile_columns,
        BLOCK_V=min(RESCALE_BLOCK_V, max(32, triton.next_power_of_2(tile_columns))),
        num_warps=RESCALE_WARPS,
    )
