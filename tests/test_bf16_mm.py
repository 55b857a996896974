"""The CPU's product of bf16 factors with fp32 sums: exact where it can be, and within its memory."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dil_kernels.ops.products import multiplies_bf16

pytestmark = pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has no AVX512_BF16")

shapes = st.tuples(st.integers(0, 50), st.integers(0, 200), st.integers(0, 1100))


def bf16_mm(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    torch.ops.dil_kernels.bf16_mm(out, a, b, add)
    return out


def integers(*shape: int, gen: torch.Generator, columns_first: bool = False) -> Tensor:
    """Small ones, whose products and sums are exact in fp32."""
    shape = shape[::-1] if columns_first else shape
    x = torch.randint(-15, 16, shape, generator=gen).bfloat16()
    return x.t() if columns_first else x


@settings(max_examples=150)
@given(shape=shapes, layout=st.tuples(*[st.booleans()] * 3), gap=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_exact_for_small_integers(shape: tuple[int, ...], layout: tuple[bool, ...], gap: int, seed: int) -> None:
    (M, N, K), (a_columns, b_columns, add), gen = shape, layout, torch.Generator().manual_seed(seed)
    a, b = integers(M, K, gen=gen, columns_first=a_columns), integers(K, N, gen=gen, columns_first=b_columns)
    whole = torch.randint(-99, 100, (M, N + gap), generator=gen).float()
    before = whole.clone()
    bf16_mm(whole[:, :N], a, b, add=add)
    expected = a.double() @ b.double() + (before[:, :N] if add else 0)
    assert torch.equal(whole[:, :N].double(), expected)
    assert torch.equal(whole[:, N:], before[:, N:])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(300, 700, 64), (3000, 70, 64), (7, 1000, 300), (100, 1300, 1200)])
def test_however_the_work_is_shared_out(threads: int, shape: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(0)
    M, N, K = shape
    a, b = integers(M, K, gen=gen), integers(K, N, gen=gen)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = bf16_mm(torch.full((M, N), math.nan), a, b)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out.double(), a.double() @ b.double())


@settings(max_examples=30)
@given(shape=shapes, exponents=st.tuples(st.integers(-20, 20), st.integers(-20, 20)), seed=st.integers(0, 2**32))
def test_sums_have_the_precision_of_fp32(shape: tuple[int, ...], exponents: tuple[int, int], seed: int) -> None:
    (M, N, K), gen = shape, torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(M, K, generator=gen) * 2.0 ** exponents[0],
        torch.randn(K, N, generator=gen) * 2.0 ** exponents[1],
    )
    a, b = a.bfloat16(), b.bfloat16()
    truth, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # Blocks of at most 576 along K, each a chain of additions that round to nearest.
    additions = min(K, 576) + K // 576 + 1
    error = (bf16_mm(torch.empty(M, N), a, b).double() - truth).abs()
    assert (error <= additions * 2.0**-24 * magnitude).all()


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = integers(20, 33, gen=gen), integers(33, 70, gen=gen)
    a[3, 32], a[9, 0], b[5, 69] = math.nan, math.inf, -math.inf
    out = bf16_mm(torch.empty(20, 70), a, b)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=0, atol=0, equal_nan=True)
    assert out[torch.tensor([0, 1, 2, 4, 19])][:, :69].isfinite().all()


def guarded(*shape: int, dtype: torch.dtype, at_end: bool) -> Tensor:
    """A tensor that begins or ends where a page does whose neighbour may not be touched."""
    count, page = math.prod(shape), mmap.PAGESIZE
    pages = -(-count * dtype.itemsize // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = (pages + 1) * page - count * dtype.itemsize if at_end else page
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 150), st.integers(1, 1100)),
    layout=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**32),
)
def test_nothing_beyond_the_operands_is_touched(
    shape: tuple[int, int, int], layout: tuple[bool, bool, bool], seed: int
) -> None:
    """Reading or writing one element more would end the process."""
    (M, N, K), (a_columns, b_columns, at_end), gen = shape, layout, torch.Generator().manual_seed(seed)
    a_shape, b_shape = (K, M) if a_columns else (M, K), (N, K) if b_columns else (K, N)
    a, b = (guarded(*s, dtype=torch.bfloat16, at_end=at_end) for s in (a_shape, b_shape))
    a.copy_(integers(*a_shape, gen=gen))
    b.copy_(integers(*b_shape, gen=gen))
    a, b = a.t() if a_columns else a, b.t() if b_columns else b
    out = guarded(M, N, dtype=torch.float32, at_end=at_end)
    assert torch.equal(bf16_mm(out, a, b).double(), a.double() @ b.double())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_strides_of_what_is_there_once_mean_nothing(shape: tuple[int, int]) -> None:
    gen = torch.Generator().manual_seed(0)
    a, other = integers(*shape, gen=gen), integers(4, shape[1], gen=gen)
    strided = torch.zeros(50).bfloat16().as_strided(shape, [5 if size == 1 else 3 for size in shape]).copy_(a)
    assert torch.equal(bf16_mm(torch.empty(shape[0], 4), strided, other.t()).double(), a.double() @ other.double().t())
    assert torch.equal(bf16_mm(torch.empty(4, shape[0]), other, strided.t()).double(), other.double() @ a.double().t())


def test_opcheck() -> None:
    gen = torch.Generator().manual_seed(0)
    inputs = (torch.zeros(3, 5), integers(3, 8, gen=gen), integers(8, 5, gen=gen), True)
    torch.library.opcheck(torch.ops.dil_kernels.bf16_mm.default, inputs)


@pytest.mark.parametrize(
    ("out", "a", "b", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4, 5), "a must be a bf16 CPU matrix"),
        (torch.zeros(3, 5), torch.zeros(3, 8).bfloat16()[:, ::2], torch.zeros(4, 5).bfloat16(), "a must have"),
        (torch.zeros(1, 5).expand(3, 5), torch.zeros(3, 4).bfloat16(), torch.zeros(4, 5).bfloat16(), "out must be"),
        (torch.zeros(3, 5), torch.zeros(3, 4).bfloat16(), torch.zeros(3, 5).bfloat16(), "do not multiply"),
        (torch.zeros(3, 6), torch.zeros(3, 4).bfloat16(), torch.zeros(4, 5).bfloat16(), "out must be"),
        (torch.zeros(3, 5).double(), torch.zeros(3, 4).bfloat16(), torch.zeros(4, 5).bfloat16(), "out must be"),
    ],
)
def test_bad_operands(out: Tensor, a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        bf16_mm(out, a, b)
