"""Time the launch shapes of the log-prob kernels on this GPU, and print an entry for dil_kernels/kernels/launch.py.

    python benchmarks/sweep_launch.py                                on a GPU
    TRITON_INTERPRET=1 python benchmarks/sweep_launch.py --dry-run   the same steps on tiny CPU tensors, for no times

Every candidate runs every case; the best one has the least geometric mean of times. Bytes are those of a table's floor:
every logit read once forward, read and written once backward.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import dil_kernels.ops.logps  # noqa: F401 - registers the ops
from dil_kernels.kernels import launch
from dil_kernels.kernels.launch import Shape, Shapes

DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Grid:
    """What is swept."""

    forward: tuple[Shape, ...]
    backward: tuple[Shape, ...]
    cases: tuple[tuple[int, int], ...]  # rows, V
    device: str


FULL = Grid(
    forward=tuple(Shape(*shape) for shape in itertools.product((2, 4, 8), (2, 4, 8), (1, 3))),
    backward=tuple(
        Shape(loads, warps, *ahead)
        for loads, warps, ahead in itertools.product((2, 4), (2, 4, 8), ((1, 1), (1, 4), (3, 4), (3, 8)))
    ),
    cases=((4096, 128256), (4096, 50257), (8192, 32000), (64, 128256)),
    device="cuda",
)
SHAPES = (Shape(1, 1), Shape(2, 2, 2, 2))
DRY = Grid(SHAPES, SHAPES, cases=((2, 40), (1, 9001)), device="cpu")


@contextmanager
def entry(capability: tuple[int, int], itemsize: int, shapes: Shapes) -> Iterator[None]:
    """The table with one entry replaced."""
    saved = launch.TABLE
    launch.TABLE = saved | {capability: {itemsize: shapes}}
    try:
        yield
    finally:
        launch.TABLE = saved


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median device time, caches flushed; on the CPU one run."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(function, return_mode="median")
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


PASSES = {"forward": 0.0, "backward": 0.0, "capped backward": 30.0}  # and their softcapping


def sweep(grid: Grid, itemsize: int, capability: tuple[int, int]) -> Shapes:
    """Time all candidates for one size of element; print each, return the best."""
    ops = torch.ops.dil_kernels
    totals: dict[str, dict[Shape, float]] = {name: {} for name in PASSES}
    columns = "".join(f"{name:>7}" for name in ("loads", "warps", "stages", "tiles"))
    print(f"{'pass':16}{columns}" + "".join(f"{f'{rows} x {V}':>16}" for rows, V in grid.cases) + "   GB/s")
    candidates = [
        (which, shape) for which in PASSES for shape in (grid.forward if which == "forward" else grid.backward)
    ]
    for which, shape in candidates:
        how = (-100, False, PASSES[which], 1.0)
        times, rates = [], []
        for rows, V in grid.cases:
            logits = torch.randn(1, rows, V, device=grid.device).to(DTYPES[itemsize])
            labels = torch.randint(0, V, (1, rows), device=grid.device)
            with entry(capability, itemsize, Shapes(shape, shape, shape)):
                logps, row_max, log_sum, _ = ops.logps_fwd(logits, labels, *how, False)
                if which == "forward":
                    run = lambda x=logits, y=labels, how=how: ops.logps_fwd(x, y, *how, False)  # noqa: E731
                else:
                    saved = (logps, logits, labels, row_max, log_sum)
                    run = lambda saved=saved, how=how: ops.logps_bwd(*saved, *how)  # noqa: E731
                times.append(milliseconds(run, grid.device))
            moved = logits.numel() * itemsize * (1 if which == "forward" else 2)
            rates.append(moved / times[-1] / 1e6)
        totals[which][shape] = math.prod(times)
        print(f"{which:16}" + "".join(f"{n:7}" for n in shape) + "".join(f"{r:16.1f}" for r in rates), flush=True)
    return Shapes(*(min(found, key=found.__getitem__) for found in totals.values()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny CPU tensors in Triton's interpreter")
    options = parser.parse_args(arguments)
    grid = DRY if options.dry_run else FULL
    if grid.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible; --dry-run checks the script without one", file=sys.stderr)
        return 1
    capability = launch.device_of(torch.device(grid.device)).capability
    found = {itemsize: sweep(grid, itemsize, capability) for itemsize in DTYPES}
    parts = [f"{size}: Shapes({', '.join(f'Shape{tuple(s)}' for s in shapes)})" for size, shapes in found.items()]
    print(f"    {capability}: {{{', '.join(parts)}}},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
