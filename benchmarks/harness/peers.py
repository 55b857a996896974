"""How an implementation is described: ours, one that may not be installed, or that runs on one kind of device."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import NoReturn

import torch

import dil_kernels
from dil_kernels.backends import resolve_backend
from dil_kernels.cli.environment import version_of
from harness.family import OURS, Provider


def our_version() -> str:
    """The package and its version, for the record."""
    return f"dil_kernels {dil_kernels.__version__}"


def our_label(device: torch.device) -> str:
    """Ours says which backend `auto` takes."""
    return f"{OURS} ({resolve_backend('auto', device, torch.float32)})"


def peer_version(distribution: str) -> Callable[[], str]:
    """Its name and version, for the record."""
    return lambda: f"{distribution} {version_of(distribution)}"


def peer_problem(distribution: str, module: str, device_type: str = "cuda") -> Callable[[torch.device], str | None]:
    """For a package that may not be there and is timed on one kind of device.

    Args:
        distribution: as pip knows it.
        module: the top-level module that it installs.
        device_type: where it is timed.
    """

    def problem(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"not installed (pip install {distribution})"
        if device.type != device_type:
            return f"runs on {device_type} only here ({peer_version(distribution)()} is installed)"
        return None

    return problem


def not_run(name: str, description: str, reason: str) -> Provider:
    """A peer that cannot run beside the others anywhere, listed with the reason."""

    def build() -> NoReturn:
        raise RuntimeError(reason)

    return Provider(name, description, build, problem=lambda _device: reason)


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot run on a device, or None."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "needs a C++ compiler (g++ or clang++, or CXX)"
    return None
