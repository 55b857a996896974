"""What PTX instructions compute, on NumPy vectors of one value a thread."""

from __future__ import annotations

import re

import numpy as np

NP = {
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
    "s8": "i1",
    "s16": "i2",
    "s32": "i4",
    "s64": "i8",
    "u8": "u1",
    "u16": "u2",
    "u32": "u4",
    "u64": "u8",
    "b8": "u1",
    "b16": "u2",
    "b32": "u4",
    "b64": "u8",
}
BITS = {t: int(re.sub(r"\D", "", t)) for t in NP}

U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class UnsupportedError(NotImplementedError):
    pass


def fma32(a, b, c):
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def fma64(a, b, c):
    a, b, c = np.broadcast_arrays(a, b, c)
    p = a * b
    k = np.float64(134217729.0)
    ca, cb = k * a, k * b
    ah = ca - (ca - a)
    al = a - ah
    bh = cb - (cb - b)
    bl = b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    t = s - p
    f = (p - (s - t)) + (c - t)
    r = s + (e + f)
    return np.where(np.isfinite(r) & np.isfinite(e), r, s)


def ftz32(x):
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.float32(1.1754943508222875e-38), np.copysign(np.float32(0), x), x)


def bf16_to_f32(x):
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    u = np.asarray(x, np.float32).view(np.uint32)
    r = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def f32_to_f16(x):
    return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def cdiv(a, b):
    """Integer division towards zero."""
    b = np.where(b == 0, np.ones_like(b), b)
    q = a // b
    return np.where((a % b != 0) & ((a < 0) != (b < 0)), q + 1, q).astype(np.result_type(a, b))


def crem(a, b):
    return (a - cdiv(a, b) * b).astype(np.result_type(a, b))


def shl(x, n, bits):
    n = np.asarray(n).astype(np.uint64)
    return np.where(n >= bits, np.zeros((), x.dtype), x << np.minimum(n, np.uint64(bits - 1)).astype(x.dtype))


def shr(x, n, bits, signed):
    n = np.minimum(np.asarray(n).astype(np.uint64), np.uint64(bits))
    last = np.minimum(n, np.uint64(bits - 1)).astype(x.dtype)
    if signed:
        return x >> last
    return np.where(n >= bits, np.zeros((), x.dtype), x >> last)


def mulhi32(a, b, signed):
    t = np.int64 if signed else np.uint64
    return ((a.astype(t) * b.astype(t)) >> t(32)).astype(np.int32 if signed else np.uint32)


def mulhi64(a, b, signed):
    f = np.frompyfunc(lambda x, y: (int(x) * int(y)) >> 64, 2, 1)
    return np.asarray(f(a, b)).astype(np.int64 if signed else np.uint64)


def to_int(x, dtype, how):
    """Float to integer with saturation; NaN gives 0 (as the hardware for 32 bits)."""
    x = np.asarray(x)
    r = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(np.float64))
    info = np.iinfo(dtype)
    r = np.where(np.isnan(r), 0.0, r)
    out = np.clip(r, float(info.min), float(info.max))
    big = r >= float(info.max)
    return np.where(big, np.array(info.max, dtype), np.where(big, 0, out).astype(dtype))


class Noise:
    """Errors of the approximate instructions, drawn within what NVIDIA documents; none with seed None."""

    def __init__(self, seed: int | None) -> None:
        self.rng = None if seed is None else np.random.default_rng(seed)

    def relative(self, x, amount: float, exact=None):
        x64 = np.asarray(x, np.float64)
        if self.rng is None:
            return x64
        e = 1.0 + amount * self.rng.uniform(-1.0, 1.0, x64.shape)
        return np.where(exact, x64, x64 * e) if exact is not None else x64 * e


def merge(mask, new, old):
    if old is None:
        old = np.zeros((), np.asarray(new).dtype)
    return np.where(mask, new, old)


def lop3(a, b, c, table):
    out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def prmt(a, b, sel):
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast(a, b, sel).shape, np.uint32)
    for k in range(4):
        s = (sel >> np.uint32(4 * k)) & np.uint32(0xF)
        byte = ((both >> ((s & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(s & np.uint32(8), np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
        out |= byte << np.uint32(8 * k)
    return out


def bfe(x, pos, length, bits, signed):
    pos, length = (np.minimum(np.asarray(n).astype(np.int64) & 0xFF, bits) for n in (pos, length))
    wide = np.asarray(x).astype(np.int64)  # sign-extended where x is signed
    last = np.minimum(pos + length - 1, bits - 1)  # the field's highest bit
    width = np.where(length == 0, 0, np.maximum(last - pos + 1, 0))
    unsigned = wide.view(np.uint64) >> np.minimum(pos, 63).astype(np.uint64)
    full = np.uint64(0xFFFFFFFFFFFFFFFF)
    mask = np.where(width >= 64, full, (np.uint64(1) << np.minimum(width, 63).astype(np.uint64)) - np.uint64(1))
    field = np.where(pos >= bits, np.uint64(0), unsigned & mask)
    if signed:
        negative = (length > 0) & ((wide >> np.maximum(last, 0)) & 1 == 1)
        field = np.where(negative, field | ~mask, field)
    return field.astype(U[bits]).view(np.asarray(x).dtype)


def shf(lo, hi, n, left, wrap):
    n = n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))
    both = lo.astype(np.uint64) | (hi.astype(np.uint64) << np.uint64(32))
    if left:
        return ((both << n.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return (both >> n.astype(np.uint64)).astype(np.uint32)


def ex2(noise, a, ftz):
    a = np.asarray(a, np.float32)
    r = np.exp2(a.astype(np.float64))
    r = noise.relative(r, 2.0**-22.5, a == np.rint(a)).astype(np.float32)
    return ftz32(r) if ftz else r


def rcp_approx64(a):
    r = 1.0 / np.asarray(a, np.float64)
    u = r.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return u.view(np.float64)


def pair_op(root, *args):
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}[root]
    halves = []
    for shift in (0, 32):
        x = [(np.asarray(a) >> np.uint64(shift)).astype(np.uint32).view(np.float32) for a in args]
        halves.append(np.asarray(operation(*x), np.float32).view(np.uint32).astype(np.uint64))
    return halves[0] | (halves[1] << np.uint64(32))


def half_op(root, ty, *args):
    if ty.endswith("x2"):
        lo = half_op(root, ty[:-2], *[(a & np.uint32(0xFFFF)).astype(np.uint16) for a in args])
        hi = half_op(root, ty[:-2], *[(a >> np.uint32(16)).astype(np.uint16) for a in args])
        return lo.astype(np.uint32) | (hi.astype(np.uint32) << np.uint32(16))
    up = bf16_to_f32 if ty == "bf16" else (lambda a: a.view(np.float16).astype(np.float32))
    down = f32_to_bf16 if ty == "bf16" else f32_to_f16
    operation = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "fma": fma32,
        "max": np.fmax,
        "min": np.fmin,
        "neg": np.negative,
        "abs": np.abs,
    }[root]
    return np.asarray(down(operation(*(up(a) for a in args))))


HELPERS = {
    f.__name__: f
    for f in (
        pair_op,
        half_op,
        fma32,
        fma64,
        ftz32,
        bf16_to_f32,
        f32_to_bf16,
        f32_to_f16,
        cdiv,
        crem,
        shl,
        shr,
        mulhi32,
        mulhi64,
        to_int,
        lop3,
        prmt,
        bfe,
        shf,
        ex2,
        rcp_approx64,
    )
}
