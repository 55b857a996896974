"""nvcc's PTX of csrc/cuda/density_ratio.cu, executed, against the CPU op: every loss, paired or not, any layout."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptxemu import ptx
from ptxemu.common import PLANTS, Check, options
from ptxemu.machine import launch
from ptxemu.memory import Global, Problems
from ptxemu.runner import region_of
from ptxemu.translate import Machine

given = options(__doc__.splitlines()[0])

import dil_kernels  # noqa: E402, F401  registers the ops
from dil_kernels.losses import LossParameters, divergence_names, get_divergence  # noqa: E402
from dil_kernels.losses.options import LINKS  # noqa: E402

ops = torch.ops.dil_kernels
CSRC = Path(__file__).parents[2] / "csrc"
THREADS = 256  # kThreads of the source


def structs(*headers: Path) -> dict[str, type[ctypes.Structure]]:
    """The structs of the headers that have plain members, laid out as the compiler lays them out."""
    scalars = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double, "bool": ctypes.c_bool}
    found: dict[str, Any] = {"Divergence": ctypes.c_int, "Link": ctypes.c_int}  # enums
    for header in headers:
        for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header.read_text(), re.M | re.S):
            members = re.findall(r"^  (?:const )?(\w+)(\*?) (\w+);", body, re.M)
            types = [ctypes.c_void_p if star else (scalars | found).get(kind) for kind, star, _ in members]
            if members and None not in types:
                fields = list(zip((member for *_, member in members), types, strict=True))
                found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def compiled() -> str:
    """PTX, as setup.py's flags give it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise SystemExit("nvcc was not found on PATH or in $CUDA_HOME/bin")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "density_ratio.ptx"
        flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", "-std=c++17", "-O3"]
        includes = ["-isystem", str(Path(torch.__file__).parent / "include")]
        command = [nvcc, "-ptx", f"-arch=compute_{given.arch}", *flags, *includes]
        subprocess.run([*command, str(CSRC / "cuda" / "density_ratio.cu"), "-o", str(output)], check=True)
        return output.read_text()


text = compiled()
kernels = ptx.parse(PLANTS[given.plant](text) if given.plant else text)
machines = {
    (kind, dtype): Machine(next(k for name, k in kernels.items() if f"density_ratio_{kind}_kernelI{letter}E" in name))
    for kind in ("fwd", "bwd")
    for dtype, letter in ((torch.float32, "f"), (torch.float64, "d"))
}
S = structs(CSRC / "parameters.h", CSRC / "density_ratio.h")
NAMES = re.findall(
    r"X\((\w+)\)", re.search(r"#define DIL_DIVERGENCES\(X\)((.*\\\n)*.*)", (CSRC / "divergences.h").read_text())[1]
)
NAMES = [*(re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in NAMES), "none"]
assert set(NAMES) == {*divergence_names(), "none"}


