"""Instructions that reach beyond the registers of a thread: memory, and the other lanes of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable

from ptxemu.arithmetic import BITS, UnsupportedError
from ptxemu.emit import Operation


def _vector(to: Operation) -> int:
    return int(next((p[1:] for p in to.parts if re.fullmatch(r"v\d", p)), "1"))


def _copy(to: Operation) -> None:
    if not to.op.startswith("cp.async."):
        raise UnsupportedError(to.op)
    if to.parts[2] in ("commit_group", "wait_group", "wait_all"):
        to.line("pass")
        return
    size = int(to[2], 0)
    read_bytes = to.read(3, "u32") if len(to) > 3 else f"np.uint32({size})"
    to.line(f"S.copy({to.address(0)}, {to.address(1)}, {size}, {read_bytes}, {to.mask}, {to.where}, {to.op!r})")


def _load(to: Operation) -> None:
    space, size = to.parts[1], BITS[to.ty] // 8
    if space == "param":
        base, offset = to.place(1)
        for k, target in enumerate(to.list(0)):
            to.set(f"S.param({base!r}, {offset + k * size}, 'u{size}')", to.ty, target)
        return
    to.line(f"L = S.load('{space}', {to.address(1)}, {size}, {_vector(to)}, {to.mask}, {to.where}, {to.op!r})")
    for k, target in enumerate(to.list(0)):
        to.set(f"L[{k}]", to.ty, target)


def _store(to: Operation) -> None:
    values = ", ".join(to.code.read(value, f"b{BITS[to.ty]}") for value in to.list(1))
    size = BITS[to.ty] // 8
    to.line(f"S.store('{to.parts[1]}', {to.address(0)}, [{values}], {size}, {to.mask}, {to.where}, {to.op!r})")


def _atomic(to: Operation) -> None:
    first = 1 if to.root == "atom" else 0
    kind = next(p for p in to.parts if p in ("add", "max", "min", "exch", "cas", "or", "and"))
    value = to.read(first + 1, f"u{BITS[to.ty]}")
    to.line(f"L = S.atomic({kind!r}, {to.address(first)}, {value}, {BITS[to.ty] // 8}, {to.mask}, {to.where})")
    if to.root == "atom":
        to.set("L")


def _shuffle(to: Operation) -> None:
    target, _, p = to[0].partition("|")
    to.line(
        f"L = S.shuffle('{to.parts[2]}', {to.read(1, 'b32')}, {to.read(2, 'u32')}, {to.read(3, 'u32')}, "
        f"{to.read(4, 'u32')}, {to.mask}, {to.where})"
    )
    to.set("L[0]", to=target.strip())
    if p:
        to.set("L[1]", to=p.strip())


def _reduce(to: Operation) -> None:
    to.line(
        f"L = S.redux({to.parts[2]!r}, {to.read(1)}, {to.read(2, 'u32')}, {to.mask}, {to.where}, "
        f"{'NaN' in to.parts}, {'abs' in to.parts})"
    )
    to.set("L")


def _load_matrix(to: Operation) -> None:
    if "trans" in to.parts:
        raise UnsupportedError(to.op)
    targets = to.list(0)
    to.line(f"L = S.ldmatrix({to.address(1)}, {len(targets)}, {to.mask}, {to.where})")
    for k, target in enumerate(targets):
        to.set(f"L[{k}]", to=target)


def _fence(to: Operation) -> None:
    to.line("S.fence()")


EXCHANGE: dict[str, Callable[[Operation], None]] = {
    "cp": _copy,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": _load_matrix,
    **dict.fromkeys(("membar", "fence", "nanosleep", "prefetch"), _fence),
}
