"""The head of `linear`, its vocabulary split over processes: what the split costs beside one process.

Every process has the same hidden states and a part of the weight. Beside ours runs torch's `loss_parallel`, which holds
its part of the logits. Errors are against fp64, before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.functional import cross_entropy, linear

from dil_kernels import linear_token_logps
from families.linear import LINEAR, LinearCase, make_inputs, make_truth
from families.linear_inputs import IGNORE_INDEX, Inputs, loss_of_token_logps
from harness.machine import REPOSITORY, describe_machine

# (inputs, whose weight is a DTensor or whole) -> log-probs [2B, T - 1]
TokenLogps = Callable[[Inputs], Tensor]
COLUMNS = ("case", "provider", "processes", "threads", "pass", "p50_ms", "of_one_process_ms", "efficiency", "error")
# Of a gradient's element, relative to the largest: what is no more than this is rounding, whatever the order of sums.
LARGEST_ERROR = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def ours(inputs: Inputs) -> Tensor:
    return linear_token_logps(inputs.hidden, inputs.weight, inputs.labels)


def torch_loss_parallel(inputs: Inputs) -> Tensor:
    """Of the scored rows alone, as an attentive user would."""
    labels = inputs.labels[:, 1:].flatten()
    scored = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    weight = inputs.weight
    assert isinstance(weight, DTensor)
    rows = inputs.hidden[:, :-1].flatten(0, 1)[scored]
    hidden = DTensor.from_local(rows, weight.device_mesh, [Replicate()], run_check=False)
    logps = -cross_entropy(linear(hidden, weight).float(), labels[scored], reduction="none")
    local = logps.redistribute(placements=[Replicate()]).to_local() if isinstance(logps, DTensor) else logps
    zeros = torch.zeros(labels.shape, dtype=local.dtype, device=local.device)
    return zeros.index_put((scored,), local).view(inputs.labels[:, 1:].shape)


def step(provider: TokenLogps, inputs: Inputs, backward: bool) -> list[Tensor]:
    """The loss and, with a backward, the gradients of hidden states and weight."""
    with torch.set_grad_enabled(backward), loss_parallel():
        loss, _ = loss_of_token_logps(provider(inputs), None, inputs)
        return [loss.detach(), *(torch.autograd.grad(loss, inputs.leaves) if backward else ())]


def error_of(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest of an element, relative to the largest of its tensor."""
    local = [x.to_local() if isinstance(x, DTensor) else x for x in results]
    found = [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(local, truth, strict=True)]
    return max(found)


def median_ms(run: Callable[[], object], rounds: int, device: torch.device, together: bool) -> float:
    """Of the slowest process, where they run together."""
    times = []
    for _ in range(rounds + 1):
        if together:
            dist.barrier()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = torch.tensor(time.perf_counter() - begin, device=device)
        if together:
            dist.all_reduce(took, dist.ReduceOp.MAX)
        times.append(1e3 * float(took))
    return statistics.median(times[1:])


def measure_case(case: LinearCase, device: torch.device, rounds: int) -> list[dict[str, str]]:
    """A row of each provider and pass; of one process those of the first one alone, while the others wait."""
    inputs, ranks, rank = make_inputs(case, device), dist.get_world_size(), dist.get_rank()
    truth = make_truth(inputs)
    mesh = init_device_mesh(device.type, (ranks,))
    chunk = -(-case.vocab // ranks)
    own = slice(rank * chunk, (rank + 1) * chunk)
    part = inputs.weight.detach()[own].clone()
    shape = inputs.weight.shape
    weight = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
    split = Inputs(case.task, inputs.hidden, weight.requires_grad_(), inputs.labels, None, None)
    in_parts = [truth.gradients[0], truth.gradients[1][own]]
    rows = []
    for backward, name in ((False, "forward"), (True, "forward+backward")):
        alone = 0.0
        if rank == 0:
            alone = median_ms(lambda backward=backward: step(ours, inputs, backward), rounds, device, together=False)
        dist.barrier()
        for provider, run in (("one process", None), ("dil_kernels", ours), ("loss_parallel", torch_loss_parallel)):
            found = step(run or ours, split if run else inputs, True)[1:]
            error = torch.tensor(error_of(found, in_parts if run else truth.gradients), device=device)
            dist.all_reduce(error, dist.ReduceOp.MAX)
            took = alone
            if run is not None:
                took = median_ms(
                    lambda run=run, backward=backward: step(run, split, backward), rounds, device, together=True
                )
            right = float(error) <= LARGEST_ERROR[case.dtype]
            processes = ranks if run else 1
            values = (case.name, provider, processes, torch.get_num_threads(), name)
            timed = ("wrong", "", "")
            if right and rank == 0:  # which alone prints and writes
                timed = (f"{took:.2f}", f"{alone:.2f}", f"{alone / took / processes:.2f}")
            rows.append(dict(zip(COLUMNS, map(str, (*values, *timed, f"{float(error):.1e}")), strict=True)))
    return rows


def work(rank: int, arguments: argparse.Namespace, store: str) -> None:
    """What a process does; the first one writes and prints."""
    device = torch.device("cuda", rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(arguments.threads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=arguments.ranks)
    rows = []
    for case in arguments.grid:
        rows += measure_case(case, device, 1 if arguments.quick else arguments.rounds)
        if rank == 0:
            for row in rows[-6:]:
                print("  ".join(f"{row[column]:>{max(len(column), 8)}}" for column in COLUMNS), flush=True)
    if rank == 0:
        folder = arguments.output or REPOSITORY / "runs" / "bench" / describe_machine(device).slug
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "linear_ranks.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"written: {folder / 'linear_ranks.csv'}")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0 and any(row["provider"] == "dil_kernels" and row["p50_ms"] == "wrong" for row in rows):
        raise SystemExit("dil_kernels is wrong")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the arguments of a command line (default: this process's) and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, or GPUs")
    parser.add_argument("--quick", action="store_true", help="a grid small enough for a test; its timings mean nothing")
    parser.add_argument("--cases", metavar="PART,...", default="policy", help="only cases whose name has one of these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process, and of the one that is alone")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--output", type=Path, help="folder for linear_ranks.csv")
    arguments = parser.parse_args(argv)
    grid = LINEAR.grids["quick" if arguments.quick else arguments.device]
    parts = arguments.cases.split(",")
    arguments.grid = [case for case in grid if case.task == "policy" and any(part in case.name for part in parts)]
    if arguments.ranks < 2 or not arguments.grid:
        parser.error("--ranks must be at least 2, and --cases must leave cases whose task is policy")
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.ranks:
        parser.error(f"--ranks {arguments.ranks}: {torch.cuda.device_count()} CUDA devices are visible")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (arguments, str(Path(folder) / "store")), nprocs=arguments.ranks)
    return 0
