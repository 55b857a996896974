"""Activations that wait for the backward in the memory of the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 1024  # of a tensor that is worth the way


class OffloadedActivations(saved_tensors_hooks):
    """While this is entered, what autograd keeps for the backward is moved to pinned memory of the host.

    What lies in the storage of a parameter stays, and so does what is small or on the host. The copies are exact.

    Args:
        model: the module whose parameters stay.
        device_type: of the tensors that are moved.
    """

    def __init__(self, model: nn.Module, device_type: str = "cuda") -> None:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        pin = device_type == "cuda"

        def pack(tensor: Tensor) -> Any:
            if (
                tensor.device.type != device_type
                or tensor.nbytes < LEAST_BYTES
                or tensor.untyped_storage().data_ptr() in parameters
            ):
                return tensor
            return tensor.device, torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=pin)

        super().__init__(pack, unpack)
