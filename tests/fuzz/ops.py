"""Bytes as a call of a public function, with other shapes, strides, offsets, dtypes, values and options than it has.

Each call is one that works, of which a few things are changed. C++ and eager PyTorch must refuse the same calls, with
an error of the same kind, and else agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from public_calls import CALLS, Call
from torch import Tensor

BACKENDS = ("cpp", "eager")
REFUSALS = (ValueError, TypeError, NotImplementedError)
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)
VALUES = (0.0, -0.0, 1.0, -1.0, 1e-40, 1e30, 3e38, math.inf, -math.inf, math.nan, 0.5, 65504.0)
INTEGERS = (0, 1, -1, -100, 2**31 - 1, 2**31, -(2**63), 2**63 - 1, 14, 15, 16, 255)
OPTIONS = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    0.0,
    0.5,
    1.0,
    -2.0,
    1e-38,
    1e38,
    math.inf,
    math.nan,
    "mean",
    "",
    [0.1, 0.2],
)
SIZES = (2, 3, 4, 5, 8, 17)


class Bytes:
    """Choices, one after another; zeros once the bytes are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def choice(self, options: Any) -> Any:
        value = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return options[value % len(options)]

    def number(self, below: int) -> int:
        return int(self.choice(range(below)))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def one_input(data: bytes) -> None:
    """A call, changed, by both backends."""
    choose = Bytes(data)
    call: Call = choose.choice(CALLS)
    size, turn = choose.choice(SIZES), choose.number(3)
    tensors = {name: x.detach() for name, x in call.inputs(size, turn).items()}
    options = call.options(turn)
    for _ in range(6):
        if not choose.left:
            break
        if choose.number(4) == 0:
            options[choose.choice(sorted({*options, "shift", "ignore_index", "reduction", "backend"}))] = choose.choice(
                OPTIONS
            )
        else:
            name = choose.choice(sorted(tensors))
            tensors[name] = changed(tensors[name], choose)
    backend = options.pop("backend", "auto")
    if not call.backends or backend != "auto":
        run(call, tensors, {**options, "backend": backend} if call.backends else options)
        return
    backends = ("auto", "eager") if "cpp" not in call.backends else BACKENDS
    compare(*(run(call, tensors, {**options, "backend": each}) for each in backends), tensors)


def changed(x: Tensor, choose: Bytes) -> Tensor:
    """A tensor with another shape, layout, dtype, or values."""
    way = choose.number(12)
    dim = choose.number(max(x.dim(), 1)) - 1
    if way == 0:
        return x.to(choose.choice(DTYPES))
    if way == 1 and x.dim():
        start = choose.number(x.shape[dim] + 1)
        return x.narrow(dim, start, choose.number(x.shape[dim] - start + 1))
    if way == 2 and x.dim():
        index = [slice(None)] * x.dim()
        index[dim] = slice(choose.number(2), None, 1 + choose.number(3))
        return x[tuple(index)]
    if way == 3 and x.dim() > 1:
        return x.transpose(dim, choose.number(x.dim())).contiguous().transpose(dim, choose.number(x.dim()))
    if way == 4 and x.dim() > 1:
        return x.transpose(dim, choose.number(x.dim()))
    if way == 5:
        return x.unsqueeze(dim)
    if way == 6 and x.dim():
        return x.select(dim, 0).unsqueeze(dim).expand(x.shape) if x.shape[dim] else x
    if way == 7:  # the same values at another place of a storage, behind what must not be read
        room = torch.full((x.numel() + 64,), VALUES[9]).to(x.dtype)
        offset = choose.number(64)
        room[offset : offset + x.numel()] = x.reshape(-1)
        return room[offset : offset + x.numel()].view(x.shape)
    if way == 8 and x.numel():
        flat = x.reshape(-1).clone()
        integers = INTEGERS if x.dtype == torch.int64 else (0, 1)
        flat[choose.number(x.numel())] = choose.choice(VALUES if x.is_floating_point() else integers)
        return flat.view(x.shape)
    if way == 9 and x.numel():
        if x.dtype == torch.int64:
            return torch.full_like(x, choose.choice(INTEGERS))
        if x.dtype == torch.int32:
            return x + choose.choice((-3, -1, 1, 2, 2**30))
        return torch.full_like(x, choose.choice(VALUES)) if x.is_floating_point() else x
    if way == 10 and x.dim():
        return x.flip(dim)
    if way == 11 and x.dim():
        return torch.cat([x, x], dim)
    return x


def run(call: Call, tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
    """The results and gradients of a call, or the error that refuses it."""
    given = {
        name: x.detach().requires_grad_(name in call.gradients and x.is_floating_point()) for name, x in tensors.items()
    }
    try:
        results = call.run(given, options)
        outputs = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
        if outputs:
            torch.autograd.backward([weighted(x) for x in outputs])
    except REFUSALS as error:
        return type(error)
    except RuntimeError as error:
        if "backend" in str(error):  # it cannot do that
            return RuntimeError
        raise
    return results, [given[name].grad for name in call.gradients if name in given]


def weighted(x: Tensor) -> Tensor:
    """A sum that has another gradient for every element."""
    return (x.double() * torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape)).sum()


def compare(ours: Any, eager: Any, tensors: dict[str, Tensor]) -> None:
    """The same refusal, or numbers that are close where they are finite and of a common size."""
    refused = [each if isinstance(each, type) else None for each in (ours, eager)]
    if RuntimeError in refused:
        return
    assert refused[0] == refused[1], f"C++: {refused[0]}, eager: {refused[1]}"
    if refused[0] is not None:
        return
    floating = [x for x in tensors.values() if x.is_floating_point() and x.numel()]
    if any(not x.isfinite().all() or x.abs().max() > 1e4 for x in floating):
        return
    coarse = any(x.dtype in (torch.bfloat16, torch.float16) for x in floating)
    tolerance = 0.1 if coarse else 1e-3
    for kind, mine, other in zip(("results", "gradients"), ours, eager, strict=True):
        for a, b in zip(mine, other, strict=True):
            if not isinstance(a, Tensor) or a is None or b is None or not a.is_floating_point():
                continue
            assert a.shape == b.shape, f"{kind}: {a.shape}, eager {b.shape}"
            a, b = a.double(), b.double()
            if b.numel() and b.isfinite().all() and b.abs().max() < 1e4:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + b.abs().max().item()), msg=kind)
