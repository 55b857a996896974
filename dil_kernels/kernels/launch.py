"""Launch shapes of the log-prob kernels: a small table per architecture, looked up and never searched for at run time.

Those of sm_90 were measured on an H200 (`benchmarks/sweep_launch.py`, docs/kernels.md); the others follow them until
they are measured. What decides for 16 bits is that loads do not stop while a program computes: two tiles are on their
way to shared memory while a third is in use, and a program of the backward takes eight, one after the other. fp32 has
half the arithmetic a byte, and is at the copy's rate without. Softcapping is bound by its arithmetic and wants many
programs of few registers.
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


FP32 = Shapes(Shape(8, 4), Shape(4, 16), Shape(2, 4))
BACKWARDS_OF_16_BITS = (Shape(2, 4, stages=3, tiles=8), Shape(2, 4, tiles=4))
# (major, minor) of the first GPUs that an entry serves -> bytes of an element -> shapes.
TABLE = {
    (8, 0): {2: Shapes(Shape(8, 4, stages=3), *BACKWARDS_OF_16_BITS), 4: FP32},
    (12, 0): {2: Shapes(Shape(4, 4, stages=3), *BACKWARDS_OF_16_BITS), 4: FP32},  # 100 KB of shared memory an SM
}
PROGRAMS_PER_SM = 4  # of the forward, that live at once; where the rows are fewer, they are split
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


# Choosing how to launch takes as long as launching: choices are kept.
@functools.lru_cache(maxsize=4096)
def forward_launch(shape: Shape, num_rows: int, V: int, itemsize: int, num_sms: int) -> ForwardLaunch:
    """How to launch the forward over a number of rows: tiles no larger than a row or a split needs.

    Few rows are split as far as all programs still run at once. More would leave most of the GPU waiting for the last.
    """
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * num_rows <= PROGRAMS_PER_SM * num_sms and 2 * splits * MIN_SPAN <= V:
        splits *= 2
    span = V if splits == 1 else triton.cdiv(V, splits)
    block, num_warps = _block(shape.num_warps, span, itemsize)
    rows = min(shape.loads, triton.next_power_of_2(triton.cdiv(span, block)))
    return ForwardLaunch(rows, block, shape.stages, num_warps, splits, triton.cdiv(span, block) * block)


@functools.lru_cache(maxsize=4096)
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
