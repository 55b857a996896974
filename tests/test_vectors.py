"""The vectors that the CPU kernels are made of (csrc/cpu/vec.h), on every instruction set that runs here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "emulation" / "vectors.cpp"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"baseline": [], "AVX2": AVX2, "AVX-512": AVX512, "AVX-512 BF16": [*AVX512, "-mavx512bf16"], "NEON": []}


def run(level: str, folder: Path) -> str:
    arm = platform.machine() == "aarch64"
    compiler = shutil.which("aarch64-linux-gnu-g++" if level == "NEON" and not arm else "g++")
    if compiler is None:
        pytest.skip(f"no C++ compiler for {level} was found")
    if (level == "NEON") != arm and not (level == "NEON" and shutil.which("qemu-aarch64-static")):
        pytest.skip(f"neither this machine nor an emulator runs {level}")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if missing := [flag for flag in LEVELS[level] if flag[2:].replace("avx512bf", "avx512_bf") not in cpu.split()]:
        pytest.skip(f"this CPU has no {missing[0][2:]}")
    program = folder / "vectors"
    flags = ["-std=c++17", "-O2", "-w", "-static", *LEVELS[level]]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    emulator = ["qemu-aarch64-static"] if level == "NEON" and not arm else []
    return subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("level", LEVELS)
def test_conversions_and_exponentials(level: str, tmp_path: Path) -> None:
    wrong_bf16, wrong_fp16, any_right, wrong_limits, exp2_error, narrow_error = run(level, tmp_path).split()
    assert (wrong_bf16, wrong_fp16, any_right, wrong_limits) == ("0", "0", "1", "0")
    assert float(exp2_error) < 1.9e-7
    assert float(narrow_error) < 3.1e-6
