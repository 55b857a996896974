"""How the parts of a vocabulary can be given, and what is refused: runs of tests/vocab_parallel_runs.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from linear_problems import make_problem
from problems import IGNORE
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from vocab_parallel_case import Split, assert_close, check_linear, group, linear_results, refused

from dil_kernels import fused_dil_loss, linear_token_logps, token_logps
from dil_kernels.functional import vocab_parallel
from dil_kernels.ops import linear_shards


def dtensors() -> None:
    """The group and the parts are read from a DTensor; a mesh of two dimensions has it whole over the other one."""
    processes = dist.get_world_size()
    problem = make_problem(2, 5, 8, 103, shift=True).to(torch.float64)
    expected = linear_results(problem, "cpp")
    logits = problem.hidden @ problem.weight.t()
    for mesh, placements in (
        (init_device_mesh("cpu", (processes,)), [Shard(0)]),
        (init_device_mesh("cpu", (processes // 2, 2)), [Replicate(), Shard(0)]),
    ):
        part = replace(problem, weight=distribute_tensor(problem.weight, mesh, placements))
        actual = linear_results(part, "cpp")
        assert isinstance(actual[5], DTensor)
        assert actual[5].placements == tuple(placements)
        for name, one, other in zip("lmehdw", actual, expected, strict=True):
            assert_close(one.full_tensor() if isinstance(one, DTensor) else one, other, name)
        of_logits = [Shard(-1) if placement.is_shard() else placement for placement in placements]
        split = distribute_tensor(logits, mesh, of_logits)
        assert_close(token_logps(split, problem.labels), token_logps(logits, problem.labels), "logits")
    whole = distribute_tensor(problem.weight, mesh, [Replicate(), Replicate()])
    rows = distribute_tensor(problem.weight, mesh, [Replicate(), Shard(1)])
    for weight in (whole, rows):
        with refused(TypeError, "it must be Shard(0), the vocabulary"):
            linear_token_logps(problem.hidden, weight, problem.labels)
    with refused(TypeError, "hidden_states is a DTensor"):
        hidden = distribute_tensor(problem.hidden, mesh, [Replicate(), Shard(1)])
        linear_token_logps(hidden, part.weight, problem.labels)
    with refused(ValueError, "process_group and lm_head_weight say different process groups"):
        other = dist.new_group(list(range(processes)))
        linear_token_logps(problem.hidden, part.weight, problem.labels, process_group=other)


def compiled() -> None:
    problem = make_problem(2, 6, 8, 103, shift=True, bias=True).to(torch.float32)
    problem.labels[0, :3] = IGNORE
    bounds = [0, *(20 + 9 * n for n in range(dist.get_world_size() - 1)), 103]
    own = Split(tuple(bounds)).own
    logits = problem.hidden @ problem.weight.t()
    results = []
    for head, rows in (
        (linear_token_logps, token_logps),
        (torch.compile(linear_token_logps, fullgraph=True), torch.compile(token_logps, fullgraph=True)),
    ):
        for stash_bytes in (None, 0):
            tensors = [problem.hidden, problem.weight[own], problem.bias[own]]
            inputs = [x.detach().clone().requires_grad_() for x in tensors]
            how = {"lm_head_bias": inputs[2], "process_group": group(), "stash_bytes": stash_bytes}
            logps, statistics = head(*inputs[:2], problem.labels, return_statistics=True, **how)
            grads = torch.autograd.grad(logps, inputs, problem.upstream)
            results.append([logps.detach(), *statistics[:2], *grads])
        x = logits[..., own].detach().clone().requires_grad_()
        logps = rows(x, problem.labels, process_group=group())
        results.append([logps.detach(), *torch.autograd.grad(logps, x, problem.upstream)])
    for one, other in zip(results[3:], results[:3], strict=True):
        for number, (actual, expected) in enumerate(zip(one, other, strict=True)):
            assert_close(actual, expected, f"compiled {number}")


def triton() -> None:
    """The kernels of the GPU, in Triton's interpreter."""
    problem = make_problem(2, 4, 8, 75, shift=True).to(torch.float32)
    problem.options.update(final_logit_softcapping=5.0)
    problem.labels[0, :2] = IGNORE
    own = Split((0, *(20 + n for n in range(dist.get_world_size() - 1)), 75))
    for stash_bytes in (None, 0):
        check_linear(problem, own, torch.float32, "triton", stash_bytes)
    logits = problem.hidden @ problem.weight.t()
    results = []
    for values, how in ((logits[..., own.own], {"process_group": group(), "backend": "triton"}), (logits, {})):
        x = values.detach().clone().requires_grad_()
        logps, statistics = token_logps(x, problem.labels, return_statistics=True, **how)
        (dx,) = torch.autograd.grad(logps, x, problem.upstream)
        results.append([logps.detach(), *statistics[:2], dx])
    results[1][3] = results[1][3][..., own.own]
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        assert_close(one, other, f"logits {number}")


