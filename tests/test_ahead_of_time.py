"""What the compilers make of every GPU kernel for every supported architecture, without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dil_kernels

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}


@pytest.fixture(scope="module")
def triton_reports() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot_report.py"), "--json"],
        capture_output=True, text=True, check=True, env=environment,
    ).stdout  # fmt: skip
    return [json.loads(line) for line in output.splitlines()]


def test_every_triton_kernel_compiles_for_every_architecture(triton_reports) -> None:
    from dil_kernels.kernels import logps

    kernels = {name.strip("_").removesuffix("_kernel") for name in vars(logps) if name.endswith("_kernel")}
    assert {report["kernel"] for report in triton_reports} == kernels
    assert {report["arch"] for report in triton_reports} == ARCHITECTURES


def test_no_triton_kernel_spills(triton_reports) -> None:
    assert [report for report in triton_reports if report["spilled_bytes"]] == []


def test_aligned_rows_move_16_bytes_a_thread(triton_reports) -> None:
    aligned = [report for report in triton_reports if report["V"] % 16 == 0]
    assert {report["load_bytes"] for report in aligned} == {16}
    assert {report["store_bytes"] for report in aligned if report["kernel"] == "logps_bwd"} == {16}


@pytest.fixture
def cuda_library() -> Path:
    path = Path(dil_kernels.__file__).parent / "_cuda.so"
    if not path.exists():
        from dil_kernels.backends import build_report

        pytest.skip(f"the CUDA extension was not built: {build_report().get('cuda', 'unknown')}")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads a Linux shared object")
def test_the_cuda_extension_asks_for_the_libraries_that_hold_its_symbols(cuda_library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) was not found")
    dynamic = subprocess.run(["readelf", "-d", cuda_library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert needed >= {"libtorch_cuda.so", "libtorch_cpu.so"}
    assert not {name for name in needed if name.startswith("libcudart")}  # static: any CUDA of torch will do


def test_the_cuda_extension_holds_every_architecture_without_spills(cuda_library: Path) -> None:
    import triton

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST chose other architectures")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "-res-usage", str(cuda_library)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"arch = (sm_\d+)", usage)) >= ARCHITECTURES
    kernels = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(kernels) >= 4 * len(ARCHITECTURES)  # forward and backward, fp32 and fp64
    assert [kernel for kernel in kernels if kernel[1:] != ("0", "0")] == []
