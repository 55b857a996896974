"""The emulator itself: small kernels against NumPy, and deliberate bugs that it must name."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ptxemu.arithmetic import bfe
from ptxemu.common import Check, install, options

given = options(__doc__.splitlines()[0])
executor = install(given)


@triton.jit
def add(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z_ptr + i, tl.load(x_ptr + i, mask=i < n) + tl.load(y_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x_ptr, z_ptr, n, stride, B: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x_ptr + row * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(z_ptr + row * n + i, (e / tl.sum(e, axis=0)).to(z_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def reduce_rows(x_ptr, z_ptr, R: tl.constexpr, C: tl.constexpr):
    v = tl.load(x_ptr + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(z_ptr + tl.arange(0, C), tl.sum(v, axis=0))
    tl.store(z_ptr + C + tl.arange(0, C), tl.max(v, axis=0))


@triton.jit
def integers(a_ptr, b_ptr, z_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    x, y = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(z_ptr + i, x // y)
    tl.store(z_ptr + B + i, x % y)
    tl.store(z_ptr + 2 * B + i, x * y)
    tl.store(z_ptr + 3 * B + i, x >> 3)
    tl.store(z_ptr + 4 * B + i, tl.minimum(x, y) ^ (x & y))
    tl.store(z_ptr + 5 * B + i, (x.to(tl.int64) * y.to(tl.int64) >> 7).to(tl.int32))


@triton.jit
def loop(x_ptr, z_ptr, n, B: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for k in range(0, n + row, B):
        i = k + tl.arange(0, B)
        total += tl.sum(tl.load(x_ptr + i, mask=i < n + row, other=0.0), axis=0)
    if row % 2 == 0:
        tl.store(z_ptr + row, total)
        return
    tl.store(z_ptr + row, -tl.log(total * total + 1.0) * tl.sqrt(total * total))


@triton.jit
def cumulative_sum(x_ptr, z_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(z_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


@triton.jit
def wrongly_aligned(x_ptr, z_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(z_ptr + i, tl.load(tl.max_contiguous(tl.multiple_of(x_ptr + 1 + i, 16), B)))


@triton.jit
def racy(x_ptr, z_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x_ptr)  # every warp reads what the first one overwrites, without a barrier
    tl.store(x_ptr, v + 1.0)
    tl.store(z_ptr + i, tl.load(x_ptr + 1 + i) + v)


gen = torch.Generator().manual_seed(0)


def check_elementwise(check: Check) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64):
        for n in (1, 1000, 4096):
            x, y = ((torch.randn(n, generator=gen) * 50).to(dtype) for _ in range(2))
            z = torch.zeros_like(x)
            add[(triton.cdiv(n, 512),)](x, y, z, n, B=512)
            check.close(("add", dtype, n), "sum", z, x + y, 0.0, 1e-30)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, B, warps in ((31, 32, 1), (1000, 1024, 4), (4096, 4096, 8), (3000, 4096, 16)):
            x = (torch.randn(5, n + 3, generator=gen) * 3).to(dtype)[:, 1 : n + 1]
            z = torch.zeros(5, n, dtype=dtype)
            softmax[(5,)](x, z, n, x.stride(0), B=B, num_warps=warps)
            rtol = 1e-5 if dtype == torch.float32 else 1e-2
            check.close(("softmax", dtype, n), "softmax", z, x.double().softmax(-1), rtol, 1e-7)


def check_reductions(check: Check) -> None:
    for warps in (1, 2, 4, 8):
        x, z = torch.randn(64, 128, generator=gen), torch.zeros(256)
        reduce_rows[(1,)](x, z, 64, 128, num_warps=warps)
        check.close(("rows", warps), "sum", z[:128], x.double().sum(0), 1e-4, 1e-5)
        check.close(("rows", warps), "maximum", z[128:], x.double().amax(0), 0.0, 1e-30)
    x, z = torch.rand(2000, generator=gen), torch.full((16,), torch.nan)
    loop[(16,)](x, z, 1500, B=256)
    total = torch.stack([x[: 1500 + k].double().sum() for k in range(16)])
    truth = torch.where(torch.arange(16) % 2 == 0, total, -torch.log(total * total + 1) * total)
    check.close("loop", "loop", z, truth, 1e-5, 1e-30)
    x, z = torch.randn(512, generator=gen), torch.zeros(512)
    cumulative_sum[(1,)](x, z, 512)
    check.close("cumsum", "cumsum", z, x.double().cumsum(0), 1e-4, 2e-4)


def check_integers(check: Check) -> None:
    a = torch.randint(-(2**31), 2**31 - 1, (256,), generator=gen)
    b = torch.randint(1, 1000, (256,), generator=gen) * torch.where(torch.rand(256, generator=gen) < 0.5, -1, 1)
    z = torch.zeros(6, 256, dtype=torch.int32)
    integers[(1,)](a.int(), b.int(), z, 256)
    quotient = torch.div(a, b, rounding_mode="trunc")
    truth = [quotient, a - quotient * b, a * b, a >> 3, torch.minimum(a, b) ^ (a & b), (a * b) >> 7]
    check.close("integers", "integers", z, torch.stack(truth).int(), 0.0, 1e-30)
    # Bit fields, as the PTX manual defines them, bit by bit.
    for dtype, bits in ((np.int32, 32), (np.uint32, 32), (np.int64, 64), (np.uint64, 64)):
        signed = dtype in (np.int32, np.int64)
        for value in (0, 1, 0x5A5A5A5A, 2 ** (bits - 1), 2**bits - 3):
            for position, length in ((0, 0), (0, 8), (3, 5), (bits - 1, 1), (bits - 4, 9), (0, bits), (bits + 5, 4)):
                bit = [value >> k & 1 for k in range(bits)]
                fill = bit[min(position + length - 1, bits - 1)] if signed and length else 0
                field = [bit[position + k] if k < length and position + k < bits else fill for k in range(bits)]
                truth = sum(one << k for k, one in enumerate(field))
                x = np.array([value], f"u{bits // 8}").view(dtype)
                found = int(bfe(x, np.uint32(position), np.uint32(length), bits, signed).view(f"u{bits // 8}")[0])
                text = f"{found:#x} instead of {truth:#x}"
                check.expect(("bfe", dtype.__name__, hex(value), position, length), found == truth, text)


def check_state_spaces(check: Check) -> None:
    """`.shared::cta` is what `.shared` alone means; Triton 3.9 writes either."""
    plant = executor.plant or str
    executor.plant = lambda text: plant(text).replace(".shared.", ".shared::cta.")
    executor.machines.clear()
    check_reductions(check)
    executor.plant = plant
    executor.machines.clear()


def check_bugs_are_named(check: Check) -> None:
    """Each bug alone, and what it must be called."""

    def bugs() -> set[str]:
        return {kind for record in executor.take() for kind in record.problems.kinds() if not kind.startswith("note")}

    def rand(n: int) -> Tensor:
        return torch.randn(n, generator=gen)

    wrongly_aligned[(1,)](rand(600), torch.zeros(512), 512)
    check.expect("an address off its alignment", bugs() == {"misaligned"}, "was not named")
    add[(1,)](rand(100), rand(100), torch.zeros(100), 200, B=512)
    check.expect("beyond the end", bugs() == {"out of bounds"}, "was not named")
    add[(1,)](rand(100)[:50], rand(50), torch.zeros(50), 64, B=512)
    check.expect("beyond a view", bugs() == {"out of bounds", "outside the tensor"}, "was not named")
    racy[(1,)](rand(4096), torch.zeros(1024), 1024, num_warps=8)
    check.expect("a race", "race (write after read)" in bugs(), "was not named")


def main() -> None:
    check = Check(executor, stop_early=given.plant is not None)
    for part in (check_elementwise, check_reductions, check_integers, check_state_spaces):
        part(check)
        check.launched(part.__name__)
    check_bugs_are_named(check)
    check.finish()


if __name__ == "__main__":
    main()
