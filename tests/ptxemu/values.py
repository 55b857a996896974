"""Instructions that move, choose, compare and convert values, and those that work on their bits."""

from __future__ import annotations

from collections.abc import Callable

from ptxemu.arithmetic import BITS, NP
from ptxemu.emit import Operation

BITWISE = {"and": "&", "or": "|", "xor": "^"}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARED_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ROUNDED = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}


def _move(to: Operation) -> None:
    if to[0].startswith("{"):
        bits, targets = BITS[to.ty], to.list(0)
        part = bits // len(targets)
        to.line(f"L = {to.read(1, f'b{bits}')}")
        for k, target in enumerate(targets):
            if target != "_":
                to.set(f"(L >> np.uint{bits}({k * part})).astype('u{part // 8}')", to=target)
    elif to[1].startswith("{"):
        bits, values = BITS[to.ty], to.list(1)
        part = bits // len(values)
        terms = [
            f"({to.code.read(value, f'b{part}')}.astype('u{bits // 8}') << np.uint{bits}({k * part}))"
            for k, value in enumerate(values)
        ]
        to.set(" | ".join(terms))
    else:
        to.set(to.read(1, "pred" if to.ty == "pred" else f"b{BITS[to.ty]}"))


def _address(to: Operation) -> None:
    to.set(to.read(1, "b64"))


def _choose(to: Operation) -> None:
    bits = f"b{BITS[to.ty]}"
    to.set(f"np.where({to.read(3, 'pred')}, {to.read(1, bits)}, {to.read(2, bits)})")


def _compare(to: Operation) -> None:
    how, ty = to.parts[1], f"u{BITS[to.ty]}" if to.ty[0] == "b" else to.ty
    target, _, second = to[0].partition("|")
    a, b = to.read(1, ty), to.read(2, ty)
    if ty[0] != "f":
        e = f"({a} {COMPARED[COMPARED_UNSIGNED.get(how, how)]} {b})"
    else:
        nan = f"(np.isnan({a}) | np.isnan({b}))"
        if how in COMPARED:
            e = f"({a} {COMPARED[how]} {b})" if how != "ne" else f"(({a} != {b}) & ~{nan})"
        elif how == "num":
            e = f"(~{nan})"
        elif how == "nan":
            e = nan
        else:
            e = f"(({a} {COMPARED[how[:2]]} {b}) | {nan})"
    boolean = next((p for p in to.parts[2:-1] if p in BITWISE), None)
    if second:
        to.set(f"(~{e})", to=second.strip())
    if boolean:
        other = f"(~{to.code.read(to[3][1:], 'pred')})" if to[3].startswith("!") else to.read(3, "pred")
        e = f"({e} {BITWISE[boolean]} {other})"
    to.set(e, to=target.strip())


def _convert(to: Operation) -> None:
    dst, src = to.parts[-2:]
    if dst in ("bf16x2", "f16x2"):
        f = "f32_to_bf16" if dst[0] == "b" else "f32_to_f16"
        hi, lo = to.read(1, "f32"), to.read(2, "f32")
        to.set(f"((np.asarray({f}({hi})).astype('u4') << np.uint32(16)) | np.asarray({f}({lo})).astype('u4'))")
    elif dst in ("bf16", "f16"):
        to.set(f"f32_to_{dst}({to.read(1, 'f32')})")
    elif src == "bf16" or (src == "f16" and dst == "f32"):
        to.set(widened(to, 1, src))
    elif dst[0] == "f":
        how = next((p for p in to.parts if p in ROUNDED), None)
        rounded = how is not None and src[0] == "f"
        to.set(f"np.{ROUNDED[how]}({to.read(1)})" if rounded else f"{to.read(1)}.astype('{NP[dst]}')")
    elif src[0] == "f":
        how = next((p for p in to.parts if p in ("rn", "rz", "rm", "rp", *ROUNDED)), None)
        to.set(f"to_int({to.read(1)}, '{NP[dst]}', '{how}')", dst)
    elif BITS[dst] >= BITS[src]:
        to.set(f"{to.read(1)}.astype('{'i' if src[0] == 's' else 'u'}{BITS[dst] // 8}')", dst)
    else:
        to.set(f"{to.read(1)}.astype('{NP[dst]}')", dst)


def widened(to: Operation, index: int, ty: str) -> str:
    """Expression in fp32 of an operand of half precision."""
    bits = to.read(index, "b16")
    return f"bf16_to_f32({bits})" if ty == "bf16" else f"{bits}.view('f2').astype('f4')"


def _bitwise(to: Operation) -> None:
    a = to.read(1)
    to.set(f"(~{a})" if to.root == "not" else f"({a} {BITWISE[to.root]} {to.read(2)})")


def _lop3(to: Operation) -> None:
    a, b, c = (to.read(index, "b32") for index in (1, 2, 3))
    to.set(f"lop3({a}, {b}, {c}, {int(to[4], 0)})")


def _permute(to: Operation) -> None:
    to.set(f"prmt({to.read(1, 'b32')}, {to.read(2, 'b32')}, {to.read(3, 'b32')})")


def _shift_left(to: Operation) -> None:
    n = to.read(2, "u32")
    to.set(f"shl({to.read(1, f'u{BITS[to.ty]}')}, {n}, {BITS[to.ty]})")


def _shift_right(to: Operation) -> None:
    n = to.read(2, "u32")
    ty = to.ty if to.ty[0] != "b" else f"u{BITS[to.ty]}"
    to.set(f"shr({to.read(1, ty)}, {n}, {BITS[to.ty]}, {to.ty[0] == 's'})")


def _extract(to: Operation) -> None:
    to.set(f"bfe({to.read(1)}, {to.read(2, 'u32')}, {to.read(3, 'u32')}, {BITS[to.ty]}, {to.ty[0] == 's'})")


def _funnel(to: Operation) -> None:
    lo, hi, n = (to.read(index, "u32") for index in (1, 2, 3))
    to.set(f"shf({lo}, {hi}, {n}, {to.parts[1] == 'l'}, {to.parts[2] == 'wrap'})")


VALUES: dict[str, Callable[[Operation], None]] = {
    "mov": _move,
    "cvta": _address,
    "selp": _choose,
    "setp": _compare,
    "cvt": _convert,
    **dict.fromkeys((*BITWISE, "not"), _bitwise),
    "lop3": _lop3,
    "prmt": _permute,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _extract,
    "shf": _funnel,
}
