"""The CPU ops under ThreadSanitizer, on threads that it can see through, and under UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / "emulation" / "threads.cpp"
MAIN = "int main() { return 0; }"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler for Linux was found")
    folder, root = tmp_path_factory.mktemp("threads"), Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fvisibility=hidden"]
    flags += ["-fsanitize=thread,undefined", "-fno-sanitize-recover=undefined"]
    probe = folder / "probe"
    built = subprocess.run(
        [compiler, *flags, "-x", "c++", "-", "-o", probe], input=MAIN, text=True, capture_output=True
    )
    if built.returncode:
        pytest.skip(f"{compiler} has no ThreadSanitizer: {built.stderr.strip().splitlines()[-1]}")
    ran = subprocess.run([probe], capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"ThreadSanitizer does not run here: {ran.stderr.strip()}")
    includes = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(root / "include")]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    command = [compiler, *flags, *includes, str(SOURCE), "-o", str(folder / "threads"), *libraries]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "threads"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    # One thread of torch's own, whose synchronisation goes unseen.
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_cpu_ops_have_no_race_and_no_undefined_arithmetic(program: Path) -> None:
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING: ThreadSanitizer" not in result.stderr
    assert result.stdout.count("on several threads, the same") == 14
    assert result.stdout.endswith("nonsense: survived\n")


def test_a_race_would_be_seen(program: Path) -> None:
    result = run(program, "race")
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
