"""Tiles of the language-model head on the GPU: what happens between its matrix products.

The arithmetic is that of csrc/cpu/head_kernels.h; `dil_kernels.ops.linear_head` says what it is for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dil_kernels.kernels.scalar_math import LOG2E, TOTAL_SCALE, tanh, tanh_slope

# What differs from batch to batch, or tile to tile: specialised on 1 and on multiples of 16, it would compile a kernel
# again for each kind.
OF_THE_BATCH = ("R", "start")


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


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _head_tile_kernel(
    tile_ptr,  # (R, n) fp32
    bias_ptr,  # (n,) fp32
    labels_ptr,  # (R,) int64
    state_ptr,  # (7, R) fp32: reference, rest, label, others_max, dot, total, uncapped
    grad_ptr,  # (R, n); may be the tile
    sums_ptr,  # (R, D) fp32
    reference_ptr,  # (R,) fp32, a copy of the new reference
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
    HAS_REFERENCE: tl.constexpr,
    STATISTICS: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_V == n
    BLOCK_V: tl.constexpr,  # >= n
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    mask = columns < n
    # First, so that they do not wait for the sums over the tile.
    label = tl.load(labels_ptr + row) - start
    reference = tl.load(state_ptr + row)
    rest = tl.load(state_ptr + R + row)
    x_ptr = tile_ptr + row * stride_tile
    # Whole tiles need no mask, and few tiles hold the label.
    x = tl.load(x_ptr + columns) if WHOLE else tl.load(x_ptr + columns, mask=mask, other=0.0)
    y, z, slope = _post_process(x, bias_ptr, columns, mask, logit_scale, softcap, HAS_BIAS, SOFTCAP)
    if STATISTICS:
        total = tl.load(state_ptr + 5 * R + row)
        tl.store(state_ptr + 5 * R + row, total + tl.sum(tl.where(mask, z * TOTAL_SCALE, 0.0), axis=0))
    others = z if WHOLE else tl.where(mask, z, -float("inf"))
    if (label >= 0) & (label < n):
        own = columns == label.to(tl.int32)
        others = tl.where(own, -float("inf"), others)
        tl.store(state_ptr + 2 * R + row, tl.sum(tl.where(own, z, 0.0), axis=0))
        if SOFTCAP:
            tl.store(state_ptr + 6 * R + row, tl.sum(tl.where(own, y, 0.0), axis=0))
    others_max = tl.max(others, axis=0)

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
    if HAS_REFERENCE:
        tl.store(reference_ptr + row, new_reference)
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
        h = (-s * slope).to(grad_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(grad_ptr + row * stride_grad + columns, h)
        else:
            tl.store(grad_ptr + row * stride_grad + columns, h, mask=mask)
    if HAS_SUMS:  # noqa: SIM102 (one is known when compiling)
        if rescale != 1.0:
            for first in range(0, D, BLOCK_D):
                offsets = first + tl.arange(0, BLOCK_D)
                ptrs = sums_ptr + row * D + offsets
                tl.store(ptrs, tl.load(ptrs, mask=offsets < D, other=0.0) * rescale, mask=offsets < D)


@triton.jit(do_not_specialize=OF_THE_BATCH)
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
    label = tl.where((label >= 0) & (label < n), label, -1).to(tl.int32)
    g = tl.where(columns == label, rest, -tl.exp2((z - origin) * (inv_temperature * LOG2E))) * slope
    tl.store(grad_ptr + row * stride_grad + columns, g.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def _head_rescale_kernel(
    stash_ptr,  # (R, V)
    references_ptr,  # (tiles, R) fp32, those that each tile was written with
    reference_ptr,  # (R,) fp32, the last ones
    labels_ptr,  # (R,) int64
    label_grad_ptr,  # (R,) fp32
    norm_ptr,  # (R,) fp32
    stride_stash,
    R,
    V,
    tile_columns,
    inv_temperature,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    before = tl.load(references_ptr + tile * R + row)
    last = tl.load(reference_ptr + row)
    norm = tl.load(norm_ptr + row)
    label = tl.load(labels_ptr + row)
    own = tl.load(label_grad_ptr + row) * norm
    factor = tl.where(before == last, 1.0, tl.exp2((before - last) * (inv_temperature * LOG2E))) * norm
    begin = tile * tile_columns
    end = tl.minimum(begin + tile_columns, V)
    row_ptr = stash_ptr + row * stride_stash
    if factor != 1.0:
        for first in range(begin, end, BLOCK_V):
            offsets = first + tl.arange(0, BLOCK_V)
            h = tl.load(row_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float32) * factor
            h = tl.where(offsets == label, own, h)
            tl.store(row_ptr + offsets, h.to(stash_ptr.dtype.element_ty), mask=offsets < end)
    elif (label >= begin) & (label < end):
        tl.store(row_ptr + label, own.to(stash_ptr.dtype.element_ty))


def tile_launch_shape(columns: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps) of the tile kernel, whose block is a whole row of the tile: 16 to 32 elements a thread."""
    block = max(32, triton.next_power_of_2(columns))
    return block, min(16, max(1, block // 512))


def tile_registers(softcap: bool, statistics: bool, bias: bool) -> int:
    """Of a thread of the tile kernel. Left to itself, the assembler spills some variants to fit one program more."""
    if softcap:
        return 128
    return 64 if statistics or bias else 48


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
    *how: float,
    reference: Tensor | None = None,  # [R]
) -> None:
    """As the op head_tile; writes the new reference a second time, where asked."""
    R, n = tile.shape
    softcap, statistics = how[1], bool(how[-1])
    BLOCK_V, num_warps = tile_launch_shape(n)
    _head_tile_kernel[(R,)](
        tile,
        bias,
        labels,
        state,
        grad,
        sums,
        reference,
        tile.stride(0),
        0 if grad is None else grad.stride(0),
        R,
        n,
        0 if sums is None else sums.shape[1],
        start,
        *how[:-1],
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap != 0.0,
        HAS_GRAD=grad is not None,
        HAS_SUMS=sums is not None,
        HAS_REFERENCE=reference is not None,
        STATISTICS=statistics,
        WHOLE=n == BLOCK_V,
        BLOCK_V=BLOCK_V,
        BLOCK_D=SUMS_BLOCK_D,
        num_warps=num_warps,
        maxnreg=tile_registers(softcap != 0.0, statistics, bias is not None),
    )


def head_tile_grad(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    grad: Tensor,
    start: int,
    *how: float,
) -> None:
    """As the op head_tile_grad."""
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
        *how,
        HAS_BIAS=bias is not None,
        SOFTCAP=how[1] != 0.0,
        BLOCK_V=BLOCK_V,
        num_warps=GRAD_WARPS,
    )


def head_rescale(
    stash: Tensor,  # [R, V]
    references: Tensor,  # [tiles, R]
    reference: Tensor,  # [R]
    labels: Tensor,  # [R]
    label_grad: Tensor,  # [R]
    norm: Tensor,  # [R]
    tile_columns: int,
    inv_temperature: float,
) -> None:
    """Bring every tile of the stash to the last reference, times norm, and put the label's entry in, if there is one.

    What does not change is not read.
    """
    R, V = stash.shape
    _head_rescale_kernel[(R, references.shape[0])](
        stash,
        references,
        reference,
        labels,
        label_grad,
        norm,
        stash.stride(0),
        R,
        V,
        tile_columns,
        inv_temperature,
        BLOCK_V=min(RESCALE_BLOCK_V, max(32, triton.next_power_of_2(tile_columns))),
        num_warps=RESCALE_WARPS,
    )
