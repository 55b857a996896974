"""The machine: its name, its versions, its own copy bandwidth."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import dil_kernels

CPU_COPY_BYTES = 256 << 20
CUDA_COPY_BYTES = 2 << 30
UNKNOWN_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Machine:
    """What a figure must be read with."""

    device: str
    slug: str
    threads: int  # of PyTorch on the CPU
    torch: str
    triton: str
    dil_kernels: str
    commit: str  # of the repository, "-dirty" with uncommitted changes
    date: str  # UTC, ISO 8601


def describe_machine(device: torch.device) -> Machine:
    """Ask the device, the packages and git."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Machine(
        device=name,
        slug=slug if device.type == "cuda" else f"{slug}-{threads}-threads",
        threads=threads,
        torch=torch.__version__,
        triton=installed_version("triton"),
        dil_kernels=dil_kernels.__version__,
        commit=_git_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def installed_version(distribution: str) -> str:
    """Version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's model: from /proc/cpuinfo on Linux, sysctl on macOS, or what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(\S.*)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    if platform.system() == "Darwin":
        brand = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if brand:
            return brand
    return platform.processor() or platform.machine() or "unknown CPU"


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 on CUDA, the largest that Linux reports for the CPU, else a guess."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=UNKNOWN_CACHE_BYTES)


class Copy:
    """A large `Tensor.copy_` between two buffers that exist already: the machine's ceiling for reading and writing."""

    def __init__(self, device: torch.device, small: bool = False) -> None:
        nbytes = CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
        if small:
            nbytes >>= 5
        self.source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
        self.target = torch.zeros_like(self.source)

    def __call__(self, i: int) -> None:
        """Copy once; the argument is that of every timed call."""
        self.target.copy_(self.source)

    def gbps(self, milliseconds: float) -> float:
        """Bytes read plus bytes written a second, in 1e9, of a copy that took so long."""
        return 2 * self.source.nbytes / (milliseconds * 1e-3) / 1e9


def _git_commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else commit


def _output(*command: str) -> str:
    """What a command prints, run beside this file; "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
