"""Compile every Triton kernel ahead of time, without a GPU, and report what the compiler made of it.

    python benchmarks/aot_report.py            a table
    python benchmarks/aot_report.py --json     one JSON object a line, for the tests

Columns: registers and local memory (spills) a thread, shared memory a program, and the widest global load and store in
bytes a thread. V = 128256 stands for vocabularies whose rows are aligned, V = 50257 for odd ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dil_kernels.kernels.logps import _logps_bwd_kernel, _logps_fwd_kernel, bwd_launch_shape, fwd_launch_shape

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
VOCABULARIES = (1000, 50257, 128256)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PTX_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Kernel:
    """One kernel specialised for a dtype and a vocabulary, as the launchers would call it."""

    name: str
    dtype: str
    V: int
    source: ASTSource
    num_warps: int


@dataclass(frozen=True)
class Report:
    """What one compilation gave."""

    kernel: str
    arch: str
    dtype: str
    V: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int


def source(fn: triton.JITFunction, types: dict[str, str], constants: dict[str, int], divisible: set[str]) -> ASTSource:
    """The AST of a kernel with its argument types; `divisible` names the pointers and integers that 16 divides."""
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(fn=fn, signature=signature, constexprs=dict(constants), attrs=attributes)


def kernels() -> Iterator[Kernel]:
    for dtype, pointer in DTYPES.items():
        for V in VOCABULARIES:
            aligned = {"V", "stride_xb", "stride_xt", "stride_dxb", "stride_dxt"} if V % 16 == 0 else set()
            fp32 = dict.fromkeys(("logps_ptr", "row_max_ptr", "log_sum_ptr", "grad_logps_ptr"), "*fp32")
            types = fp32 | {
                "labels_ptr": "*i64",
                "inv_temperature": "fp32",
                "logits_ptr": pointer,
                "grad_logits_ptr": pointer,
            }
            rows, block, warps = fwd_launch_shape(V)
            for name, fn, constants, num_warps in (
                ("logps_fwd", _logps_fwd_kernel, {"SHIFT": 1, "ROWS": rows, "BLOCK_V": block}, warps),
                ("logps_bwd", _logps_bwd_kernel, *_bwd_constants(V)),
            ):
                pointers = {argument for argument in fn.arg_names if argument.endswith("_ptr")}
                divisible = pointers | (aligned & set(fn.arg_names))
                yield Kernel(name, dtype, V, source(fn, types, constants, divisible), num_warps)


def _bwd_constants(V: int) -> tuple[dict[str, int], int]:
    block, warps = bwd_launch_shape(V)
    return {"SHIFT": 1, "BLOCK_V": block}, warps


def widest(ptx: str, instruction: str) -> int:
    """Bytes that one thread moves by the widest global load ("ld") or store ("st")."""
    pattern = rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b"
    return max(int(lanes or 1) * PTX_BYTES[bits] for lanes, bits in re.findall(pattern, ptx))


def compile_kernel(kernel: Kernel, arch: int) -> Report:
    compiled = triton.compile(
        kernel.source, target=GPUTarget("cuda", arch, 32), options={"num_warps": kernel.num_warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return Report(
        kernel=kernel.name,
        arch=f"sm_{arch}",
        dtype=kernel.dtype,
        V=kernel.V,
        warps=kernel.num_warps,
        registers=int(resources["REG"]),
        spilled_bytes=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
        load_bytes=widest(compiled.asm["ptx"], "ld"),
        store_bytes=widest(compiled.asm["ptx"], "st"),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), help="e.g. 90 for sm_90")
    options = parser.parse_args(arguments)
    row = "{:10} {:7} {:5} {:>7} {:>6} {:>10} {:>8} {:>7} {:>7} {:>7}"
    if not options.json:
        print(
            row.format("kernel", "arch", "dtype", "V", "warps", "registers", "spilled", "shared", "load B", "store B")
        )
    for kernel in kernels():
        for arch in options.arch:
            report = asdict(compile_kernel(kernel, arch))
            print(json.dumps(report) if options.json else row.format(*report.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
