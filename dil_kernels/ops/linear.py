"""The language-model head and its log-probabilities as torch.library ops, and the autograd Function above them.

    linear_logps_fwd(hidden [N, D], weight [V, D], bias [V]?, targets [N], rows, stash_rows, ignore_index, logit_scale,
                     softcap, temperature, grad_hidden, statistics, tile_rows, tile_columns, backend)
        -> (logps [N], statistics [3, N], index, reference, rest, factor, sums, stash)
    linear_logps_bwd(grad_logps [N], hidden?, weight, bias?, targets?, <what the forward saved>, ...)
        -> (grad_hidden [N, D], grad_weight [V, D], grad_bias [V]), empty where not asked

`targets` are labels already shifted. What is saved is explained in `dil_kernels.ops.linear_head`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dil_kernels.ops import define_op, needs_function, on_device, refuse_double_backward
from dil_kernels.ops.linear_head import (
    Head,
    HeadForward,
    TileShape,
    head_backward,
    head_forward,
    stash_stride,
)


def _fake_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_hidden: bool,
    statistics: bool,
    tile_rows: int,
    tile_columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, D = hidden.shape
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(3, N if statistics else 0, dtype=dtype),
        targets.new_empty(rows),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows - stash_rows if grad_hidden else 0, D),
        hidden.new_empty(stash_rows, stash_stride(weight.shape[0])),
    )


@define_op("linear_logps_fwd", fake=_fake_fwd)
def _linear_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_hidden: bool,
    statistics: bool,
    tile_rows: int,
    tile_columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap, temperature, TileShape(tile_rows, tile_columns), backend)
    with on_device(hidden):
        return head_forward(
            hidden,
            targets,
            head,
            rows=rows,
            stash_rows=stash_rows,
            ignore_index=ignore_index,
            grad_hidden=grad_hidden,
            statistics=statistics,
        )


def _fake_bwd(
    grad_logps: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    index: Tensor,
    reference: Tensor,
    rest: Tensor,
    factor: Tensor,
    sums: Tensor,
    stash: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    tile_rows: int,
    tile_columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    V, D = weight.shape
    return (
        weight.new_empty((grad_logps.shape[0], D) if grad_hidden else (0,)),
        weight.new_empty((V, D) if grad_weight else (0,)),
        weight.new_empty((V,) if grad_bias else (0,)),
    )


@define_op("linear_logps_bwd", fake=_fake_bwd)
def _linear_logps_bwd(
    grad_logps: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    index: Tensor,
    reference: Tensor,
    rest: Tensor,
    factor: Tensor,
    sums: Tensor,
    stash: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    tile_rows: int,
    tile_columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap, temperature, TileShape(tile_rows, tile_columns), backend)
    forward = HeadForward(reference, reference, index, reference, rest, factor, sums, stash)
    with on_device(weight):
        grads = head_backward(
            grad_logps,
            hidden,
            targets,
            head,
            forward,
            grad_hidden=grad_hidden,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
        )
    d_hidden, d_weight, d_bias = (weight.new_empty(0) if grad is None else grad for grad in grads)
    return d_hidden, d_weight, d_bias


class LinearTokenLogps(torch.autograd.Function):
    """Differentiable in hidden states, weight and bias, once; what needs no gradient costs none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        stash_rows: int,
        ignore_index: int,
        logit_scale: float,
        softcap: float,
        temperature: float,
        statistics: bool,
        tile: TileShape,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs [N] and statistics [3, N] of targets [N] under hidden [N, D]."""
        grad_hidden, grad_weight, grad_bias = ctx.needs_input_grad[:3]
        if not (grad_weight or grad_bias):
            stash_rows = 0
        logps, stats, *saved = torch.ops.dil_kernels.linear_logps_fwd(
            hidden,
            weight,
            bias,
            targets,
            rows,
            stash_rows,
            ignore_index,
            logit_scale,
            softcap,
            temperature,
            grad_hidden,
            statistics,
            *tile,
            backend,
        )
        with_head = grad_weight or grad_bias
        recomputed = with_head and stash_rows < rows
        ctx.save_for_backward(hidden if with_head else None, weight, bias, targets if recomputed else None, *saved)
        ctx.mark_non_differentiable(stats)
        ctx.options = (logit_scale, softcap, temperature)
        ctx.tile, ctx.backend = tile, backend
        return logps, stats

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        refuse_double_backward("linear_token_logps")
        asked = ctx.needs_input_grad[:3]
        grads = torch.ops.dil_kernels.linear_logps_bwd(
            grad_logps, *ctx.saved_tensors, *ctx.options, *asked, *ctx.tile, ctx.backend
        )
        return *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)), *[None] * 10


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    statistics: bool,
    tile: TileShape,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and statistics [3, N] ([3, 0] if not asked) of targets [N], of which at most `rows` are scored."""
    if needs_function(hidden, weight, bias):
        options = (rows, stash_rows, ignore_index, logit_scale, softcap, temperature, statistics, tile, backend)
        return LinearTokenLogps.apply(hidden, weight, bias, targets, *options)
    scored = (rows, 0, ignore_index, logit_scale, softcap, temperature, False, statistics)
    logps, stats, *_ = torch.ops.dil_kernels.linear_logps_fwd(hidden, weight, bias, targets, *scored, *tile, backend)
    return logps, stats
