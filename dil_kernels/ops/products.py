"""Matrix products with wider sums than factors, where the machine has them: GPUs, and CPUs with AVX512_BF16."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dil_kernels.backends import load_extension
from dil_kernels.ops import Op

Op(  # out [M, N] fp32 = a [M, K] @ b [K, N], both bf16, or += ; see `multiplies_bf16`
    "bf16_mm(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()",
    lambda *_: None,
)

Op("head_memory(Tensor(a!) fresh) -> ()", lambda *_: None)  # on the CPU: advice that costs and changes nothing


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has a product of bf16 factors with fp32 sums, which PyTorch has on GPUs only."""
    extension = load_extension()
    return extension is not None and bool(extension.has_bf16_product())


def operand_dtype(dtype: torch.dtype, *, cuda: bool) -> torch.dtype:
    """Of the factors of a head of `dtype`: wide ones where there is no product of narrow ones with wide sums."""
    if cuda or dtype == torch.float64 or (dtype == torch.bfloat16 and multiplies_bf16()):
        return dtype
    return torch.float32


def product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b with accumulation in the dtype of `out`."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if not out.is_cuda:
        torch.ops.dil_kernels.bf16_mm(out, a, b, False)
        return out
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, likewise."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    if not out.is_cuda:
        torch.ops.dil_kernels.bf16_mm(out, a, b, True)
        return out
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def new_result(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for a large result [rows, columns], in large pages where the CPU's system gives them."""
    result = like.new_empty(rows, columns)
    if not result.is_cuda and load_extension() is not None:
        torch.ops.dil_kernels.head_memory(result)
    return result
