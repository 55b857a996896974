"""Compile every Triton kernel ahead of time, without a GPU, and report what the compiler made of it.

    python benchmarks/aot_report.py                 a table
    python benchmarks/aot_report.py --csv           write benchmarks/results/ahead-of-time/*.csv, one file a family
    python benchmarks/aot_report.py --json --sample what the tests compare with those files

Columns: registers and local memory (spills) a thread, shared memory a program, the widest global load and store in
bytes a thread, and machine instructions a logit: those of the hot loop, or of the whole program where it has none (a
program of the backward also holds the ways of ignored rows and of the label's block). A vocabulary of 128256 stands for
those whose rows are aligned, 50257 for odd ones, 1000 for small ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dil_kernels.kernels import head_rows as head_rows_kernels
from dil_kernels.kernels import launch
from dil_kernels.kernels import linear_head as linear_head_kernels
from dil_kernels.kernels import logps as logps_kernels
from dil_kernels.ops.linear_head import TILE_SHAPES

ARCHITECTURES = {80: (8, 0), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
DTYPES = {"fp32": ("*fp32", 4), "bf16": ("*bf16", 2), "fp16": ("*fp16", 2)}
VOCABULARIES = (1000, 50257, 128256)
RESULTS = Path(__file__).parent / "results" / "ahead-of-time"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = 32
LOOPS_OVER_LOGITS = ("logps_fwd", "logps_split", "logps_bwd", "head_rescale")
PTX_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Kernel:
    """One kernel specialised as its launcher would, for one architecture."""

    name: str  # of the function, without underscores and "kernel"
    variant: str
    arch: int
    dtype: str
    V: int
    num_warps: int
    source: ASTSource
    max_registers: int | None = None  # as the launcher limits them

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What identifies a row of the report."""
        return self.name, self.variant, f"sm_{self.arch}", self.dtype, self.V


KEY = ("kernel", "variant", "arch", "dtype", "V")


@dataclass(frozen=True)
class Report:
    """What one compilation gave."""

    kernel: str
    variant: str
    arch: str
    dtype: str
    V: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    instructions: float | str  # a logit; empty where a program has no tile of logits
    triton: str
    ptxas: str


def specialise(
    fn: triton.JITFunction, types: dict[str, str], constants: dict[str, int], divisible: set[str]
) -> ASTSource:
    """The AST of a kernel with its argument types; `divisible` names the integers that 16 divides, as pointers are."""
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    divisible = (divisible & set(fn.arg_names)) | {name for name in fn.arg_names if name.endswith("_ptr")}
    divisible -= {*constants, *fn.do_not_specialize}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(fn=fn, signature=signature, constexprs=dict(constants), attrs=attributes)


