"""The compiled GPU code, executed without a GPU on tests/ptxemu: values, addresses, races; and faults planted in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CHECKS = ("density_ratio", "emulator", "head", "logps", "special")


def run_module(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process where Triton compiles, as it does for a GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"ptxemu.{module}", "90", *options]
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)


def run(check: str, *options: str) -> subprocess.CompletedProcess[str]:
    if check == "density_ratio" and not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("nvcc was not found")
    return run_module(f"check_{check}", *options)


@pytest.mark.parametrize("check", CHECKS)
def test_compiled_kernels_compute_the_truth_within_their_memory(check: str) -> None:
    result = run(check)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("fault", ["value", "address", "race"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_planted_fault_fails_the_check(check: str, fault: str) -> None:
    result = run(check, "--plant", fault)
    assert result.returncode == 1, result.stdout + result.stderr
    said = {"value": "values are wrong", "address": "out of bounds", "race": "race ("}
    assert f"{said[fault]}" in result.stdout, result.stdout + result.stderr


def test_batches_of_any_size_take_one_compilation_a_kernel() -> None:
    result = run_module("compilations")
    assert result.returncode == 0, result.stdout + result.stderr
    *of_logits, of_the_head = [json.loads(line) for line in result.stdout.splitlines()]
    assert of_logits == [
        {"V": 1009, "_logps_fwd_kernel": 1, "_logps_bwd_kernel": 1},
        {"V": 8192, "_logps_fwd_kernel": 1, "_logps_split_kernel": 1, "_logps_merge_kernel": 1, "_logps_bwd_kernel": 1},
    ]
    # With and without a stash, a tile for many rows or few, and where the rows beyond the stash begin.
    assert max(count for kernel, count in of_the_head.items() if kernel != "V") <= 3
