"""A kernel whose loop has several parts: with a planted race, `make sanitize` must see that."""

import torch

import dil_kernels

dil_kernels.token_logps(torch.randn(1, 64, 1000), torch.zeros(1, 64, dtype=torch.long), shift=False, backend="cpp")