def logps(arch: int) -> Iterator[Kernel]:
    """The log-probs from logits, plain, with softcapping, and with statistics."""
    for dtype, (pointer, itemsize) in DTYPES.items():
        types = dict.fromkeys(
            ("logps_ptr", "row_max_ptr", "log_sum_ptr", "statistics_ptr", "partials_ptr", "grad_logps_ptr"), "*fp32"
        ) | dict.fromkeys(("multiplier", "inv_cap", "inv_temperature"), "fp32")
        types |= {"labels_ptr": "*i64", "logits_ptr": pointer, "grad_logits_ptr": pointer}
        shapes = launch.shapes(ARCHITECTURES[arch], itemsize)
        for V in VOCABULARIES:
            # Strides as of contiguous logits [B, T, V] with an odd T: 16 divides none where V is odd.
            divisible = {"V", "stride_xb", "stride_xt", "stride_dxb", "stride_dxt", "span"} if V % 16 == 0 else {"span"}
            for variant, cap, statistics in (
                ("plain", False, False),
                ("softcapping", True, False),
                ("statistics", False, True),
                ("softcapping+statistics", True, True),
            ):
                how = {"SHIFT": 1, "HAS_CAP": cap}
                forward = shapes.forward.of(cap + statistics)
                many = launch.forward_launch(forward, 10**6, V, itemsize, 1)
                few = launch.forward_launch(forward, 1, V, itemsize, 10**6)
                tile = {"ROWS": many.ROWS, "BLOCK_V": many.BLOCK_V, "STAGES": many.STAGES}
                found: list[tuple[triton.JITFunction, dict[str, int], int]] = [
                    (logps_kernels._logps_fwd_kernel, how | tile | {"STATISTICS": statistics}, many.num_warps)
                ]
                if few.splits > 1:
                    split = how | {"STATISTICS": statistics, "SPLITS": few.splits}
                    tile = {"ROWS": few.ROWS, "BLOCK_V": few.BLOCK_V, "STAGES": few.STAGES}
                    found += [
                        (logps_kernels._logps_split_kernel, split | tile, few.num_warps),
                        (logps_kernels._logps_merge_kernel, split, 1),
                    ]
                if not statistics:
                    backward = shapes.capped_backward if cap else shapes.backward
                    tiles, block, stages, num_warps = launch.backward_launch(backward, V, itemsize)
                    constants = how | {"SAME_PHASE": True, "TILES": tiles, "BLOCK_V": block, "STAGES": stages}
                    found.append((logps_kernels._logps_bwd_kernel, constants, num_warps))
                for fn, constants, num_warps in found:
                    name = fn.__name__.strip("_").removesuffix("_kernel")
                    source = specialise(fn, types, constants, divisible)
                    # A program of one warp merges splits and takes what registers it wants, as its launcher lets it.
                    limit = launch.max_registers(num_warps) if num_warps > 1 else None
                    yield Kernel(name, variant, arch, dtype, V, num_warps, source, limit)


def linear_head(arch: int) -> Iterator[Kernel]:
    """What happens between the matrix products of the head, on whole tiles; the dtype is that of the gradient."""
    kernels, V = linear_head_kernels, 128256
    n = TILE_SHAPES["cuda"].columns
    block, warps = kernels.tile_launch_shape(n)
    tensors = ("tile_ptr", "bias_ptr", "state_ptr", "sums_ptr", "references_ptr", "reference_ptr", "norm_ptr")
    tensors += ("label_grad_ptr",)
    numbers = ("logit_scale", "softcap", "inv_temperature", "slack")
    aligned = {"stride_tile", "stride_grad", "stride_stash", "n", "D", "V", "tile_columns"}
    tile = {"BLOCK_V": block, "BLOCK_D": kernels.SUMS_BLOCK_D}
    for dtype, (pointer, _) in DTYPES.items():
        types = dict.fromkeys(tensors, "*fp32") | dict.fromkeys(numbers, "fp32") | {"labels_ptr": "*i64"}
        types |= {"grad_ptr": pointer, "stash_ptr": pointer}
        for variant, flags in (
            ("kept", {"HAS_GRAD": True, "HAS_SUMS": False, "HAS_REFERENCE": True}),
            ("not kept", {"HAS_GRAD": True, "HAS_SUMS": True, "HAS_REFERENCE": False}),
            ("inference+statistics", {"HAS_GRAD": False, "HAS_SUMS": False, "HAS_REFERENCE": False}),
            ("softcapping+bias", {"HAS_GRAD": True, "HAS_SUMS": True, "HAS_REFERENCE": False}),
        ):
            processed = {"HAS_BIAS": "bias" in variant, "SOFTCAP": "softcapping" in variant}
            statistics = {"STATISTICS": "statistics" in variant, "WHOLE": True}
            source = specialise(kernels._head_tile_kernel, types, flags | processed | statistics | tile, aligned)
            limit = kernels.tile_registers(processed["SOFTCAP"], statistics["STATISTICS"], processed["HAS_BIAS"])
            yield Kernel("head_tile", variant, arch, dtype, V, warps, source, limit)
        for variant, flag in (("plain", False), ("softcapping+bias", True)):
            constants = {"HAS_BIAS": flag, "SOFTCAP": flag, "BLOCK_V": kernels.GRAD_BLOCK_V}
            source = specialise(kernels._head_tile_grad_kernel, types, constants, aligned)
            yield Kernel("head_tile_grad", variant, arch, dtype, V, kernels.GRAD_WARPS, source)
        source = specialise(kernels._head_rescale_kernel, types, {"BLOCK_V": kernels.RESCALE_BLOCK_V}, aligned)
        yield Kernel("head_rescale", "plain", arch, dtype, V, kernels.RESCALE_WARPS, source)


