"""What one call does beside taking time: the memory it holds at its peak, and how many operations it launches."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from harness.timing import Call

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Trace:
    """Of one call.

    Attributes:
        peak_bytes: most bytes of tensors that it held at a time, over what was held before it. On CUDA as the caching
            allocator counts it. On the CPU from the profiler's record of every allocation through PyTorch, which sees
            tensors, and not what a library takes from the system by itself.
        launches: on CUDA kernels, copies and fills on the device; on the CPU operators that PyTorch dispatched, those
            inside others too.
    """

    peak_bytes: int
    launches: int


def trace_call(call: Call, device: torch.device) -> Trace:
    """Run a call with its number 0: once to warm up, then traced; on CUDA memory and launches in two calls.

    What the profiler itself allocates must not count as the call's.
    """
    call(0)
    if device.type != "cuda":
        events = _profile(call, [ProfilerActivity.CPU])
        return Trace(_peak(events), sum(event.get("cat") == "cpu_op" for event in events))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    events = _profile(call, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
    return Trace(peak, sum(event.get("cat") in DEVICE_CATEGORIES for event in events))


def _profile(call: Call, activities: list[ProfilerActivity]) -> list[dict[str, Any]]:
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call(0)
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def _peak(events: list[dict[str, Any]]) -> int:
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard stderr, where the profiler's C++ library announces itself on every start."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
