"""Peak memory of a call."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from harness.timing import Call


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes of tensors that one call holds at a time, over what was held before it.

    On CUDA as the caching allocator counts it. On the CPU from the profiler's record of every allocation through
    PyTorch, which sees tensors, and not what a library takes from the system by itself.
    """
    if device.type != "cuda":
        return max(_running_totals(call), default=0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _running_totals(call: Call) -> Iterator[int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call(0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        yield held


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
