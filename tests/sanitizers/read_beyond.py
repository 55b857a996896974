"""Reads 64 bytes beyond a tensor in a kernel: `make sanitize` must see that."""

import ctypes

import torch

import dil_kernels

logits = torch.randn(1, 4, 1000)
memory = (ctypes.c_char * logits.nbytes).from_address(logits.data_ptr() + 64)
shifted = torch.frombuffer(memory, dtype=torch.float32).view(1, 4, 1000)
dil_kernels.token_logps(shifted, torch.zeros(1, 4, dtype=torch.long), shift=False, backend="cpp")
