"""Token log-probabilities as torch.library ops, and the autograd Function above them.

    logps_fwd(logits, labels, *how, statistics) -> (logps, row_max, log_sum, statistics)
    logps_bwd(grad_logps, logits, labels, row_max, log_sum, *how) -> grad_logits
    logps_bwd_(grad_logps, logits!, labels, row_max, log_sum, *how) -> ()

how is a `Processing`; logits are [B, T, V], labels [B, T] int64; logps, row_max and log_sum [B, T - shift] in fp32, or
fp64 for fp64 logits. The log-sum-exp of a row is kept in two parts, so that nothing is rounded at its size: log_sum,
and row_max, which is of the logits x, or of tanh(x / softcapping). The statistics are mean logit, entropy and top-1
hit, [3, B, T - shift], or [0] if not asked for. The C++ implementations are in csrc/cpu/logps.cpp. A backward also
takes labels V, which have no entry among the logits: that of a shard of the vocabulary.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dil_kernels.ops import Op, arguments, needs_function, on_device, refuse_double_backward
from dil_kernels.ops.vocab_parallel import IGNORED, Shard, merged_rows
from dil_kernels.options import Processing


def _output_shape(logits: Tensor, shift: bool) -> tuple[int, int]:
    return logits.shape[0], logits.shape[1] - int(shift)


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _new_statistics(logps: Tensor, wanted: bool) -> Tensor:
    return logps.new_empty((3, *logps.shape) if wanted else (0,))


def _fake_fwd(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *how, statistics = options
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps = logits.new_empty(_output_shape(logits, Processing(*how).shift), dtype=dtype)
    return logps, torch.empty_like(logps), torch.empty_like(logps), _new_statistics(logps, statistics)


_SAVED = "Tensor labels, Tensor row_max, Tensor log_sum, " + arguments(Processing)
LOGPS_FWD = Op(
    f"logps_fwd(Tensor logits, Tensor labels, {arguments(Processing)}, bool statistics) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
)
LOGPS_BWD = Op(
    f"logps_bwd(Tensor grad_logps, Tensor logits, {_SAVED}) -> Tensor",
    lambda grad_logps, logits, *_: logits.new_empty(logits.shape),
)
LOGPS_BWD_INPLACE = Op(f"logps_bwd_(Tensor grad_logps, Tensor(a!) logits, {_SAVED}) -> ()", lambda *_: None)


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """How to launch, and what. Only the first call of an op imports Triton."""
    from dil_kernels.kernels import launch, logps

    return launch, logps


def _processing(how: Processing) -> dict[str, float]:
    """What the kernels make of a logit x: multiplier * x, or multiplier * tanh(inv_cap * x)."""
    if how.softcapping == 0.0:
        return {"multiplier": 1.0 / how.temperature, "inv_cap": 0.0, "HAS_CAP": False}
    return {"multiplier": how.softcapping / how.temperature, "inv_cap": 1.0 / how.softcapping, "HAS_CAP": True}


@LOGPS_FWD.triton
def _triton_logps_fwd(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how, statistics = Processing(*options[:-1]), options[-1]
    launch, kernels = _kernels()
    logits = _rows_contiguous(logits)
    B, T_out = _output_shape(logits, how.shift)
    V, num_rows = logits.shape[-1], B * T_out
    logps = logits.new_empty((B, T_out), dtype=torch.float32)
    outputs = (logps, torch.empty_like(logps), torch.empty_like(logps), _new_statistics(logps, statistics))
    if num_rows == 0:
        return outputs
    device = launch.device_of(logits.device)
    shape = launch.shapes(device.capability, logits.itemsize).forward.of(statistics + (how.softcapping != 0.0))
    rows = min(num_rows, launch.PROGRAMS_PER_SM * device.num_sms)  # with more, all are launched alike
    ROWS, BLOCK_V, STAGES, num_warps, splits, span = launch.forward_launch(
        shape, rows, V, logits.itemsize, device.num_sms
    )
    inputs = (logits, labels, *logits.stride()[:2], *labels.stride(), num_rows, T_out, V)
    constants: dict[str, float] = {"ignore_index": how.ignore_index, "SHIFT": how.shift, "STATISTICS": statistics}
    constants |= _processing(how)
    tile = {"ROWS": ROWS, "BLOCK_V": BLOCK_V, "STAGES": STAGES}
    tile |= {"num_warps": num_warps, "maxnreg": launch.max_registers(num_warps)}
    with on_device(logits):
        if splits == 1:
            kernels._logps_fwd_kernel[(num_rows,)](*outputs, *inputs, **constants, **tile)
        else:
            partials = logps.new_empty((4 + (how.softcapping != 0.0) if statistics else 2, num_rows, splits))
            kernels._logps_split_kernel[(num_rows * splits,)](
                partials, *inputs, span, **constants, **tile, SPLITS=splits
            )
            kernels._logps_merge_kernel[(num_rows,)](
                *outputs, partials, *inputs, **constants, SPLITS=splits, num_warps=1
            )
    return outputs


def _same_phase(one: Tensor, other: Tensor) -> bool:
    """Whether all rows of two tensors start alike relative to 16-byte boundaries."""
    if one is other:
        return True
    distances = [(a - b) * one.itemsize for a, b in zip(one.stride()[:2], other.stride()[:2], strict=True)]
    return all(distance % 16 == 0 for distance in (*distances, one.data_ptr() - other.data_ptr()))


def _launch_bwd(
    grad_logits: Tensor, grad_logps: Tensor, logits: Tensor, labels: Tensor, row_max: Tensor, log_sum: Tensor, *how: Any
) -> None:
    ignore_index, shift, softcapping, temperature = how
    launch, kernels = _kernels()
    B, T, V = logits.shape
    if logits.numel() == 0:
        return
    device = launch.device_of(logits.device)
    shapes = launch.shapes(device.capability, logits.itemsize)
    shape = shapes.backward if softcapping == 0.0 else shapes.capped_backward
    TILES, BLOCK_V, STAGES, num_warps = launch.backward_launch(shape, V, logits.itemsize)
    num_rows = B * T
    grid = (-(-V // (TILES * BLOCK_V)), min(num_rows, launch.MAX_GRID), -(-num_rows // launch.MAX_GRID))
    with on_device(logits):
        kernels._logps_bwd_kernel[grid](
            grad_logits,
            grad_logps,
            logits,
            labels,
            row_max,
            log_sum,
            *grad_logits.stride()[:2],
            *grad_logps.stride(),
            *logits.stride()[:2],
            *labels.stride(),
            num_rows,
            T,
            T - int(shift),
            V,
            ignore_index,
            1.0 / temperature,
            **_processing(Processing(*how)),
            SHIFT=shift,
            SAME_PHASE=_same_phase(grad_logits, logits),
            TILES=TILES,
            BLOCK_V=BLOCK_V,
            STAGES=STAGES,
            num_warps=num_warps,
            maxnreg=launch.max_registers(num_warps),
        )


@LOGPS_BWD.triton
def _triton_logps_bwd(grad_logps: Tensor, logits: Tensor, *saved: Any) -> Tensor:
    logits = _rows_contiguous(logits)
    grad_logits = logits.new_empty(logits.shape)
    _launch_bwd(grad_logits, grad_logps, logits, *saved)
    return grad_logits


@LOGPS_BWD_INPLACE.triton
def _triton_logps_bwd_(grad_logps: Tensor, logits: Tensor, *saved: Any) -> None:
    _launch_bwd(logits, grad_logps, logits, *saved)


def _saved_tensor_hooks() -> bool:
    """Whether hooks take what autograd saves: it may go to several users then, with its version unchecked."""
    if torch.compiler.is_compiling():
        return False
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):  # raises where there are some
            return False
    except RuntimeError:
        return True


class TokenLogps(torch.autograd.Function):
    """Differentiable in the logits, once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        how: Processing,
        statistics: bool,
        inplace_backward: bool,
        backend: str,
        shard: Shard | None,
    ) -> tuple[Tensor, Tensor]:
        """See `logps_from_logits`."""
        if shard is None:
            logps, row_max, log_sum, measured = LOGPS_FWD.on(backend, logits)(logits, labels, *how, statistics)
        else:
            logps, row_max, log_sum, measured = _over_shards(logits, labels, how, statistics, backend, shard)
        ctx.mark_non_differentiable(measured)
        ctx.save_for_backward(logits, labels, row_max, log_sum)
        ctx.how = how
        ctx.inplace_backward = inplace_backward
        hooked = _saved_tensor_hooks()
        ctx.before_hooks = (StorageWeakRef(logits.untyped_storage()), logits._version) if hooked else None
        ctx.used = False
        ctx.backend = backend
        return logps, measured

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the logits, in a buffer of its own or over them."""
        refuse_double_backward("token_logps")
        # Unpacking checks the version of the logits, but not of what hooks on saved tensors hand back.
        logits, labels, row_max, log_sum = ctx.saved_tensors
        if ctx.before_hooks is not None:
            storage, version = ctx.before_hooks
            if StorageWeakRef(logits.untyped_storage()) == storage and logits._version != version:
                raise RuntimeError("the logits that token_logps needs have been modified by an inplace operation")
        inputs = (labels, row_max, log_sum, *ctx.how)
        if ctx.used:
            raise RuntimeError("a second backward through token_logps with inplace_backward=True: its logits are gone")
        ctx.used = ctx.inplace_backward
        if ctx.inplace_backward and ctx.before_hooks is None:
            grad_logits = logits.detach()
            LOGPS_BWD_INPLACE.on(ctx.backend, logits)(grad_logps, grad_logits, *inputs)
            torch.autograd.graph.increment_version(grad_logits)
        else:
            grad_logits = LOGPS_BWD.on(ctx.backend, logits)(grad_logps, logits, *inputs)
        return grad_logits, *(None,) * 6


def _over_shards(
    logits: Tensor, labels: Tensor, how: Processing, statistics: bool, backend: str, shard: Shard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op, over the whole vocabulary; labels [B, T] as of `Shard.own_labels`."""
    V = shard.entries
    # Where the label is elsewhere, the sums over this part are those with any label.
    op = LOGPS_FWD.on(backend, logits)
    logps, row_max, log_sum, measured = op(logits, labels.clamp(max=V - 1), *how, statistics)
    T_out = logps.shape[1]
    scored, targets = logits[:, :T_out], labels[:, labels.shape[1] - T_out :]
    return merged_rows(scored, targets, logps, row_max, log_sum, measured, how, shard)


def logps_from_logits(
    logits: Tensor,
    labels: Tensor,
    how: Processing,
    *,
    statistics: bool,
    inplace_backward: bool,
    backend: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs [B, T - shift] of labels [B, T] under logits [B, T, V], and the statistics.

    With `shard` the logits are that part of the vocabulary, and the labels as of `Shard.own_labels`.
    """
    if shard is not None:
        how = how._replace(ignore_index=IGNORED)
    if shard is not None or needs_function(logits):
        return TokenLogps.apply(logits, labels, how, statistics, inplace_backward, backend, shard)
    logps, _, _, measured = LOGPS_FWD.on(backend, logits)(logits, labels, *how, statistics)
    return logps, measured
