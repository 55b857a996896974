"""Elementwise functions of the kernels, exact in relative terms: softcapping, and logarithms near 1.

A logit x enters a kernel as v = x, or v = tanh(x / cap) with softcapping; what it stands for is multiplier * v.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Sums of logits are kept times this: however large these are, what as many as a vocabulary has add up to is finite.
TOTAL_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def tanh(y):
    """To 2 units in the last place: a polynomial (minimax, in relative error) below 5/8, 1 - 2 e / (1 + e) above."""
    w = y * y
    p = w * 0.0022115071769803762 - 0.008256388828158379
    p = p * w + 0.02173457480967045
    p = p * w - 0.05395335704088211
    p = p * w + 0.13333262503147125
    p = p * w - 0.3333333134651184
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    far = 1.0 - (e + e) * (1.0 / (1.0 + e))  # the quotient is `tanh_slope`'s, too
    return tl.where(tl.abs(y) < 0.625, y + y * (w * p), tl.where(y < 0.0, -far, far))


@triton.jit
def tanh_slope(u):
    """tanh'(u) = 4 e / (1 + e)^2, e = exp(-2 |u|): exact in relative terms, as 1 - tanh^2 is not."""
    e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
    half = 1.0 / (1.0 + e)
    return 4.0 * e * half * half


@triton.jit
def processed(x, inv_cap, HAS_CAP: tl.constexpr):
    """Logits as fp32 values v."""
    x = x.to(tl.float32)
    if HAS_CAP:
        x = tanh(x * inv_cap)
    return x


@triton.jit
def log1p(r):
    """log(1 + r) for r >= 0: 2 atanh(r / (2 + r)) as a series below 1/2."""
    a = r / (2.0 + r)
    b = a * a
    series = 2.0 * a * (1.0 + b * (1 / 3 + b * (1 / 5 + b * (1 / 7 + b * (1 / 9 + b * (1 / 11))))))
    return tl.where(r < 0.5, series, tl.log(1.0 + r))


@triton.jit
def one_minus_exp(t):
    """1 - e^t for t <= 0, by its series above -1/2."""
    c = 1 / 5 + t * (1 / 30 + t * (1 / 210 + t * (1 / 1680)))
    series = -t * (1.0 + t * (1 / 2 + t * (1 / 6 + t * (1 / 24) * (1.0 + t * c))))
    return tl.where(t > -0.5, series, 1.0 - tl.exp2(t * LOG2E))
