"""Lets accelerate shard models over CPU processes, which it does on accelerators only."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DeepSpeedPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import training_args


def let_processes_shard() -> None:
    """From now on the CPU processes of this launch are to accelerate what GPUs are, with gloo in place of NCCL."""

    def prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    training_args.is_torch_bf16_gpu_available = lambda: True  # CPUs compute in bf16, too
    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device


def let_deepspeed_start() -> None:
    """Partition small parameters, too, which are all of a tiny model, and compile nothing."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()
    as_before = DeepSpeedPlugin.__post_init__

    def with_threshold(self: DeepSpeedPlugin) -> None:
        as_before(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = with_threshold


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether no process holds all of any weight matrix."""
    matrices = [
        parameter for parameter in model.parameters() if len(getattr(parameter, "ds_shape", parameter.shape)) == 2
    ]
    return all(
        parameter.to_local().numel() < parameter.numel()
        if isinstance(parameter, DTensor)
        else hasattr(parameter, "ds_tensor") and parameter.ds_tensor.numel() < parameter.ds_numel
        for parameter in matrices
    )
