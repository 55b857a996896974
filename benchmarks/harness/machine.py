"""The machine: its name, its versions, and what code ran on it."""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import dil_kernels
from dil_kernels.cli.environment import cpu_name, version_of

UNKNOWN_CACHE_BYTES = 64 << 20
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Machine:
    """What a figure must be read with."""

    device: str
    slug: str  # the device as a folder's name
    driver: str  # NVIDIA's; "" on the CPU
    cpu_threads: int  # of PyTorch
    torch: str
    triton: str
    dil_kernels: str
    commit: str  # of the repository, "-dirty" with uncommitted changes outside benchmarks/results
    source: str  # digest of the package as it runs, compiled objects included, and of the benchmarks
    date: str  # UTC, ISO 8601


def describe_machine(device: torch.device) -> Machine:
    """Ask the device, the packages and git."""
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else cpu_name()
    threads = torch.get_num_threads()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Machine(
        device=name,
        slug=slug if is_cuda else f"{slug}-{threads}-threads",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        if is_cuda
        else "",
        cpu_threads=threads,
        torch=torch.__version__,
        triton=version_of("triton"),
        dil_kernels=dil_kernels.__version__,
        commit=_git_commit(),
        source=_source_digest(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 on CUDA, the largest that Linux reports for the CPU, else a guess."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=UNKNOWN_CACHE_BYTES)


def _git_commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = _output(
        "git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"
    )
    return f"{commit}-dirty" if changed else commit


def _source_digest() -> str:
    """Of the bytes that run, whatever git says of them."""
    package = Path(dil_kernels.__file__).parent
    files = [*package.rglob("*.py"), *package.rglob("*.so"), *(REPOSITORY / "benchmarks").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    """What a command prints, run beside this file; "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