def errors() -> None:
    """Whatever only one process could know is said by all, and nobody waits."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    last, label = rank == processes - 1, torch.tensor([[1, 2, 3]])
    gen = torch.Generator().manual_seed(rank)
    hidden, weight = torch.ones(1, 3, 4), torch.randn(5, 4, generator=gen)
    logits = torch.randn(1, 3, 5, generator=gen)
    beyond = 5 * processes

    def cases(**changes: Any) -> None:
        linear_token_logps(
            changes.pop("hidden", hidden), changes.pop("weight", weight), changes.pop("labels", label),
            process_group=group(), **changes,
        )  # fmt: skip

    with refused(ValueError, f"labels must be in [0, {beyond}) or ignore_index=-100, got {beyond}"):
        cases(labels=torch.tensor([[1, beyond, 3]]))
    with refused(ValueError, "label must be the same on all processes of process_group"):
        cases(labels=torch.tensor([[1, beyond if last else 2, 3]]))
    with refused(ValueError, "the sum of the labels must be the same on all processes of process_group, got"):
        cases(labels=torch.tensor([[1, 2, 3], [1, 3 - last, 3]])[:, :], hidden=torch.ones(2, 3, 4))
    with refused(ValueError, "the number of rows must be the same"):
        cases(labels=torch.tensor([[1, -100 if last else 2, 3]]))
    with refused(ValueError, "the number of positions must be the same"):
        size = 4 if last else 3
        cases(hidden=torch.ones(1, size, 4), labels=torch.tensor([[1, 2, 3, -100]])[:, :size])
    with refused(ValueError, "the hidden size of hidden_states must be the same"):
        size = 5 if last else 4
        cases(hidden=torch.ones(1, 3, size), weight=torch.randn(5, size, generator=gen))
    for option in ({"temperature": 1.0 + rank}, {"final_logit_softcapping": 2.0 + last}, {"return_statistics": last}):
        with refused(ValueError, "options must be the same on all processes of process_group, got ignore_index=-100"):
            cases(**option)
    with refused(ValueError, "options must be the same on all processes of process_group"):
        token_logps(logits, label, process_group=group(), return_statistics=last)
    with refused(ValueError, "have the same entries of the vocabulary"):
        cases(weight=torch.arange(20.0).view(5, 4))
    with refused(ValueError, "have the same entries of the vocabulary"):
        token_logps(torch.arange(15.0).view(1, 3, 5), label, process_group=group())
    with refused(ValueError, "lm_head_weight is empty: [0, 4]"):
        cases(weight=weight[: 0 if last else 5])
    with refused(TypeError if last else ValueError, "labels must be int64, got torch.int32"):
        cases(labels=label.int() if last else label)
    with refused(TypeError if last else ValueError, "lm_head_weight must be torch.float32 as hidden_states"):
        cases(weight=weight.double() if last else weight)
    with refused(ValueError, "ref_chosen_logps must be [1], got [2]"):
        ref = torch.zeros(2 if last else 1)
        pair = torch.randn(2, 3, 5, generator=gen), label.repeat(2, 1)
        fused_dil_loss(*pair, ref_chosen_logps=ref, ref_rejected_logps=torch.zeros(1), process_group=group())
    with refused(TypeError, "process_group must be a torch.distributed.ProcessGroup"):
        token_logps(logits, label, process_group="tp")
    # Afterwards all is as before.
    token_logps(logits, label, process_group=group())


def another_group() -> None:
    """Processes that use different groups of the same processes are told so, though nobody comes."""
    one, other = (dist.new_group(list(range(dist.get_world_size()))) for _ in range(2))
    vocab_parallel.FIRST_USE_SECONDS = 2.0
    rank = dist.get_rank()
    others = ", ".join(str(r) for r in range(dist.get_world_size()) if (r == 0) != (rank == 0))
    with refused(RuntimeError, f"rank(s) {others} of {dist.get_world_size()} have not used this group within 2 s"):
        token_logps(
            torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64), process_group=one if rank == 0 else other
        )


def bytes_sent() -> None:
    """Two all-reduces of a few numbers a scored row, one of the gradient of the scored rows, and nothing else."""
    V, D, scored = 64, 8, 5
    problem = make_problem(2, 8, D, V * dist.get_world_size(), shift=False).to(torch.float32)
    problem.labels.view(-1)[scored:] = IGNORE
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = problem.weight[rank * V : (rank + 1) * V]
    weight = DTensor.from_local(part, mesh, [Shard(0)]).requires_grad_()
    sent: list[tuple[str, int]] = []
    ops = torch.ops._c10d_functional
    original = ops.all_reduce

    def counting(values: Tensor, how: str, name: str) -> Tensor:
        sent.append((how, values.numel()))
        return original(values, how, name)

    ops.all_reduce = counting
    try:
        hidden = problem.hidden.clone().requires_grad_()
        logps = linear_token_logps(hidden, weight, problem.labels, shift=False)
        assert sent == [("max", scored), ("sum", 3 * scored)]
        sent.clear()
        logps.sum().backward()
        assert sent == [("sum", scored * D)]
        sent.clear()
        kept: list[int] = []
        as_before = linear_shards.LINEAR_SHARD_TILES.on

        def on(*args: Any) -> Any:
            def tiles(*given: Any) -> tuple[Tensor, ...]:
                results = as_before(*args)(*given)
                kept.append(sum(x.numel() for x in results[5:]))
                return results

            return tiles

        with torch.no_grad(), mock.patch.object(linear_shards, "LINEAR_SHARD_TILES", SimpleNamespace(on=on)):
            linear_token_logps(hidden, weight, problem.labels, shift=False, return_statistics=True)
        assert sent == [("max", 2 * scored), ("sum", 6 * scored)]
        assert kept == [0]  # nothing for a backward that will not come
    finally:
        ops.all_reduce = original