def head_rows(arch: int) -> Iterator[Kernel]:
    """What happens to the rows of the head around its tiles, at D = 4096; the dtype is that of hidden states."""
    kernels, V = head_rows_kernels, 128256
    fp32 = ("logps_ptr", "statistics_ptr", "reference_ptr", "rest_ptr", "factor_ptr", "label_grad_ptr", "norm_ptr")
    fp32 += ("state_ptr", "coefs_ptr", "grad_logps_ptr", "sums_ptr")
    types = dict.fromkeys(fp32, "*fp32") | dict.fromkeys(("softcap", "temperature", "scale"), "fp32")
    types |= dict.fromkeys(("index_ptr", "labels_ptr", "targets_ptr"), "*i64")
    aligned = {"stride_values", "stride_weight", "D", "V"}
    rows, columns = {"BLOCK": kernels.ROW_BLOCK}, {"BLOCK_D": kernels.COLUMNS}
    finish = {"SOFTCAP": True, "STATISTICS": True, "NORMALISE": True} | rows
    for dtype, (pointer, _) in DTYPES.items():
        types |= dict.fromkeys(("out_ptr", "values_ptr", "weight_ptr"), pointer)
        for fn, variant, constants, warps in (
            (kernels._gather_rows_kernel, "plain", {"SCALED": False} | columns, kernels.COLUMN_WARPS),
            (kernels._gather_rows_kernel, "scaled", {"SCALED": True} | columns, kernels.COLUMN_WARPS),
            (kernels._scatter_rows_kernel, "scaled", columns, kernels.COLUMN_WARPS),
            (kernels._finish_sums_kernel, "plain", columns, kernels.COLUMN_WARPS),
        ):
            name = fn.__name__.strip("_").removesuffix("_kernel")
            yield Kernel(name, variant, arch, dtype, V, warps, specialise(fn, types, constants, aligned))
    select = {"STATISTICS": True, "BLOCK": kernels.SELECT_BLOCK}
    for fn, variant, constants, warps in (
        (kernels._select_rows_kernel, "statistics", select, kernels.SELECT_WARPS),
        (kernels._coefficients_kernel, "plain", rows, kernels.ROW_WARPS),
        (kernels._finish_rows_kernel, "softcapping+statistics", finish, kernels.ROW_WARPS),
    ):
        name = fn.__name__.strip("_").removesuffix("_kernel")
        yield Kernel(name, variant, arch, "fp32", V, warps, specialise(fn, types, constants, aligned))


# Family -> its kernels for an architecture. Each has a report of its own.
FAMILIES: dict[str, Callable[[int], Iterator[Kernel]]] = {
    "head_rows": head_rows,
    "linear_head": linear_head,
    "logps": logps,
}
SAMPLE_STEP = 13  # every 13th kernel falls on each architecture, dtype and variant, and is what a test can afford


def kernels_of(family: str, architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Kernel]:
    """The kernels of a family in the order of its report."""
    for arch in architectures:
        yield from FAMILIES[family](arch)


def widest(ptx: str, instruction: str) -> int:
    """Bytes that one thread moves by the widest global load ("ld") or store ("st")."""
    pattern = rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b"
    found = [int(lanes or 1) * PTX_BYTES[bits] for lanes, bits in re.findall(pattern, ptx)]
    if instruction == "ld":  # and copies to shared memory
        found += [int(size, 0) for size in re.findall(r"\bcp\.async\.\w+\.shared\.global .*?\], (\w+)", ptx)]
    return max(found, default=0)


