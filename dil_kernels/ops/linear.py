"""The language-model head and its log-probabilities as torch.library ops, and the autograd Function above them.

    linear_logps_fwd(hidden [N, D], weight [V, D], bias [V]?, targets [N], rows, stash_rows, ignore_index, grad_hidden,
                     statistics, *how)
        -> (logps [N], statistics [3, N], index, reference, rest, factor, sums, stash)
    linear_logps_bwd(grad_logps [N], hidden?, weight, bias?, targets?, <what the forward saved>, grad_hidden,
                     grad_weight, grad_bias, *how)
        -> (grad_hidden [N, D], grad_weight [V, D], grad_bias [V]), empty where not asked

`targets` are labels already shifted; how is a `HeadProcessing`. What is saved is explained in
`dil_kernels.ops.linear_head`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dil_kernels.ops import Op, arguments, needs_function, on_device, refuse_double_backward
from dil_kernels.ops.head_steps import CppSteps, Head, HeadProcessing, TritonSteps
from dil_kernels.ops.linear_head import HeadForward, head_backward, head_forward, stash_stride


def _fake_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, stash_rows: int, *options: Any
) -> tuple[Tensor, ...]:
    (N, D), (_, grad_hidden, statistics) = hidden.shape, options[:3]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(3, N if statistics else 0, dtype=dtype),
        targets.new_empty(rows),
        *(hidden.new_empty(rows, dtype=dtype) for _ in range(3)),
        hidden.new_empty(rows - stash_rows if grad_hidden else 0, D),
        hidden.new_empty(stash_rows, stash_stride(weight.shape[0])),
    )


def _fake_bwd(grad_logps: Tensor, hidden: Tensor | None, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shapes = (grad_logps.shape[0], weight.shape[1]), weight.shape, weight.shape[:1]
    asked = others[8:11]
    return tuple(weight.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, asked, strict=True))


LINEAR_LOGPS_FWD = Op(
    "linear_logps_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, SymInt rows, SymInt stash_rows, "
    f"int ignore_index, bool grad_hidden, bool statistics, {arguments(HeadProcessing)}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
LINEAR_LOGPS_BWD = Op(
    "linear_logps_bwd(Tensor grad_logps, Tensor? hidden, Tensor weight, Tensor? bias, Tensor? targets, Tensor index, "
    "Tensor reference, Tensor rest, Tensor factor, Tensor sums, Tensor stash, bool grad_hidden, bool grad_weight, "
    f"bool grad_bias, {arguments(HeadProcessing)}) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _linear_logps_fwd(
    make_steps: type[CppSteps],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    grad_hidden: bool,
    statistics: bool,
    *how: Any,
) -> HeadForward:
    with on_device(hidden):
        return head_forward(
            hidden,
            targets,
            Head(weight, bias, HeadProcessing(*how)),
            make_steps,
            rows=rows,
            stash_rows=stash_rows,
            ignore_index=ignore_index,
            grad_hidden=grad_hidden,
            statistics=statistics,
        )


def _linear_logps_bwd(
    make_steps: type[CppSteps],
    grad_logps: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    saved, (grad_hidden, grad_weight, grad_bias, *how) = others[:6], others[6:]
    with on_device(weight):
        grads = head_backward(
            grad_logps,
            hidden,
            targets,
            Head(weight, bias, HeadProcessing(*how)),
            make_steps,
            HeadForward(grad_logps, grad_logps, *saved),  # the log-probs and statistics are not used
            grad_hidden=grad_hidden,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
        )
    return tuple(weight.new_empty(0) if grad is None else grad for grad in grads)


for op, implementation in ((LINEAR_LOGPS_FWD, _linear_logps_fwd), (LINEAR_LOGPS_BWD, _linear_logps_bwd)):
    op.cpu(partial(implementation, CppSteps))
    op.triton(partial(implementation, TritonSteps))


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
        statistics: bool,
        how: HeadProcessing,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """See `linear_logps`."""
        grad_hidden, grad_weight, grad_bias = ctx.needs_input_grad[:3]
        with_head = grad_weight or grad_bias
        if not with_head:
            stash_rows = 0
        options = (rows, stash_rows, ignore_index, grad_hidden, statistics, *how)
        logps, stats, *saved = LINEAR_LOGPS_FWD.on(backend, hidden)(hidden, weight, bias, targets, *options)
        recomputed = with_head and stash_rows < rows
        ctx.save_for_backward(hidden if with_head else None, weight, bias, targets if recomputed else None, *saved)
        ctx.mark_non_differentiable(stats)
        ctx.how, ctx.backend = how, backend
        return logps, stats

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        refuse_double_backward("linear_token_logps")
        asked = ctx.needs_input_grad[:3]
        op = LINEAR_LOGPS_BWD.on(ctx.backend, grad_logps)
        grads = op(grad_logps, *ctx.saved_tensors, *asked, *ctx.how)
        return *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)), *[None] * 7


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    how: HeadProcessing,
    *,
    rows: int,
    stash_rows: int,
    ignore_index: int,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and statistics [3, N] ([3, 0] if not asked) of targets [N], of which at most `rows` are scored."""
    if needs_function(hidden, weight, bias):
        options = (rows, stash_rows, ignore_index, statistics, how, backend)
        return LinearTokenLogps.apply(hidden, weight, bias, targets, *options)
    op = LINEAR_LOGPS_FWD.on(backend, hidden)
    logps, stats, *_ = op(hidden, weight, bias, targets, rows, 0, ignore_index, False, statistics, *how)
    return logps, stats
