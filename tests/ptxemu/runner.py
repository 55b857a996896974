"""Execute Triton launches in the emulator."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ptxemu import driver, ptx
from ptxemu.arithmetic import Noise
from ptxemu.machine import launch
from ptxemu.memory import Global, Problems, Region
from ptxemu.translate import Machine

FORMATS = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}
# Pointers that no kernel may store through.
READ_ONLY = {
    "labels_ptr",
    "logits_ptr",
    "grad_logps_ptr",
    "bias_ptr",
    "factors_ptr",
    "row_max_ptr@bwd",
    "log_sum_ptr@bwd",
}


def host_bytes(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else np.zeros(0, np.uint8)


def region_of(name: str, tensor: torch.Tensor, writable: bool = True) -> Region:
    storage = tensor.untyped_storage()
    size, es = storage.nbytes(), tensor.element_size()
    named = torch.zeros(size // es, dtype=torch.bool)
    if tensor.numel():
        torch.as_strided(named, tensor.size(), tensor.stride(), tensor.storage_offset()).fill_(True)
    allowed = np.repeat(named.numpy(), es)
    allowed = np.concatenate([allowed, np.zeros(size - allowed.size, bool)])
    return Region(name, storage.data_ptr(), host_bytes(storage.data_ptr(), size), allowed, writable)


@dataclass
class Record:
    """One launch."""

    kernel: str
    grid: tuple[int, int, int]
    problems: Problems


class Executor:
    """What the driver calls with each launch.

    Args:
        noise: the seed of the errors of approximate instructions; None for none.
        schedule: "first" or "last" lets that warp run ahead of the others.
        plant: a fault to put into the PTX.
    """

    def __init__(
        self, noise: int | None = None, schedule: str | None = None, plant: Callable[[str], str] | None = None
    ) -> None:
        self.noise, self.schedule, self.plant = noise, schedule, plant
        self.machines: dict[int, tuple[driver.Function, Machine]] = {}
        self.records: list[Record] = []

    def machine(self, function: driver.Function) -> Machine:
        """The kernel made ready to run, once."""
        if id(function) not in self.machines:
            text = function.ptx if self.plant is None else self.plant(function.ptx)
            self.machines[id(function)] = (function, Machine(ptx.parse(text)[function.name], Noise(self.noise)))
        return self.machines[id(function)][1]

    def __call__(self, item: driver.Launch) -> None:
        problems = Problems()
        memory = Global(problems)
        machine = self.machine(item.function)
        backward = "bwd" in item.function.name
        payload = bytearray(machine.param_bytes)
        values = zip(item.names, item.types, item.values, strict=True)
        for (parameter, _, _), (name, kind, value) in zip(machine.kernel.params, values, strict=False):
            offset = machine.param_offset[parameter]
            if not kind.startswith("*"):
                struct.pack_into("<" + FORMATS[kind], payload, offset, value)
                continue
            read_only = name in READ_ONLY or (backward and name + "@bwd" in READ_ONLY)
            region = region_of(name, value, not read_only)
            if region.buffer.size:
                for other in memory.regions:
                    if other.base == region.base and other.buffer.size == region.buffer.size:
                        other.writable |= region.writable
                memory.add(region)
            struct.pack_into("<Q", payload, offset, value.data_ptr())
        threads = (32 * item.metadata.num_warps, 1, 1)
        shared = item.metadata.shared
        launch(machine, bytes(payload), item.grid, threads, shared, memory, problems, schedule=self.schedule)
        self.records.append(Record(item.function.name, item.grid, problems))

    def take(self) -> list[Record]:
        """The launches since the last time."""
        records, self.records = self.records, []
        return records


def install(arch: int, executor: Executor) -> Executor:
    """Make Triton launch on `executor`, as if a GPU of that architecture were current."""
    driver.install(arch, executor)
    return executor
