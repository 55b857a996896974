"""Forward on the CPU makes no copy of the logits and no [B, T, V] temporary; backward makes one buffer, or none in
place."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")

MEASURE = """
import sys
import torch
from dil_kernels import fused_dil_loss, token_logps

backend, dtype, call = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]

def make(V):  # logits by a product that needs neither them nor a buffer of their size in its backward
    hidden, weight = torch.ones(4, 130, 1, dtype=dtype), torch.ones(1, V, dtype=dtype)
    if call in ("backward", "inplace"):
        hidden.requires_grad_()
    return hidden @ weight, torch.randint(0, V, (4, 130))

def run(logits, labels):
    if call == "fused":
        return fused_dil_loss(logits, labels, ref_logits=logits, backend=backend).loss
    logps = token_logps(logits, labels, inplace_backward=call == "inplace", backend=backend)
    if logps.requires_grad:
        logps.sum().backward()

def peak():  # of this program alone: getrusage would start from what the parent held when it forked
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

run(*make(64))  # loads whatever is loaded lazily
logits, labels = make(49152)
before = peak()
run(logits, labels)
print((peak() - before) / (logits.numel() * logits.element_size()))
"""


def extra_memory(backend: str, dtype: str, call: str) -> float:
    """Peak memory that a call adds, in multiples of the logits' own size (100 MB in fp32)."""
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, dtype, call], capture_output=True, text=True, check=True
    )
    return float(output.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("call", "low", "high"),
    [("forward", -0.01, 0.05), ("fused", -0.01, 0.05), ("backward", 0.9, 1.1), ("inplace", -0.01, 0.05)],
)
def test_cpp(dtype: str, call: str, low: float, high: float) -> None:
    assert low <= extra_memory("cpp", dtype, call) <= high


def test_the_measurement_sees_what_eager_allocates() -> None:
    assert extra_memory("eager", "float32", "forward") > 1.5
