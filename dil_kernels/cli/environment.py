"""What `dil-env` prints: versions, devices, backends, and why one is unavailable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from dil_kernels import backends

PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "trl", "numpy", "matplotlib")
Row = tuple[str, ...]


def describe_environment() -> str:
    """The whole report, as aligned text."""
    sections = (
        ("Versions", version_rows()),
        ("Devices", device_rows()),
        ("Backends", backend_rows()),
        ("Extension", extension_rows()),
    )
    return "\n\n".join(f"{title}\n{_align(rows)}" for title, rows in sections)


def version_rows() -> list[Row]:
    """Every package that matters, with its version."""
    rows: list[Row] = [("dil_kernels", version_of("dil-kernels")), ("python", platform.python_version())]
    return rows + [(name, version_of(name)) for name in PACKAGES]


def device_rows() -> list[Row]:
    """The CPU, the CUDA that torch was built with, and every GPU."""
    names = ", ".join(dict.fromkeys([cpu_name(), platform.machine()]))
    rows: list[Row] = [
        ("CPU", f"{names}, {_counted(os.cpu_count() or 1, 'core')}, {_counted(torch.get_num_threads(), 'thread')}")
    ]
    if torch.version.cuda is None:
        return [*rows, ("CUDA", f"none: this PyTorch ({torch.__version__}) was built without it")]
    rows.append(
        ("CUDA", torch.version.cuda if torch.cuda.is_available() else f"{torch.version.cuda}, no device visible")
    )
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}"))
    return rows


def backend_rows() -> list[Row]:
    """Every backend, on the device that it is the best for."""
    home = {name: device for device, name in backends.BEST.items()}
    rows: list[Row] = []
    for name, backend in backends.BACKENDS.items():
        problem = backend.problem(torch.device(home.get(name, "cpu")), torch.float32)
        rows.append((name, backend.description, "available" if problem is None else f"unavailable: {problem}"))
    return rows


def extension_rows() -> list[Row]:
    """The two halves of the extension, and what the first says of its build."""
    rows: list[Row] = []
    for name, problem in (
        ("C++ (dil_kernels._C)", backends.extension_problem()),
        ("CUDA (_cuda.so)", backends.cuda_extension_problem()),
    ):
        rows.append((name, "available" if problem is None else f"unavailable: {problem}"))
    rows += [(f"build of {part}", outcome) for part, outcome in backends.build_report().items()]
    extension = backends.load_extension()
    if extension is None:
        rows.append(
            ("remedy", "install what is missing, then this package again; until then plain PyTorch serves the CPU")
        )
    else:
        rows += [(name.replace("_", " "), value) for name, value in extension.build_info().items()]
    return rows


def cpu_name() -> str:
    """The processor's model: from /proc/cpuinfo on Linux, sysctl on macOS, or what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(\S.*)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def version_of(package: str) -> str:
    """The version of an installed package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _align(rows: Sequence[Row]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows
    )
