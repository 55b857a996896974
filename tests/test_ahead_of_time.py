"""What the compilers make of every GPU kernel for every supported architecture, without a GPU."""

from __future__ import annotations

import csv
import itertools
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


KEY = ("kernel", "variant", "arch", "dtype", "V")
WIDTHS = ("spilled_bytes", "load_bytes", "store_bytes")


def aot_report(*options: str) -> list[dict[str, str]]:
    """Rows as benchmarks/aot_report.py prints them, in a process where kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "aot_report.py"), "--json", *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [{key: str(value) for key, value in json.loads(line).items()} for line in output.splitlines()]


@pytest.fixture(scope="module")
def report() -> list[dict[str, str]]:
    """The checked-in reports of all families."""
    rows: list[dict[str, str]] = []
    for path in sorted((ROOT / "benchmarks" / "results" / "ahead-of-time").glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def test_the_report_is_of_every_kernel_for_every_architecture(report) -> None:
    listed = [key(row) for row in aot_report("--list")]
    assert [key(row) for row in report] == listed, "make aot-report writes the reports again"
    folder = Path(dil_kernels.__file__).parent / "kernels"
    kernels = re.findall(r"^def _(\w+)_kernel\(", "".join(path.read_text() for path in folder.glob("*.py")), re.M)
    assert {row["kernel"] for row in report} == set(kernels)
    assert {row["arch"] for row in report} == ARCHITECTURES


def test_the_report_is_what_the_compiler_makes_of_the_kernels(report) -> None:
    reported = {key(row): row for row in report}
    for row in aot_report("--sample"):
        expected = reported[key(row)]
        same_compiler = (row["triton"], row["ptxas"]) == (expected["triton"], expected["ptxas"])
        columns = row.keys() if same_compiler else WIDTHS
        assert {c: row[c] for c in columns} == {c: expected[c] for c in columns}, "make aot-report writes it again"


def test_no_triton_kernel_spills(report) -> None:
    assert [row for row in report if row["spilled_bytes"] != "0"] == []


def test_parts_of_rows_all_run_at_once(report) -> None:
    """Those of plain rows; with statistics 3 an SM run on sm_100."""
    from dil_kernels.kernels.launch import PROGRAMS_PER_SM

    splits = [row for row in report if row["kernel"] == "logps_split" and row["variant"] == "plain"]
    assert {row["arch"] for row in splits} == ARCHITECTURES
    shared = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KB for the programs of an SM, with 1 of each
    for row in splits:
        registers = 32 * int(row["warps"]) * (-(-int(row["registers"]) // 8) * 8)  # given out by 8
        assert PROGRAMS_PER_SM * registers <= 65536, row
        assert PROGRAMS_PER_SM * (int(row["shared_bytes"]) + 1024) <= (shared[row["arch"]] + 1) * 1024, row


def test_logits_move_16_bytes_a_thread_also_in_odd_vocabularies(report) -> None:
    readers = [row for row in report if row["kernel"] in ("logps_fwd", "logps_split", "logps_bwd")]
    assert {int(row["V"]) % 16 for row in readers} == {0, 1, 8}
    assert {row["load_bytes"] for row in readers} == {"16"}
    assert {row["store_bytes"] for row in readers if row["kernel"] == "logps_bwd"} == {"16"}


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
    nvcc = shutil.which("nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout if nvcc else ""
    newer = {"sm_110"} if "compute_110" in known else set()
    assert set(re.findall(r"arch = (sm_\d+)", usage)) >= ARCHITECTURES | newer
    kernels = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(kernels) >= 4 * len(ARCHITECTURES)  # forward and backward, fp32 and fp64
    # nvcc reports no spills; one thread of a block of the forward keeps the sums of a pair in a frame of 48 bytes.
    assert [kernel for kernel in kernels if int(kernel[1]) > 48 or kernel[2] != "0"] == []


def test_the_launch_sweep_prints_an_entry_of_the_table() -> None:
    from dil_kernels.kernels.launch import Shape, Shapes

    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep_launch.py"), "--dry-run"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    entry = eval("{" + output.splitlines()[-1] + "}", {"Shape": Shape, "Shapes": Shapes})
    assert {size: type(shapes) for size, shapes in entry[9, 0].items()} == {2: Shapes, 4: Shapes}


def test_launches_cover_a_row_and_fit_the_machine() -> None:
    from dil_kernels.kernels import launch

    for capability, itemsize in itertools.product(((8, 6), (9, 0), (10, 3), (12, 1), (7, 0)), (2, 4)):
        shapes = launch.shapes(capability, itemsize)
        for num_rows, V in itertools.product((1, 64, 600, 100_000), (1, 31, 1000, 50257, 128256, 262144)):
            ROWS, BLOCK_V, _, num_warps, splits, span = launch.forward_launch(
                shapes.forward, num_rows, V, itemsize, 132
            )
            assert splits * span >= V
            assert span % BLOCK_V == 0
            assert num_warps * 32 * (16 // itemsize) == BLOCK_V
            # All parts of rows run at once.
            assert splits == 1 or (num_rows * splits <= 4 * 132 and span >= launch.MIN_SPAN // 2)
            assert 2 * max(span, BLOCK_V) > ROWS * BLOCK_V
            for shape in (shapes.backward, shapes.capped_backward):
                tiles, block, _, num_warps = launch.backward_launch(shape, V, itemsize)
                assert (tiles - 1) * block < V
                assert block & (block - 1) == 0
                assert 1 <= num_warps <= 32
    launches = (launch.forward_launch(launch.shapes((9, 0), 2).forward, N, 128256, 2, 132) for N in (1, 66, 67, 512))
    assert [chosen.splits for chosen in launches] == [16, 8, 4, 1]
