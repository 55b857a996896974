"""torch.library ops, their fake implementations and the autograd Functions around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("dil_kernels", "FRAGMENT")


def define_op(
    name: str, *, fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Register a function as the op `dil_kernels::name` of CPU and CUDA tensors, and `fake` for tensors without values.

    As `torch.library.custom_op`, which puts Python around every call for what these ops do not need: autograd (the
    Functions of this package are above the ops, and count up the version of what an op mutates) and outputs that alias
    an input (none does). `_disable_dynamo` is custom_op's too: it keeps torch.compile out of a kernel that runs in a
    frame which is not compiled, and imports torch._dynamo only in the first call.
    """

    def register(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, torch._disable_dynamo(function), device)
        torch.library.register_fake(f"dil_kernels::{name}", fake, lib=_LIBRARY)
        return function

    return register


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
