"""Models that transformers has split over processes (`tp_plan="auto"`): what it puts around the forwards of modules.

Weights are DTensors. Around the forward of a module lies a function that brings inputs and outputs into the form that
the module and the next one take; it holds on to the module, so that a copy of a model would call the original.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dil_kernels.functional.vocab_parallel import is_dtensor
from dil_kernels.models.head_requests import answering_forward, is_answering, replaced_forward

__all__ = ["copied", "is_forward_of", "tensor_parallel_size"]


def tensor_parallel_size(model: Any) -> int:
    """Over how many processes the weights of a model are split; 1 for a model that is whole."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "_tp_size", None) or 1


def _held(forward: Any) -> dict[str, Any] | None:
    """What a forward of tensor parallelism holds on to, by name; None of another forward."""
    code = getattr(forward, "__code__", None)
    if code is None or not forward.__qualname__.endswith("install_forward.<locals>.tp_forward"):
        return None
    cells = forward.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def is_forward_of(forward: Any, module: nn.Module) -> bool:
    """Whether a forward is the one that tensor parallelism gave to the module."""
    held = _held(forward)
    return held is not None and held.get("module") is module


def copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    """A deep copy of a model that is split over processes, split likewise, whose modules call each other.

    Args:
        model: of transformers.
        memo: of `copy.deepcopy`, what else is known of the copy.
    """
    for parameter in model.parameters():
        if is_dtensor(parameter):
            memo[id(parameter)] = _copied_part(parameter)
    for module in model.modules():  # the processes are the same
        for name in ("_device_mesh", "_mesh_manager"):
            shared = module.__dict__.get(name)
            memo[id(shared)] = shared
    replica = copy.deepcopy(model, memo)
    for module in replica.modules():
        held = _held(replaced_forward(module))
        if held is not None:
            answers = is_answering(module.forward)
            del module.forward
            if "self" in held:  # else it only sees to gradients
                held["self"].install_forward(module, held["mesh"])
            if answers:
                module.forward = answering_forward(module)
    return replica


def _copied_part(parameter: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        part = parameter.to_local().clone()
    whole = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
