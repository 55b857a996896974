"""Questions whose answers `torch.compile` takes as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Mark a function whose result does not change while a graph is traced.

    As `torch.compiler.assume_constant_result`, which imports torch._dynamo for it: that takes as long as torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def has_autocast(device_type: str) -> bool:
    """Whether `torch.autocast` takes a kind of device; torch 2.10 cannot trace torch's own function."""
    return torch.amp.is_autocast_available(device_type)
