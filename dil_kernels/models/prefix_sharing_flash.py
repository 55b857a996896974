"""Rows that share prefixes through FlashAttention: a varlen call with fewer queries than keys.

transformers hands cu_seq_lens_q and cu_seq_lens_k to FlashAttention's varlen function, which aligns each stretch of
queries with the end of its keys and counts windows from there. So all that is to be done is to repeat the keys and
values of a prefix for each of its segments.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from dil_kernels.data.batches import Segments

KEY_INDEX = "dil_key_index"  # a keyword that goes through the layers of a model to its attention


def is_flash(attention: str) -> bool:
    """Whether transformers runs an attention of this name, or of this kernel of the hub, through FlashAttention."""
    return "flash" in attention and not attention.startswith("paged|") and attention in AttentionInterface()


def let_keys_repeat(attention: str) -> None:
    """Let an attention of transformers take keys by an index; without one it is what it was.

    Args:
        attention: its name, one of `is_flash`.
    """
    if not keys_repeat(attention):
        AttentionInterface.register(attention, _by_index(AttentionInterface()[attention]))


def keys_repeat(attention: str) -> bool:
    """Whether the attention takes keys by an index; a kernel that was loaded again does not."""
    return getattr(AttentionInterface()[attention], "takes_key_index", False)


def _by_index(attention: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attention)
    def repeating(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        index = kwargs.pop(KEY_INDEX, None)
        if index is not None:
            # The backward of indexing adds in a fixed order, unlike that of index_select.
            key, value = key[:, :, index], value[:, :, index]
        return attention(module, query, key, value, *args, **kwargs)

    repeating.takes_key_index = True  # type: ignore[attr-defined]
    return repeating


def flash_inputs(segments: Segments, device: torch.device) -> dict[str, Any]:
    """What a model whose keys repeat takes beside the tokens and positions of a row of N tokens.

    Args:
        segments: of the row; each is one stretch of queries.
        device: of the row.

    Returns:
        Boundaries of the queries and of the keys, int32 [stretches + 1], the tokens of the longest of each, and the
        token of each key, int64.
    """
    lengths, prefixes = segments.lengths, segments.prefixes
    places = torch.arange(sum(lengths)).split(lengths)
    keys = [
        place if prefix is None else torch.cat([places[prefix], place])
        for place, prefix in zip(places, prefixes, strict=True)
    ]
    key_lengths = [len(place) for place in keys]
    boundaries = {
        f"cu_seq_lens_{side}": torch.tensor([0, *itertools.accumulate(of_side)], dtype=torch.int32, device=device)
        for side, of_side in (("q", lengths), ("k", key_lengths))
    }
    longest = {"max_length_q": max(lengths), "max_length_k": max(key_lengths)}
    return {**boundaries, **longest, KEY_INDEX: torch.cat(keys).to(device)}
