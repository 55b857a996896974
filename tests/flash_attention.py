"""FlashAttention's functions in plain PyTorch, and models that attend through transformers' integration of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward

CALLS: list[dict[str, Any]] = []  # of the varlen function


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Of q [B, T, H, D] and k, v [B, T', H', D]: queries and keys end together, as do windows and the diagonal."""
    assert dropout_p == 0.0
    assert alibi_slopes is None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]).unsqueeze(1)
    left, right = window_size
    hidden = (distance > 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance < -left) if left >= 0 else False
    hidden |= (distance > right) if right >= 0 else False
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Of q [N, H, D] and k, v [M, H', D], each sequence for itself."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths_q, lengths_k = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    assert (sum(lengths_q), sum(lengths_k), sum(lengths_k)) == (len(q), len(k), len(v))
    assert (max(lengths_q), max(lengths_k)) == (max_seqlen_q, max_seqlen_k)
    assert block_table is None
    CALLS.append({"lengths_q": lengths_q, "lengths_k": lengths_k, "window_size": window_size, "softcap": softcap})
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([flash_attn_func(*(x.unsqueeze(0) for x in part), *options).squeeze(0) for part in parts])


def let_flash_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let transformers find these functions under the name of an attention, or of a kernel of the hub.

    Args:
        monkeypatch: undoes it.
        name: as transformers has it.
    """
    others = 3 if hasattr(modeling_flash_attention_utils, "_flash_with_kvcache_fn") else 2  # by version
    functions = flash_attn_func, flash_attn_varlen_func, *[None] * others
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_args, **_kwargs: functions)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, name, masks["flash_attention_2"])
    CALLS.clear()


def attend_with(model: Any, name: str) -> Any:
    """The model, which now attends by this name; transformers would look for the package."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name
    return model
