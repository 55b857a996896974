"""Token log-probabilities as torch.library ops: one schema for every backend, one autograd Function above them.

Each backend provides

    {backend}_logps_fwd(logits, labels, ignore_index, shift, temperature) -> (logps, row_max, log_sum)
    {backend}_logps_bwd(grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, temperature) -> grad_logits
    {backend}_logps_bwd_(grad_logps, logits!, labels, row_max, log_sum, ignore_index, shift, temperature) -> ()

with logits [B, T, V], labels [B, T] int64; logps, row_max and log_sum [B, T - shift] in fp32 (fp64 for fp64 logits).
The log-sum-exp of a row, row_max / temperature + log_sum, is kept in two parts so that nothing is rounded at its size.
The Triton ops are declared here, the C++ ops in csrc/ops.cpp.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dil_kernels import backends
from dil_kernels.ops import refuse_double_backward


def _output_shape(logits: Tensor, shift: bool) -> tuple[int, int]:
    return logits.shape[0], logits.shape[1] - int(shift)


def _statistics_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _fake_fwd(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    logps = logits.new_empty(_output_shape(logits, shift), dtype=_statistics_dtype(logits))
    return logps, torch.empty_like(logps), torch.empty_like(logps)


def _fake_bwd(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    shift: bool,
    temperature: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_bwd_(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    shift: bool,
    temperature: float,
) -> None:
    return None


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("dil_kernels::triton_logps_fwd", mutates_args=())
def _triton_logps_fwd(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    from dil_kernels.kernels.logps import _logps_fwd_kernel, fwd_launch_shape

    logits = _rows_contiguous(logits)
    B, T_out = _output_shape(logits, shift)
    V = logits.shape[-1]
    logps = logits.new_empty((B, T_out), dtype=torch.float32)
    row_max, log_sum = torch.empty_like(logps), torch.empty_like(logps)
    if logps.numel() == 0:
        return logps, row_max, log_sum
    ROWS, BLOCK_V, num_warps = fwd_launch_shape(V)
    with _on_device(logits):
        _logps_fwd_kernel[(B * T_out,)](
            logps,
            row_max,
            log_sum,
            logits,
            labels,
            logits.stride(0),
            logits.stride(1),
            labels.stride(0),
            labels.stride(1),
            T_out,
            V,
            ignore_index,
            1.0 / temperature,
            SHIFT=int(shift),
            ROWS=ROWS,
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )
    return logps, row_max, log_sum


def _launch_bwd(
    grad_logits: Tensor,
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    shift: bool,
    temperature: float,
) -> None:
    from dil_kernels.kernels.logps import _logps_bwd_kernel, bwd_launch_shape

    B, T, V = logits.shape
    if logits.numel() == 0:
        return
    BLOCK_V, num_warps = bwd_launch_shape(V)
    num_blocks = -(-V // BLOCK_V)
    with _on_device(logits):
        _logps_bwd_kernel[(B * T * num_blocks,)](
            grad_logits,
            grad_logps,
            logits,
            labels,
            row_max,
            log_sum,
            grad_logits.stride(0),
            grad_logits.stride(1),
            grad_logps.stride(0),
            grad_logps.stride(1),
            logits.stride(0),
            logits.stride(1),
            labels.stride(0),
            labels.stride(1),
            T,
            T - int(shift),
            V,
            num_blocks,
            ignore_index,
            1.0 / temperature,
            SHIFT=int(shift),
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )


@torch.library.custom_op("dil_kernels::triton_logps_bwd", mutates_args=())
def _triton_logps_bwd(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    shift: bool,
    temperature: float,
) -> Tensor:
    logits = _rows_contiguous(logits)
    grad_logits = logits.new_empty(logits.shape)
    _launch_bwd(grad_logits, grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, temperature)
    return grad_logits


@torch.library.custom_op("dil_kernels::triton_logps_bwd_", mutates_args=("logits",))
def _triton_logps_bwd_(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    shift: bool,
    temperature: float,
) -> None:
    _launch_bwd(logits, grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, temperature)


_triton_logps_fwd.register_fake(_fake_fwd)
_triton_logps_bwd.register_fake(_fake_bwd)
_triton_logps_bwd_.register_fake(_fake_bwd_)

if backends.load_extension() is not None:
    torch.library.register_fake("dil_kernels::cpp_logps_fwd", _fake_fwd)
    torch.library.register_fake("dil_kernels::cpp_logps_bwd", _fake_bwd)
    torch.library.register_fake("dil_kernels::cpp_logps_bwd_", _fake_bwd_)


def _op(backend: str, name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.dil_kernels, f"{backend}_{name}").default


class TokenLogps(torch.autograd.Function):
    """Differentiable in the logits, once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        shift: bool,
        temperature: float,
        inplace_backward: bool,
        backend: str,
    ) -> Tensor:
        """Log-probs [B, T - shift] of labels [B, T] under logits [B, T, V]."""
        logps, row_max, log_sum = _op(backend, "logps_fwd")(logits, labels, ignore_index, shift, temperature)
        ctx.save_for_backward(logits, labels, row_max, log_sum)
        ctx.options = (ignore_index, shift, temperature)
        ctx.inplace_backward = inplace_backward
        ctx.overwritten = False
        ctx.backend = backend
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the logits, in a buffer of its own or over them."""
        refuse_double_backward("token_logps")
        # Unpacking checks the version of the logits; what hooks on saved tensors hand back passes that check.
        logits, labels, row_max, log_sum = ctx.saved_tensors
        inputs = (labels, row_max, log_sum, *ctx.options)
        if ctx.overwritten:
            raise RuntimeError("a second backward through token_logps with inplace_backward=True: its logits are gone")
        if ctx.inplace_backward:
            ctx.overwritten = True
            grad_logits = logits.detach()
            _op(ctx.backend, "logps_bwd_")(grad_logps, grad_logits, *inputs)
            torch.autograd.graph.increment_version(grad_logits)
        else:
            grad_logits = _op(ctx.backend, "logps_bwd")(grad_logps, logits, *inputs)
        return grad_logits, None, None, None, None, None, None
