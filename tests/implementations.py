"""Every backend on every device that it serves, as pytest parameters. What cannot run here is skipped with the
reason."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import pytest
import torch

from dil_kernels import backends


@dataclass(frozen=True)
class Implementation:
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def _problem(backend: str, device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend == "triton" and device == "cpu" and not backends.triton_interpreted():
        return "a CUDA device is visible: the Triton kernels run natively, not in the interpreter"
    return backends.BACKENDS[backend].problem(torch.device(device), torch.float32)


def _param(backend: str, device: str):
    problem = _problem(backend, device)
    marks = [pytest.mark.gpu] if device == "cuda" else []
    # On a CPU machine a missing extension is a failure of the suite, not a reason to test less.
    interpreter_off = backend == "triton" and torch.cuda.is_available()
    no_triton = backend == "triton" and sys.platform != "linux"  # nor does the package ask for it there
    if problem is not None and (device == "cuda" or interpreter_off or no_triton):
        marks.append(pytest.mark.skip(reason=f"{backend} on {device}: {problem}"))
    return pytest.param(Implementation(backend, device), marks=marks, id=f"{backend}-{device}")


ALL = [
    _param(backend, device)
    for backend, device in (
        ("eager", "cpu"),
        ("cpp", "cpu"),
        ("triton", "cpu"),
        ("triton", "cuda"),
        ("eager", "cuda"),
    )
]
KERNELS = [p for p in ALL if p.values[0].backend != "eager"]
LOSSES = [p for p in ALL if str(p.values[0]) in ("eager-cpu", "cpp-cpu", "triton-cuda", "eager-cuda")]
every_implementation = pytest.mark.parametrize("impl", ALL)
every_kernel = pytest.mark.parametrize("impl", KERNELS)
every_loss = pytest.mark.parametrize("impl", LOSSES)
