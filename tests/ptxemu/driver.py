"""A Triton driver that hands launches to the PTX emulator.

`install(arch)` makes Triton's own JIT (binder, specialisation of arguments, compiler) run on CPU tensors as if a GPU of
that architecture were current: what is launched is the PTX that would be assembled for it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ptxemu-cache"))

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as runtime_driver


@dataclass
class Function:
    """What load_binary returns as the handle of a kernel."""

    name: str
    ptx: str
    cubin: bytes
    metadata_path: str
    shared: int


@dataclass
class Launch:
    function: Function
    grid: tuple[int, int, int]
    metadata: Any
    names: list[str]
    types: list[str]
    values: list[Any]


class Utils:
    def __init__(self) -> None:
        self.pending = None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }

    def on_load(self, module, function, name, metadata_group, digest) -> None:
        self.pending = metadata_group

    def load_binary(self, name, kernel, shared, device):
        group = self.pending
        path = next(p for c, p in group.items() if c.endswith(".ptx"))
        with open(path) as f:
            ptx = f.read()
        json_path = next(p for c, p in group.items() if c.endswith(".json"))
        function = Function(name, ptx, kernel, json_path, shared)
        return function, function, 0, 0, 1024


class Launcher:
    def __init__(self, src, metadata) -> None:
        self.src, self.metadata = src, metadata

    def __call__(self, gx, gy, gz, stream, function, packed, launch_metadata, enter, exit_, *args) -> None:
        names, types, values = [], [], []
        for (name, ty), value in zip(self.src.signature.items(), args, strict=True):
            if ty == "constexpr":
                continue
            names.append(name)
            types.append(ty)
            values.append(value)
        driver = runtime_driver.active
        launch = Launch(function, (gx, gy, gz), self.metadata, names, types, values)
        driver.executor(launch)


class EmuDriver:
    def __init__(self, arch: int, executor: Callable[[Launch], None]) -> None:
        self.arch, self.executor = arch, executor
        self.utils = Utils()
        self.launcher_cls = Launcher
        knobs.runtime.kernel_load_start_hook = self.utils.on_load

    def get_current_device(self) -> tuple:
        return ("emulated", self.arch)

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def set_current_device(self, device) -> None:
        pass

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def install(arch: int, executor: Callable[[Launch], None]) -> EmuDriver:
    emu = EmuDriver(arch, executor)
    runtime_driver.set_active(emu)
    return emu
