"""Lets accelerate shard models over CPU processes, which it does on accelerators only."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def let_processes_shard() -> None:
    """From now on the CPU processes of this launch are to accelerate what GPUs are, with gloo in place of NCCL."""

    def prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
