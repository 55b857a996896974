"""The few calls of CUDA that OpenRLHF and axolotl make whatever the device is, on a machine without one."""

import torch
import torch.distributed.device_mesh

make_mesh = torch.distributed.device_mesh.init_device_mesh
torch.cuda.set_device = lambda device: None
torch.cuda.current_device = lambda: "cpu"
torch.cuda.synchronize = lambda device=None: None
torch.cuda.can_device_access_peer = lambda *devices: True
torch.cuda.empty_cache = lambda: None
torch.distributed.device_mesh.init_device_mesh = lambda device_type, *args, **kwargs: make_mesh("cpu", *args, **kwargs)
