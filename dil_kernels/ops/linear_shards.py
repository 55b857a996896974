"""The head of `dil_kernels.ops.linear` where each process of a group has a shard of its weight.

    linear_shard_tiles(hidden [N, D], weight [V, D], bias [V]?, targets [N], rows, stash_rows, grad_hidden, statistics,
                       *how)
        -> (logps [N], statistics [3, N], index, labels, state [7, M], references, sums, stash)
    linear_shard_finish(logps!, statistics!, index, labels, own_reference [M], state, references, sums, stash!, weight,
                        *how)
        -> (reference, rest, factor, sums)

`targets` are as of `Shard.own_labels`. Between the two, the processes bring `state` from that of their parts to that of
the whole vocabulary. What is saved is then as on one device, so that the backward is that of `linear`, apart from the
gradient of the hidden states: each process has its part of the sum. Its all-reduce runs beside the weight's gradient,
which needs none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dil_kernels.ops import Op, arguments, needs_function, on_device, refuse_double_backward
from dil_kernels.ops.head_steps import CppSteps, Head, HeadProcessing, Rows, TritonSteps
from dil_kernels.ops.linear import LINEAR_LOGPS_BWD
from dil_kernels.ops.linear_head import TileBuffer, grad_buffer, over_tiles, stash_stride
from dil_kernels.ops.products import new_result
from dil_kernels.ops.vocab_parallel import IGNORED, Shard, finished, merged_head_state, started_reduction


def _num_tiles(V: int, how: HeadProcessing) -> int:
    return -(-V // how.tile_columns)


def _fake_tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, stash_rows: int, *options: Any
) -> tuple[Tensor, ...]:
    (N, D), V, (grad_hidden, statistics, *how) = hidden.shape, weight.shape[0], options
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(3, N if statistics else 0, dtype=dtype),
        targets.new_empty(rows),
        targets.new_empty(rows),
        hidden.new_empty(7, rows, dtype=dtype),
        hidden.new_empty(_num_tiles(V, HeadProcessing(*how)), stash_rows, dtype=dtype),
        hidden.new_empty(rows - stash_rows if grad_hidden else 0, D, dtype=dtype),
        hidden.new_empty(stash_rows, stash_stride(V)),
    )


def _fake_finish(logps: Tensor, statistics: Tensor, index: Tensor, *others: Any) -> tuple[Tensor, ...]:
    sums, weight = others[4], others[6]
    of_rows = (logps.new_empty(index.shape[0]) for _ in range(3))
    return *of_rows, sums.new_empty(sums.shape, dtype=weight.dtype)


LINEAR_SHARD_TILES = Op(
    "linear_shard_tiles(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, SymInt rows, SymInt stash_rows, "
    f"bool grad_hidden, bool statistics, {arguments(HeadProcessing)}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_tiles,
)
LINEAR_SHARD_FINISH = Op(
    "linear_shard_finish(Tensor(a!) logps, Tensor(b!) statistics, Tensor index, Tensor labels, Tensor own_reference, "
    "Tensor state, Tensor references, Tensor sums, Tensor(c!) stash, Tensor weight, "
    f"{arguments(HeadProcessing)}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_finish,
)


def _linear_shard_tiles(
    make_steps: type[CppSteps],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: int,
    stash_rows: int,
    grad_hidden: bool,
    statistics: bool,
    *how: Any,
) -> tuple[Tensor, ...]:
    """As `head_forward`, up to the end of the tiles."""
    head = Head(weight, bias, HeadProcessing(*how))
    (V, D), dtype = weight.shape, head.accumulation_dtype
    steps = make_steps(head, statistics)
    with on_device(hidden):
        scored = steps.select(targets, IGNORED, rows)
        state = hidden.new_empty(7, rows, dtype=dtype)
        references = hidden.new_empty(len(head.tiles()), stash_rows, dtype=dtype)
        sums = hidden.new_zeros(rows - stash_rows if grad_hidden else 0, D, dtype=dtype)
        stash = new_result(hidden, stash_rows, stash_stride(V))
        chunk_rows, columns = min(head.how.tile_rows, rows), min(head.how.tile_columns, V)
        tile_buffer = TileBuffer(hidden, dtype, chunk_rows, columns)
        grads = grad_buffer(hidden, dtype, chunk_rows if sums.shape[0] else 0, columns)
        for begin, end in head.chunks(0, stash_rows) + head.chunks(stash_rows, rows):
            kept = stash[begin:end, :V] if begin < stash_rows else None
            own_references = hidden.new_empty(0 if kept is None else len(head.tiles()), end - begin, dtype=dtype)
            row_sums = sums[begin - stash_rows : end - stash_rows] if grad_hidden and kept is None else None
            x, labels = steps.gather(hidden, scored.index[begin:end]), scored.labels[begin:end]
            state[:, begin:end] = over_tiles(steps, x, labels, tile_buffer, grads, kept, own_references, row_sums)
            if kept is not None:
                references[:, begin:end] = own_references
    return scored.logps, scored.statistics, scored.index, scored.labels, state, references, sums, stash


def _linear_shard_finish(
    make_steps: type[CppSteps],
    logps: Tensor,
    statistics: Tensor,
    index: Tensor,
    labels: Tensor,
    own_reference: Tensor,
    state: Tensor,
    references: Tensor,
    sums: Tensor,
    stash: Tensor,
    weight: Tensor,
    *how: Any,
) -> tuple[Tensor, ...]:
    """What `head_forward` does after the tiles, given the state over the whole vocabulary."""
    head = Head(weight, None, HeadProcessing(*how))
    steps = make_steps(head, statistics.numel() > 0)
    rows, stash_rows, V = index.shape[0], stash.shape[0], weight.shape[0]
    scored = Rows(index, labels, logps, statistics, *(torch.empty_like(own_reference) for _ in range(3)))
    out = sums.new_empty(sums.shape, dtype=weight.dtype)
    with on_device(weight):
        change = torch.where(own_reference == state[0], 0, own_reference - state[0])
        shrink = torch.exp(change / head.how.temperature)
        for begin, end in head.chunks(0, stash_rows) + head.chunks(stash_rows, rows):
            chunk, of_chunk = scored.part(begin, end), state[:, begin:end].contiguous()
            label_grad, norm = steps.finish(of_chunk, chunk, 1)  # the mean has been taken
            if begin < stash_rows:
                own_references = references[:, begin:end].contiguous()
                steps.finish_stash(stash[begin:end, :V], own_references, of_chunk, chunk.labels, label_grad, norm)
            elif sums.shape[0]:
                part = slice(begin - stash_rows, end - stash_rows)
                row_sums = sums[part] * shrink[begin:end].unsqueeze(1)
                steps.finish_sums(row_sums, chunk.labels, label_grad, norm, out[part])
    return scored.reference, scored.rest, scored.factor, out


for op, implementation in (
    (LINEAR_SHARD_TILES, _linear_shard_tiles),
    (LINEAR_SHARD_FINISH, _linear_shard_finish),
):
    op.cpu(partial(implementation, CppSteps))
    op.triton(partial(implementation, TritonSteps))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    total: int | Tensor,
    rows: int,
    stash_rows: int,
    grad_hidden: bool,
    statistics: bool,
    how: HeadProcessing,
    backend: str,
    group: str,
) -> tuple[Tensor, ...]:
    """As `LINEAR_LOGPS_FWD`, over all shards."""
    options = (rows, stash_rows, grad_hidden, statistics, *how)
    tiles = LINEAR_SHARD_TILES.on(backend, hidden)(hidden, weight, bias, targets, *options)
    logps, stats, index, labels, state, references, sums, stash = tiles
    parts = (weight.shape[0], total, how.temperature, statistics, group)
    whole = merged_head_state(state, labels, index == hidden.shape[0], *parts)
    finish = LINEAR_SHARD_FINISH.on(backend, hidden)
    results = finish(logps, stats, index, labels, state[0], whole, references, sums, stash, weight, *how)
    return logps, stats, index, *results, stash


class LinearShardLogps(torch.autograd.Function):
    """Differentiable in hidden states, weight and bias, once; what needs no gradient costs none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        total: int | Tensor,
        rows: int,
        stash_rows: int,
        statistics: bool,
        how: HeadProcessing,
        backend: str,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        """See `linear_shard_logps`."""
        grad_hidden, grad_weight, grad_bias = ctx.needs_input_grad[:3]
        with_head = grad_weight or grad_bias
        if not with_head:
            stash_rows = 0
        options = (total, rows, stash_rows, grad_hidden, statistics, how, backend, group)
        logps, stats, *saved = _forward(hidden, weight, bias, targets, *options)
        recomputed = with_head and stash_rows < rows
        ctx.save_for_backward(hidden if with_head else None, weight, bias, targets if recomputed else None, *saved)
        ctx.mark_non_differentiable(stats)
        ctx.how, ctx.backend, ctx.group = how, backend, group
        return logps, stats

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        refuse_double_backward("linear_token_logps")
        hidden, weight, bias, targets, index, *of_rows = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = ctx.needs_input_grad[:3]
        op = LINEAR_LOGPS_BWD.on(ctx.backend, grad_logps)
        N, M = grad_logps.shape[0], index.shape[0]
        d_hidden = d_weight = d_bias = None
        if grad_hidden:
            # Of the scored rows alone, which is what is sent.
            of_scored = torch.cat([grad_logps, grad_logps.new_zeros(1)])[index]
            place = torch.arange(M, device=index.device)
            saved = (None, weight, None, None, place, *of_rows)
            started = started_reduction(op(of_scored, *saved, True, False, False, *ctx.how)[0], "sum", ctx.group)
        if grad_weight or grad_bias:
            saved = (hidden, weight, bias, targets, index, *of_rows)
            _, d_weight, d_bias = op(grad_logps, *saved, False, grad_weight, grad_bias, *ctx.how)
        if grad_hidden:
            d_hidden = weight.new_zeros(N + 1, weight.shape[1]).index_copy(0, index, finished(started))[:N]
        return d_hidden, d_weight if grad_weight else None, d_bias if grad_bias else None, *[None] * 8


def linear_shard_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    how: HeadProcessing,
    shard: Shard,
    *,
    rows: int,
    stash_rows: int,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `linear_logps`, where `weight` [V, D] and `bias` [V] are a shard; targets [N] as of `Shard.own_labels`."""
    if needs_function(hidden, weight, bias):
        options = (shard.total, rows, stash_rows, statistics, how, backend, shard.group)
        return LinearShardLogps.apply(hidden, weight, bias, targets, *options)
    no_grads = (shard.total, rows, 0, False, statistics, how, backend, shard.group)
    logps, stats, *_ = _forward(hidden, weight, bias, targets, *no_grads)
    return logps, stats
