"""PyTorch's own FlashAttention over all stretches of a row in one call, for models that attend with "sdpa" on a GPU.

Stretch by stretch, a layer of n stretches is n to 4 n launches forward, and twice that backward. The function that is
called is not public (the public varlen_attn around it takes other arguments from one release of PyTorch to the next):
whether it computes what is wanted is measured before it is used.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dil_kernels.data.batches import Segments
from dil_kernels.models.prefix_sharing_flash import KEY_INDEX, flash_inputs

MAX_HEAD_SIZE = 256  # of FlashAttention
HALF = (torch.bfloat16, torch.float16)
ROUNDING = 0.1  # of values and gradients in 16 bits, by norms; other keys change them by half
PROBE, PROBE_SCALE = Segments((5, 3, 4, 1), (None, 0, 0, None)), 0.3


def in_autocast_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `scaled_dot_product_attention` takes them under autocast."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    return query, key, value


def takes_varlen(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, softcap: float | None = None, **_: Any
) -> bool:
    """Whether PyTorch's FlashAttention takes [1, H, N, D] tensors of causal stretches, and may."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype == key.dtype == value.dtype
        and query.dtype in HALF
        and size == value.shape[-1] <= MAX_HEAD_SIZE
        and size % 8 == 0
        and all(x.stride(-1) == 1 for x in (query, key, value))
        and not dropout
        and softcap is None
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.backends.cuda.is_flash_attention_available()
        and is_right(query.device, query.dtype, query.shape[1], key.shape[1], size)
    )


def varlen_inputs(segments: Segments, device: torch.device) -> dict[str, Any]:
    """`flash_inputs`, without an index of keys where none is repeated."""
    inputs = flash_inputs(segments, device)
    return inputs if any(prefix is not None for prefix in segments.prefixes) else {**inputs, KEY_INDEX: None}


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, inputs: dict[str, Any], scale: float | None) -> Tensor:
    """Causal attention [1, N, H, D] of [1, H, N, D] queries, each stretch of them aligned with the end of its keys."""
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if inputs[KEY_INDEX] is not None:
        # The backward of indexing adds in a fixed order, unlike that of index_select.
        key, value = key[inputs[KEY_INDEX]], value[inputs[KEY_INDEX]]
    output = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        inputs["cu_seq_lens_q"],
        inputs["cu_seq_lens_k"],
        inputs["max_length_q"],
        inputs["max_length_k"],
        0.0,  # dropout
        True,  # causal
        False,  # no debug mask
        scale=scale,
    )[0]
    return output.unsqueeze(0)


@functools.cache
def is_right(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether `varlen_attention` computes here what `scaled_dot_product_attention` does, gradients included."""
    shapes = [(1, count, sum(PROBE.lengths), size) for count in (heads, key_heads, key_heads)]
    # The first to ask may be in a checkpointed layer, whose hooks are for what the layer saves.
    own_graph = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with own_graph, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            generator = torch.Generator(device).manual_seed(0)
            tensors = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
            actual, truth = (
                _with_gradients(attend, [x.to(to).requires_grad_() for x in tensors])
                for attend, to in ((_probed, dtype), (_by_stretches, torch.float32))
            )
    except torch.OutOfMemoryError:  # which says nothing of the function
        raise
    except (RuntimeError, TypeError):  # not built for this device, other arguments
        return False
    return all((x.float() - true).norm() <= ROUNDING * true.norm() for x, true in zip(actual, truth, strict=True))


def _with_gradients(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
    output = attend(*tensors)
    weights = torch.arange(output.numel(), device=output.device).sin().view_as(output)
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), tensors)]


def _probed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return varlen_attention(query, key, value, varlen_inputs(PROBE, query.device), PROBE_SCALE)


def _by_stretches(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    queries, keys, values = (x.split(PROBE.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for q, k, v, prefix in zip(queries, keys, values, PROBE.prefixes, strict=True):
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        outputs.append(scaled_dot_product_attention(q, k, v, mask, scale=PROBE_SCALE, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)
