"""Launch shapes of the log-prob kernels: a small table per architecture, looked up and never searched for at run time.

No entry has been measured yet. They are derived from what keeps the memory busy: by Little's law an H200 (4.3 TB/s over
132 SMs, about 0.7 us from request to data) needs 23 KB of loads in flight per SM, an A100 (1.9 TB/s, 108 SMs) 12 KB, a
B200 (7.5 TB/s, 148 SMs) 36 KB, an RTX 5090 (1.7 TB/s, 170 SMs) 7 KB. A program that reads `loads` 16-byte vectors a
thread before it computes has 512 x warps x loads bytes in flight, and about half its life it waits; registers (an
element of a loaded vector takes one) let two such programs of 8 x 8, or four of 8 x 4, live on an SM. For sm_100 the
assembler spills with statistics at 8 warps and 128 registers, so its 16-bit forward takes 4 warps. The 16-bit backward
takes 4 warps of 4 loads rather than 8 of 2: as many bytes in flight a program, and its prologue serves twice the logits
(docs/kernels.md counts the instructions).
`benchmarks/sweep_launch.py` times the candidates on a GPU and prints a table to paste here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

VECTOR_BYTES = 16
WARP = 32
MAX_SPLITS = 64
MAX_GRID = 65535  # programs along the second and the third axis of a launch


class Shape(NamedTuple):
    """What a program of a kernel does at once."""

    loads: int  # 16-byte vectors that each thread takes at a time
    num_warps: int
    stages: int = 1  # tiles in flight, and one in use; 1: none is copied ahead
    tiles: int = 1  # of the backward: how many a program takes

    def of(self, extras: int) -> Shape:
        """For forwards with softcapping, statistics or both, which keep more of each logit: half the loads for each."""
        return self._replace(loads=max(1, self.loads >> extras))


class Shapes(NamedTuple):
    """The shapes of one architecture for one size of element."""

    forward: Shape
    backward: Shape
    capped_backward: Shape


# (major, minor) of the first GPUs that an entry serves -> bytes of an element -> shapes.
TABLE = {
    (8, 0): {2: Shapes(Shape(4, 8), Shape(4, 4), Shape(2, 8)), 4: Shapes(Shape(8, 8), Shape(4, 8), Shape(4, 8))},
    (9, 0): {
        2: Shapes(Shape(8, 4, 3), Shape(2, 4, 3, 8), Shape(2, 4, 1, 4)),
        4: Shapes(Shape(8, 4), Shape(4, 16), Shape(2, 4)),
    },
    (10, 0): {2: Shapes(Shape(8, 4), Shape(4, 4), Shape(2, 8)), 4: Shapes(Shape(8, 8), Shape(4, 8), Shape(4, 8))},
    (12, 0): {2: Shapes(Shape(4, 4), Shape(4, 4), Shape(2, 8)), 4: Shapes(Shape(4, 4), Shape(4, 4), Shape(4, 4))},
}
PROGRAMS_PER_SM = 4  # below this, rows are split
MIN_SPAN = 4096  # elements; a smaller share of a row costs more to merge than it saves


def shapes(capability: tuple[int, int], itemsize: int) -> Shapes:
    """The entry of an architecture, or of the newest one before it."""
    known = [key for key in TABLE if key <= capability]
    return TABLE[max(known, default=min(TABLE))][itemsize]


def max_registers(num_warps: int) -> int:
    """What lets two programs live on an SM. Left to itself, the assembler spills to fit a third."""
    return max(64, min(255, 65536 // (2 * WARP * num_warps)))


class ForwardLaunch(NamedTuple):
    """Constants of the forward kernels."""

    ROWS: int
    BLOCK_V: int
    STAGES: int
    num_warps: int
    splits: int
    span: int  # elements of one split


class BackwardLaunch(NamedTuple):
    """Constants of the backward kernel."""

    TILES: int
    BLOCK_V: int
    STAGES: int
    num_warps: int


def forward_launch(shape: Shape, num_rows: int, V: int, itemsize: int, num_sms: int) -> ForwardLaunch:
    """How to launch the forward over a number of rows: tiles no larger than a row or a split needs."""
    splits = 1
    while splits < MAX_SPLITS and num_rows * splits < PROGRAMS_PER_SM * num_sms and 2 * splits * MIN_SPAN <= V:
        splits *= 2
    span = V if splits == 1 else triton.cdiv(V, splits)
    block, num_warps = _block(shape.num_warps, span, itemsize)
    rows = min(shape.loads, triton.next_power_of_2(triton.cdiv(span, block)))
    return ForwardLaunch(rows, block, shape.stages, num_warps, splits, triton.cdiv(span, block) * block)


def backward_launch(shape: Shape, V: int, itemsize: int) -> BackwardLaunch:
    """How to launch the backward: a few tiles a program."""
    block, num_warps = _block(shape.num_warps, V, itemsize)
    tile = min(shape.loads * block, triton.next_power_of_2(triton.cdiv(V, block) * block))
    tiles = min(shape.tiles, triton.cdiv(V, tile))
    return BackwardLaunch(tiles, tile, shape.stages if tiles > 1 else 1, num_warps)


def _block(num_warps: int, elements: int, itemsize: int) -> tuple[int, int]:
    """One 16-byte vector for each thread, with no more warps than the elements need."""
    vector = VECTOR_BYTES // itemsize
    while num_warps > 1 and num_warps * WARP * vector >= 2 * elements:
        num_warps //= 2
    return num_warps * WARP * vector, num_warps


class Device(NamedTuple):
    """What the choice of a launch depends on."""

    capability: tuple[int, int]
    num_sms: int


INTERPRETED = Device((9, 0), 132)


@functools.cache
def device_of(device: torch.device) -> Device:
    """A CUDA device; for CPU tensors, which only the interpreter takes, an H200."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)
