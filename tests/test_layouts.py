"""Every tensor argument of every public function in every memory layout: results and gradients are those of contiguous
tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from public_calls import CALLS, Call
from torch import Tensor

pytestmark = pytest.mark.usefixtures("nan_poisoned")


def strided(x: Tensor) -> Tensor:
    """No two elements side by side, in any dimension."""
    gap = x.new_full([2 * n for n in x.shape], torch.nan if x.is_floating_point() else 1)
    return gap[(slice(None, None, 2),) * x.ndim].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The first dimension runs fastest."""
    reverse = list(reversed(range(x.ndim)))
    return x.permute(reverse).contiguous().permute(reverse)


def offset(x: Tensor) -> Tensor:
    """Off every alignment but the element's own."""
    return x.new_empty(x.numel() + 3)[1 : x.numel() + 1].view(x.shape).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first entry for all of the first dimension, at a stride of 0."""
    return x[:1].clone().expand(x.shape) if x.ndim else x


def broadcast(x: Tensor) -> Tensor:
    """One entry for all, at strides of 0."""
    return x.flatten()[:1].clone().reshape([1] * x.ndim).expand(x.shape)


UPSTREAM = "the upstream gradient"
Layout = Callable[[Tensor], Tensor]


def layouts_of(name: str, tensor: Tensor | None) -> tuple[Layout, ...]:
    if name == "cu_seqlens":  # boundaries of any token are not all the same number
        return strided, offset
    if name == "ref_probs":  # a distribution in each row
        return strided, offset, expanded, transposed
    one_dimension = tensor is not None and tensor.ndim == 1
    return (strided, offset, expanded) if one_dimension else (strided, offset, expanded, transposed, broadcast)


def arguments() -> Iterator[Any]:
    for call in CALLS:
        for backend in call.backends or ("",):
            # The interpreter is slow, and beside these functions no other touches a kernel of Triton's.
            if backend == "triton" and "token_logps-padded" not in str(call):
                continue
            tensors = call.make(4)
            for name in (*tensors, UPSTREAM):
                for layout in layouts_of(name, tensors.get(name)):
                    given = {"backend": backend} if backend else {}
                    yield pytest.param(call, name, given, layout, id=f"{call}-{backend}-{name}-{layout.__name__}")


def results(call: Call, tensors: dict[str, Tensor], options: dict[str, Any], layout: Layout) -> list[Tensor]:
    """What comes out, and the gradients under an upstream gradient of a layout."""
    outputs = call.run(tensors, options)
    inputs = [tensors[name] for name in call.gradients]
    differentiable = [x for x in outputs if x.requires_grad]
    upstream = [layout(torch.linspace(1.0, 2.0, x.numel()).view(x.shape).to(x.dtype)) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, inputs, upstream) if inputs else ()
    return [x.detach() for x in (*outputs, *gradients)]


@pytest.mark.parametrize(("call", "name", "backend", "layout"), arguments())
def test_layout(call: Call, name: str, backend: dict[str, str], layout: Layout) -> None:
    options = call.options(0) | backend
    tensors = call.inputs(3 if backend.get("backend") == "triton" else 4)  # the interpreter is slow
    if name == UPSTREAM:
        actual = results(call, tensors, options, layout)
        expected = results(call, tensors, options, lambda x: layout(x).contiguous())
    else:
        given = layout(tensors[name].detach())
        copy = given.clone(memory_format=torch.contiguous_format)
        actual, expected = (
            results(call, tensors | {name: x.requires_grad_(name in call.gradients)}, options, Tensor.contiguous)
            for x in (given, copy)
        )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
