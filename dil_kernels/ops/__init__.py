"""torch.library ops, their fake implementations and the autograd Functions around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dil_kernels import backends

_LIBRARY = torch.library.Library("dil_kernels", "FRAGMENT")
backends.load_extension()  # has the C++ implementations


def arguments(options: type[Any]) -> str:
    """The fields of a named tuple as arguments of a schema."""
    return ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(options).items())


class Op:
    """An op `dil_kernels::name`: C++ on CPU tensors, Triton or CUDA C++ on CUDA tensors, by PyTorch's dispatcher.

    Its overload `triton` runs the Triton kernels on CPU tensors, for Triton's interpreter and emulators of GPUs.

    As `torch.library.custom_op`, which puts Python around every call for what these ops do not need: autograd (the
    Functions of this package are above the ops, and count up the version of what an op mutates) and outputs that alias
    an input (none does). `_disable_dynamo` is custom_op's too: it keeps torch.compile out of a kernel that runs in a
    frame which is not compiled, and imports torch._dynamo only in the first call.

    Args:
        schema: name, arguments and results.
        fake: the same for tensors without values.
    """

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name, _, self._arguments = schema.partition("(")
        self._fake = fake
        self._define("")

    def _define(self, overload: str) -> None:
        try:
            _LIBRARY.define(f"{self.name}{overload}({self._arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        except RuntimeError as error:  # as one that declared the ops itself
            raise ImportError("the extension of dil_kernels is that of another version: install the package") from error
        torch.library.register_fake(f"dil_kernels::{self.name}{overload}", self._fake, lib=_LIBRARY)

    def cpu(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the implementation on CPU tensors, where it is not the extension's."""
        _LIBRARY.impl(self.name, torch._disable_dynamo(function), "CPU")
        return function

    def triton(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the implementation that launches Triton kernels."""
        _LIBRARY.impl(self.name, torch._disable_dynamo(function), "CUDA")
        self._define(".triton")
        _LIBRARY.impl(f"{self.name}.triton", torch._disable_dynamo(function), "CPU")
        return function

    def on(self, backend: str, tensor: Tensor) -> torch._ops.OpOverload:
        """What runs on a tensor: the op of its device, or Triton's where that is asked for."""
        packet = getattr(torch.ops.dil_kernels, self.name)
        return packet.triton if backend == "triton" and not tensor.is_cuda else packet.default


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of a tensor made current, where it is not."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether an op of these tensors has to run in its autograd Function, which takes about as long as the op's launch.

    Only a Function records a graph, and only a Function refuses forward-mode derivatives and the transforms of
    torch.func, whose tensors do not say that they require a gradient: an op would drop it.
    """
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_double_backward(what: str) -> None:
    """Called in a backward: raise if a graph of it is being made, whose gradients would silently be missing.

    Raises:
        RuntimeError: the backward runs with create_graph=True.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} can be differentiated once; create_graph=True (a double backward) is not supported")