def instructions_a_logit(kernel: Kernel, cubin: str) -> float | str:
    """Machine instructions that a thread executes for a logit of its tile."""
    constants = kernel.source.constants
    block = next((value for (index,), value in constants.items() if kernel.source.fn.arg_names[index] == "BLOCK_V"), 0)
    loads = next((value for (index,), value in constants.items() if kernel.source.fn.arg_names[index] == "ROWS"), 1)
    if not block:
        return ""
    command = [BINARIES / "nvdisasm", "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    operations: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*);", line):
            if found[1] != "NOP":
                operations.append(found[1])
            target = re.search(r"`\((\.L_\w+)\)", found[2])
            if found[1] == "BRA" and target and target[1] in labels:
                loops.append(operations[labels[target[1]] :])
    # Of two loops over logits, the one without masks is hot; loops of a few instructions are none over logits, nor are
    # those of the log-probs that take no exponential: they write zeros.
    computes = ("MUFU" if kernel.name.startswith("logps") else "FMUL",)
    loops = [
        loop for loop in loops if len(loop) > 16 and kernel.name in LOOPS_OVER_LOGITS and set(computes) & set(loop)
    ]
    hot = min(map(len, loops), default=len(operations))
    return round(hot * WARP * kernel.num_warps / (loads * block), 2)


def ptxas_version() -> str:
    """The release of the assembler that Triton brings."""
    output = subprocess.run([BINARIES / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", output)[0]


def compile_kernel(kernel: Kernel) -> Report:
    """Compile one kernel, from Triton's cache if it is there."""
    limit = {} if kernel.max_registers is None else {"maxnreg": kernel.max_registers}
    compiled = triton.compile(
        kernel.source, target=GPUTarget("cuda", kernel.arch, 32), options={"num_warps": kernel.num_warps} | limit
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [BINARIES / "cuobjdump", "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        instructions = instructions_a_logit(kernel, cubin.name)
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return Report(
        *kernel.key,
        warps=kernel.num_warps,
        registers=int(resources["REG"]),
        spilled_bytes=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
        load_bytes=widest(compiled.asm["ptx"], "ld"),
        store_bytes=widest(compiled.asm["ptx"], "st"),
        instructions=instructions,
        triton=triton.__version__,
        ptxas=ptxas_version(),
    )


def report_path(family: str) -> Path:
    """The checked-in report of a family."""
    return RESULTS / f"{family}.csv"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="write the checked-in reports")
    parser.add_argument("--list", action="store_true", help="the keys of the rows as JSON, without compiling")
    parser.add_argument("--sample", action="store_true", help="only the part that the tests recompile")
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--arch", type=int, nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="e.g. 90"
    )
    options = parser.parse_args(arguments)
    step = SAMPLE_STEP if options.sample else 1
    if options.list:
        for kernel in (kernel for family in options.family for kernel in kernels_of(family, options.arch)):
            print(json.dumps(dict(zip(KEY, kernel.key, strict=True))))
        return 0
    columns = [field.name for field in fields(Report)]
    row = "{:12} {:22} {:7} {:5} {:>7} {:>6} {:>10} {:>8} {:>7} {:>7} {:>7} {:>13}"
    if not options.json:
        print(row.format(*(column.removesuffix("_bytes") for column in columns)))
    for family in options.family:
        reports = []
        for kernel in itertools.islice(kernels_of(family, options.arch), 0, None, step):
            reports.append(asdict(compile_kernel(kernel)))
            print(json.dumps(reports[-1]) if options.json else row.format(*reports[-1].values()), flush=True)
        if options.csv:
            RESULTS.mkdir(parents=True, exist_ok=True)
            with report_path(family).open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
