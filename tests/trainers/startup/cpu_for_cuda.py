"""The few calls of CUDA that OpenRLHF and axolotl make whatever the device is, on a machine without one."""

from typing import Any

import torch
import torch.distributed.device_mesh
from transformers import PreTrainedModel

make_mesh = torch.distributed.device_mesh.init_device_mesh
torch.cuda.set_device = lambda device: None
torch.cuda.current_device = lambda: "cpu"
torch.cuda.synchronize = lambda device=None: None
torch.cuda.can_device_access_peer = lambda *devices: True
torch.cuda.empty_cache = lambda: None
torch.distributed.device_mesh.init_device_mesh = lambda device_type, *args, **kwargs: make_mesh("cpu", *args, **kwargs)


def load_on_the_cpu(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
    """In place of `PreTrainedModel.from_pretrained`: axolotl asks for the GPU of each of several processes."""
    return load(cls, *args, **kwargs)


load = PreTrainedModel.from_pretrained.__func__
PreTrainedModel.from_pretrained = classmethod(load_on_the_cpu)
