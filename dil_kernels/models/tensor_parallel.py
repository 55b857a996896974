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

__all__ = [
    "copied",
    "data_parallel_size",
    "is_forward_of",
    "is_loaded_in_parts",
    "tensor_parallel_size",
    "uneven_tied_rows",
]


def tensor_parallel_size(model: Any) -> int:
    """Over how many processes the weights of a model are split; 1 for a model that is whole."""
    return getattr(_base(model), "_tp_size", None) or 1


def data_parallel_size(model: Any) -> int:
    """How many batches the processes of a model that was loaded in parts take at once; 1 for a model that is whole."""
    return _base(model).config.distributed_config.dp_size if is_loaded_in_parts(model) else 1


def is_loaded_in_parts(model: Any) -> bool:
    """Whether transformers has split the model over processes as it loaded it, and brings gradients together."""
    return getattr(_base(model), "is_distributed_loading_by_transformers", False)


def uneven_tied_rows(model: Any) -> int | None:
    """How many rows tied embeddings have that are trained and FSDP2 has in parts of unequal sizes; None if it has none.

    transformers 5.23 hands embeddings and head to FSDP2 one by one and ties them afterwards. A part that is padded to
    the size of the others is then held twice, and an optimizer changes one of the two.
    """
    base = _base(model)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight and head.weight.requires_grad
    config = base.config.distributed_config
    rows = len(embeddings.weight)
    return rows if tied and config.fsdp_size > 1 and rows % (config.fsdp_size * config.tp_size) else None


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
