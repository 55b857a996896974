"""Which implementations exist, which of them run here, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

from dil_kernels.checks import check_choice

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Mark a function whose result does not change while a graph is traced.

    As `torch.compiler.assume_constant_result`, which imports torch._dynamo for it: that takes as long as torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def has_autocast(device_type: str) -> bool:
    """Whether `torch.autocast` takes a kind of device; torch 2.10 cannot trace torch's own function."""
    return torch.amp.is_autocast_available(device_type)


@functools.cache
def load_extension() -> ModuleType | None:
    """The compiled extension `dil_kernels._C` with its CPU ops registered, or None where it was not built."""
    try:
        return importlib.import_module("dil_kernels._C")
    except ImportError:
        return None


@functools.cache
def extension_problem() -> str | None:
    """Why the compiled extension cannot be used, or None if it can."""
    if load_extension() is not None:
        return None
    try:
        importlib.import_module("dil_kernels._C")
    except ModuleNotFoundError:
        outcome = build_report().get("extension", "the package was never installed")
        return "not found, though it was built: reinstall" if outcome == "built" else f"not built: {outcome}"
    except ImportError as error:
        return f"built, but it does not load: {error}"
    return None


def build_report() -> dict[str, str]:
    """What the build recorded of itself: for each part "built", with the CUDA that did, or why it was left out."""
    try:
        return dict(importlib.import_module("dil_kernels._build_report").REPORT)
    except ModuleNotFoundError:
        return {}


@functools.cache
def cuda_extension_problem() -> str | None:
    """Load the CUDA half of the extension; why it cannot be used, or None if it can."""
    problem = extension_problem()
    if problem is not None:
        return problem
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    from pathlib import Path

    outcome = build_report().get("cuda", "unknown")
    problem = _driver_problem(outcome)
    if problem is not None:
        return problem
    path = Path(__file__).parent / "_cuda.so"
    if not path.exists():
        return f"not built: {outcome}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built, but it does not load: {error}"
    return None


def _driver_problem(outcome: str) -> str | None:
    """Of a driver that is older than the CUDA of the build, whose kernels would not start; one of its major is not."""
    built, driver = re.fullmatch(r"built by CUDA ((\d+)\.\d+)", outcome), cuda_driver_version()
    if built is None or driver is None or driver // 1000 >= int(built[2]):
        return None
    return (
        f"it was built by CUDA {built[1]}, and this driver is one for CUDA {driver // 1000}.{driver % 1000 // 10}: "
        "take a newer driver, or build the package by the older CUDA"
    )


def cuda_driver_version() -> int | None:
    """The newest CUDA that the driver serves, as 12080 for 12.8, or None where that cannot be asked."""
    import ctypes

    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def triton_problem() -> str | None:
    """Why no Triton kernel can run in this process, or None if one can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error})"
    if triton_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is visible (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    return None


def _cpp_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the C++ kernels take CPU tensors, not {device.type}"
    return extension_problem()


def _triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the Triton kernels do not take fp64"
    problem = triton_problem()
    if problem is None and device.type != "cuda" and not triton_interpreted():
        return f"Triton kernels take CUDA tensors, not {device.type}"
    return problem


@dataclass(frozen=True)
class Backend:
    """One implementation of the log-probabilities."""

    name: str
    description: str
    problem: Callable[[torch.device, torch.dtype], str | None]  # why it cannot serve them, or None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", "Triton kernels, CUDA", _triton_problem),
        Backend("cpp", "C++ kernels, CPU (SIMD, threads)", _cpp_problem),
        Backend("eager", "plain PyTorch, any device", lambda device, dtype: None),
    )
}
BACKEND_CHOICES = ("auto", *BACKENDS)
BEST = {"cuda": "triton", "cpu": "cpp"}


@functools.cache
def _warn_once(message: str) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("dil_kernels."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


@constant_in_graphs
def _select(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The backend to run, and why it is not the one that was wanted."""
    wanted = BEST.get(device.type, "eager") if backend == "auto" else backend
    problem = BACKENDS[wanted].problem(device, dtype)
    return ("eager" if problem is not None and backend == "auto" else wanted), problem


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend to run on a device.

    Args:
        backend: one of `BACKEND_CHOICES`.
        device: where the tensors are.
        dtype: of the logits.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run there; says why.
    """
    check_choice("backend", backend, BACKEND_CHOICES)
    name, problem = _select(backend, device, dtype)
    if problem is not None and backend != "auto":
        raise RuntimeError(f"backend={backend!r} was asked for but cannot run: {problem}")
    if problem is not None and not torch.compiler.is_compiling():
        _warn_once(f"dil_kernels: no fast log-probs for {dtype} on {device.type} ({problem}); using eager PyTorch")
    return name


@constant_in_graphs
def _loss_problem(device: torch.device) -> str | None:
    return cuda_extension_problem() if device.type == "cuda" else extension_problem()


@constant_in_graphs
def compiled_losses() -> tuple[str, ...]:
    """The losses that the extension computes; it sums log ratios for any."""
    extension = load_extension()
    return () if extension is None else tuple(extension.divergence_names())


def sums_are_compiled(backend: str, device: torch.device) -> bool:
    """Whether the extension sums log ratios, of log-probs that `backend` computes on `device`."""
    if backend == "eager" or device.type not in BEST:
        return False
    problem = _loss_problem(device)
    if problem is not None and not torch.compiler.is_compiling():
        _warn_once(f"dil_kernels: the compiled density-ratio loss is unavailable ({problem}); using eager PyTorch")
    return problem is None
