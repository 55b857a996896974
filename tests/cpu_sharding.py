"""Lets accelerate shard models over CPU processes, which it does on accelerators only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from accelerate import DeepSpeedPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import training_args

from dil_kernels.functional import linear
from dil_kernels.ops.linear_head import TileShape


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


def small_tiles() -> contextlib.AbstractContextManager[Any]:
    """While this is entered, the head takes few rows and entries at a time."""
    return mock.patch.dict(linear.TILE_SHAPES, {"cpu": TileShape(8, 64)})


@contextlib.contextmanager
def counted_gathers(head: torch.nn.Linear) -> Iterator[Callable[[], int]]:
    """How often FSDP2 or ZeRO-3 gather the weight of the policy's head, which may not be wrapped yet under FSDP2."""
    found: list[int] = []
    weight = head.weight
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or isinstance(weight, DTensor):
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

        as_before = fsdp.FSDPParamGroup.unshard

        def unshard(group: Any, *args: Any, **kwargs: Any) -> Any:
            gathers = group._all_gather_result is None and not group.is_unsharded
            for parameter in group.fsdp_params if gathers else ():
                trained = parameter.sharded_param.requires_grad
                of_head = parameter._module_info.module is head
                if trained and (of_head or "lm_head.weight" in str(parameter._param_fqn)):
                    found.append(1)
            return as_before(group, *args, **kwargs)

        with mock.patch.object(fsdp.FSDPParamGroup, "unshard", unshard):
            yield lambda: len(found)
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        name = "_PartitionedParameterCoordinator__all_gather_params_"
        before = getattr(Coordinator, name)

        def gather(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
            missing = [x for x in parameters if x.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            found.extend(1 for x in missing if x is weight)
            return before(self, parameters, *args, **kwargs)

        with mock.patch.object(Coordinator, name, gather):
            yield lambda: len(found)
    else:
        yield lambda: len(found)
