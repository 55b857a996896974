"""Instructions that compute: floats, halves, pairs of floats and integers, by the type that they name last."""

from __future__ import annotations

from collections.abc import Callable

from ptxemu.arithmetic import BITS, UnsupportedError
from ptxemu.emit import Operation
from ptxemu.values import widened

SIGNS = {"add": "+", "sub": "-", "mul": "*"}
OPERANDS = {"fma": 4, "mad": 4, "min": 4, "max": 4}  # at most, with the result; 3 for the rest
EXACT = {
    "rcp": "(1.0 / {}.astype('f8'))",
    "sqrt": "np.sqrt({}.astype('f8'))",
    "rsqrt": "(1.0 / np.sqrt({}.astype('f8')))",
}


def _compute(to: Operation) -> None:
    ty = to.ty
    if ty == "f32x2":
        to.set(f"pair_op({to.root!r}, {', '.join(to.read(k, 'b64') for k in range(1, len(to)))})")
    elif ty in ("bf16", "f16") and "f32" in to.parts:
        _mixed(to)
    elif ty in ("bf16", "bf16x2", "f16", "f16x2"):
        wide = "b32" if ty.endswith("x2") else "b16"
        to.set(f"half_op({to.root!r}, {ty!r}, {', '.join(to.read(k, wide) for k in range(1, len(to)))})")
    elif len(to) > OPERANDS.get(to.root, 3):
        raise UnsupportedError(f"{to.op} with {len(to)} operands")
    else:
        family = FLOATS if ty[0] == "f" else INTEGERS
        if to.root not in family:
            raise UnsupportedError(to.op)
        family[to.root](to)


def _mixed(to: Operation) -> None:
    """The first operand is half, and the second of a product; the rest fp32."""
    a = widened(to, 1, to.ty)
    if to.root == "fma":
        to.set(f"fma32({a}, {widened(to, 2, to.ty)}, {to.read(3, 'f32')})")
    else:
        to.set(f"({a} {SIGNS[to.root]} {to.read(2, 'f32')})")


def _flushed(to: Operation, *values: str) -> list[str]:
    return [f"ftz32({value})" if "ftz" in to.parts else value for value in values]


def _fma(to: Operation) -> None:
    a, b, c = _flushed(to, *(to.read(k) for k in (1, 2, 3)))
    to.set(*_flushed(to, f"fma{BITS[to.ty]}({a}, {b}, {c})"))


def _two_floats(to: Operation) -> None:
    a, b = _flushed(to, to.read(1), to.read(2))
    if to.root in SIGNS:
        e = f"({a} {SIGNS[to.root]} {b})"
    elif to.root == "div":
        exact = f"N.relative({a}.astype('f8') / {b}.astype('f8'), 2.0 ** -22.5).astype('f4')"
        e = f"({a} / {b})" if "rn" in to.parts else exact
    else:
        f = f"np.f{to.root}" if "NaN" not in to.parts else f"np.{to.root}imum"
        e = f"{f}({a}, {b})"
        if len(to) > 3:  # sm_100 has three operands
            e = f"{f}({e}, {to.read(3)})"
    if "sat" in to.parts:
        e = f"np.clip({e}, np.float32(0), np.float32(1))"
    to.set(*_flushed(to, e))


def _negative(to: Operation) -> None:
    to.set(f"(-{to.read(1)})")


def _absolute(to: Operation) -> None:
    to.set(f"np.abs({to.read(1)})")


def _copysign(to: Operation) -> None:
    to.set(f"np.copysign({to.read(2)}, {to.read(1)})")


def _ex2(to: Operation) -> None:
    to.set(f"ex2(N, {to.read(1)}, {'ftz' in to.parts})")


def _lg2(to: Operation) -> None:
    to.set(f"np.log2({to.read(1)}.astype('f8')).astype('f4')")


def _tanh(to: Operation) -> None:
    to.set(f"N.relative(np.tanh({to.read(1)}.astype('f8')), 2.0 ** -11).astype('f4')")


def _root_or_reciprocal(to: Operation) -> None:
    a, approximate = to.read(1), "approx" in to.parts
    if to.ty == "f64" and approximate:  # 20 bits of mantissa
        to.set(f"rcp_approx64({a})")
    else:
        error = 2.0**-23 if approximate else 0.0
        to.set(f"N.relative({EXACT[to.root].format(a)}, {error}).astype('f{BITS[to.ty] // 8}')")


def _sum(to: Operation) -> None:
    ty = f"u{BITS[to.ty]}"
    to.set(f"({to.read(1, ty)} {SIGNS[to.root]} {to.read(2, ty)})")


def _extreme(to: Operation) -> None:
    extreme = f"np.{to.root}imum({to.read(1)}, {to.read(2)})"
    to.set(f"np.maximum({extreme}, 0)" if "relu" in to.parts else extreme)


def _quotient(to: Operation) -> None:
    if to.ty[0] != "u":
        to.set(f"c{to.root}({to.read(1)}, {to.read(2)})")
        return
    b = to.read(2)
    to.set(f"({to.read(1)} {'//' if to.root == 'div' else '%'} np.where({b} == 0, np.ones_like({b}), {b}))")


def _product(to: Operation) -> None:
    a, b, bits, signed = to.read(1), to.read(2), BITS[to.ty], to.ty[0] == "s"
    if "wide" in to.parts:
        wide = f"{'i' if signed else 'u'}{bits // 4}"
        e, as_unsigned, sum_bits = f"({a}.astype('{wide}') * {b}.astype('{wide}'))", f".view('u{bits // 4}')", 2 * bits
    elif "lo" in to.parts:
        e, as_unsigned, sum_bits = f"({to.read(1, f'u{bits}')} * {to.read(2, f'u{bits}')})", "", bits
    else:
        e, as_unsigned, sum_bits = f"mulhi{bits}({a}, {b}, {signed})", f".view('u{bits // 8}')", bits
    if to.root == "mad":
        e = f"({e}{as_unsigned} + {to.read(3, f'u{sum_bits}')})"
    to.set(e)


FLOATS: dict[str, Callable[[Operation], None]] = {
    "fma": _fma,
    **dict.fromkeys((*SIGNS, "div", "min", "max"), _two_floats),
    "neg": _negative,
    "abs": _absolute,
    "copysign": _copysign,
    "ex2": _ex2,
    "lg2": _lg2,
    "tanh": _tanh,
    **dict.fromkeys(EXACT, _root_or_reciprocal),
}
INTEGERS: dict[str, Callable[[Operation], None]] = {
    **dict.fromkeys(("add", "sub"), _sum),
    "neg": _negative,
    "abs": _absolute,
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("div", "rem"), _quotient),
    **dict.fromkeys(("mul", "mad"), _product),
}
CALCULATIONS = dict.fromkeys((*FLOATS, *INTEGERS), _compute)