class Launches:
    """Launches of one problem: what is named is registered memory, the rest is out of bounds."""

    def __init__(self, check: Check, what: object, lanes: int = 8192, reverse: bool = False) -> None:
        self.check, self.what, self.lanes, self.reverse = check, what, lanes, reverse

    def run(self, kind: str, dtype: torch.dtype, parts: list[Any], blocks: int, read: dict, written: dict) -> None:
        problems = Problems()
        memory = Global(problems)
        for tensors, writable in ((read, False), (written, True)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.numel():
                    memory.add(region_of(name, tensor, writable))
        machine = machines[kind, dtype]
        payload = bytearray(machine.param_bytes)
        for (name, _, size), part in zip(machine.kernel.params, parts, strict=True):
            encoded = bytes(part)
            assert len(encoded) == size, (name, len(encoded), size)
            payload[machine.param_offset[name] : machine.param_offset[name] + size] = encoded
        grid = (blocks, 1, 1)
        launch(machine, bytes(payload), grid, (THREADS, 1, 1), 0, memory, problems, self.lanes, self.reverse)
        self.check.counts[kind, "launches"] += 1
        self.check.problems(self.what, kind, problems)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def layout_of(
    x: Tensor, labels: Tensor | None, cu: Tensor | None, chosen: Tensor | None, ignore: int, shift: bool
) -> Any:
    num_sequences = len(x) if cu is None else len(cu) - 1
    return S["SequenceLayout"](
        labels=pointer(labels),
        label_stride_s=0 if labels is None or cu is not None else labels.stride(0),
        label_stride_t=0 if labels is None else labels.stride(-1),
        cu_seqlens=pointer(cu),
        is_chosen=pointer(chosen),
        num_sequences=num_sequences,
        num_values=x.shape[-1],
        ignore_index=ignore,
        shift=int(labels is not None and shift),
    )


def options_of(name: str, parameters: tuple[float, ...], flags: tuple[bool, ...]) -> Any:
    average, interleaved, mean = flags
    *numbers, link = parameters
    fields = S["LossParameters"](*numbers, LINKS.index(link))
    return S["LossOptions"](NAMES.index(name), fields, average, interleaved, mean)


def emulated_fwd(run: Launches, x, labels, cu, ref, refs, chosen, name, *rest) -> tuple[Tensor, ...]:
    """The arguments and results of the op density_ratio_fwd."""
    parameters, flags, (ignore, shift) = rest[:-5], rest[-5:-2], rest[-2:]
    layout = layout_of(x, labels, cu, chosen, ignore, shift)
    n = layout.num_sequences
    items = n if chosen is not None else n // 2
    out: dict[str, Tensor] = {
        "loss": x.new_full((), torch.nan),
        "losses": x.new_full((items,), torch.nan),
        "logratios": x.new_full((n,), torch.nan),
        "logps": x.new_full((n,), torch.nan),
        "coefs": x.new_full((n,), torch.nan),
        "lengths": torch.full((n,), -7, dtype=torch.int32),
        "counts": torch.zeros(2, dtype=torch.int32),
    }
    read = {"token_logps": x, "labels": labels, "cu_seqlens": cu, "is_chosen": chosen}
    read |= {"ref_token_logps": ref, "ref_logps": refs}
    # ForwardPointers is a template: its members, pointers all, in the order of the header.
    header = re.search(r"struct ForwardPointers \{\n(.*?)^\};", (CSRC / "density_ratio.h").read_text(), re.M | re.S)
    members = re.findall(r"\* (\w+);", header[1])
    pointers = (ctypes.c_uint64 * len(members))(*(pointer((read | out)[member]) for member in members))
    run.run("fwd", x.dtype, [layout, options_of(name, parameters, flags), pointers], items, read, out)
    return tuple(out[key] for key in ("loss", "losses", "logratios", "logps", "lengths", "counts", "coefs"))


def emulated_bwd(run: Launches, *inputs: Any) -> Tensor:
    """The arguments and result of the op density_ratio_bwd."""
    *grads, x, labels, cu, chosen, lengths, counts, coefs, average, interleaved, mean, ignore, shift = inputs
    out = torch.full_like(x, torch.nan)
    no_loss = LossParameters("none")[1:]
    parts = [
        layout_of(x, labels, cu, chosen, ignore, shift),
        options_of("none", no_loss, (average, interleaved, mean)),
        S["SequenceGrads"](*map(pointer, grads)),
        *(ctypes.c_uint64(pointer(tensor)) for tensor in (lengths, counts, coefs, out)),
        ctypes.c_int64(out.numel()),
    ]
    read = dict(zip(("grad_loss", "grad_losses", "grad_logratios", "grad_logps"), grads, strict=True))
    read |= {"token_logps": x, "labels": labels, "cu_seqlens": cu, "is_chosen": chosen}
    read |= {"lengths": lengths, "counts": counts, "coefs": coefs}
    run.run("bwd", x.dtype, parts, -(-out.numel() // THREADS), read, {"grad_token_logps": out})
    return out


def problem(case: int, gen: torch.Generator) -> tuple[Any, ...]:
    """Arguments of density_ratio_fwd; every eleventh packed one has invalid boundaries."""

    def pick(values: tuple[Any, ...]) -> Any:
        return values[int(torch.randint(len(values), (), generator=gen))]

    name = NAMES[case % len(NAMES)]
    dtype, shift, packed = pick((torch.float32, torch.float64)), pick((True, False)), pick((True, False))
    unpaired = pick((True, False)) and (name == "none" or get_divergence(name).separable)
    n = 2 * 259 if case % 20 == 7 else pick((1, 3, 9)) * (1 if unpaired else 2)  # 259: more items than threads
    chosen = torch.rand(n, generator=gen) < 0.5 if unpaired else None
    has_labels = case % 5 > 0
    shift = shift and has_labels
    cu = None
    if packed:
        lengths = torch.randint(0, 20 if n > 20 else 700, (n,), generator=gen)
        lengths[0] = max(int(lengths[0]), 2)
        cu = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32)
        if case % 11 == 5:
            cu[1] = cu[-1] + 4
        shape: tuple[int, ...] = (int(lengths.sum()),)
    else:
        shape = (n, 2 if n > 20 else pick((2, 33, 600)))
    labels = torch.randint(-1, pick((0, 1, 3)), shape, generator=gen) if has_labels else None
    if labels is not None and case % 3 == 0:
        labels = torch.stack([labels, labels], -1)[..., 0]
    shape = (*shape[:-1], shape[-1] - shift)
    size = 1.0 if case % 4 else 20.0
    x = torch.randn(shape, generator=gen, dtype=dtype) / size
    ref = torch.randn(shape, generator=gen, dtype=dtype) / size if pick((True, False)) else None
    refs = torch.randn(n, generator=gen, dtype=torch.float64) * 3 if ref is None else None
    link = "imitation" if unpaired else pick(LINKS)
    parameters = (0.8, 0.3, 0.2, 0.25, pick((0.0, 2.0)), 1.5, 0.5, -0.2, 0.1, 3.0, link)
    flags = tuple(pick((True, False)) for _ in range(3))
    return x, labels, cu, ref, refs, chosen, name, *parameters, *flags, -1, shift


def check_case(check: Check, case: int, gen: torch.Generator) -> None:
    arguments = problem(case, gen)
    x, labels, cu, _, _, chosen, name, *_ = arguments
    flags = arguments[-5:]
    layout = "padded" if cu is None else "packed"
    what = (case, name, str(x.dtype)[6:], "pairs" if chosen is None else "unpaired", layout, tuple(x.shape))
    run = Launches(check, what, lanes=8192 if case % 2 else THREADS, reverse=case % 4 == 0)
    actual = emulated_fwd(run, *arguments)
    loss, losses, logratios, logps, lengths, counts, coefs = actual
    if cu is not None and cu[1] > cu[-1]:
        for values in (loss, losses, logratios, logps, coefs):
            check.expect(what, bool(values.isnan().all()), "invalid boundaries do not give NaN")
        saved = (x, labels, cu, chosen, lengths, counts, coefs)
        grad = emulated_bwd(run, x.new_ones(()), None, None, None, *saved, *flags)
        scored = torch.ones(x.shape, dtype=torch.bool) if labels is None else labels[int(flags[-1]) :] != -1
        check.expect(what, bool(grad[scored].isnan().all()), "invalid boundaries do not give NaN gradients")
        return
    expected = ops.density_ratio_fwd(*arguments)
    tolerance = 1e-6 if x.dtype == torch.float32 else 1e-11
    outputs = ("loss", "losses", "logratios", "logps", "lengths", "counts", "coefs")
    for output, one, other in zip(outputs, actual, expected, strict=True):
        check.close(what, output, one, other, tolerance, tolerance * 1e-2)
    grads = [torch.randn(t.shape, generator=gen, dtype=x.dtype) for t in expected[:4]]
    some = [g if torch.rand((), generator=gen) < 0.6 else None for g in grads]
    inputs = (*some, x, labels, cu, chosen, *expected[4:7], *flags)
    check.close(what, "grad", emulated_bwd(run, *inputs), ops.density_ratio_bwd(*inputs), tolerance, tolerance * 1e-2)


def main() -> None:
    check = Check(None, stop_early=given.plant is not None)
    gen = torch.Generator().manual_seed(0)
    for case in range(240 if given.full else 56):
        check_case(check, case, gen)
    check.finish()


if __name__ == "__main__":
    main()
