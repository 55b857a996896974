"""The memory that the head takes, known before it runs."""

from __future__ import annotations

import os

import torch

from dil_kernels.backends import constant_in_graphs
from dil_kernels.checks import check_count
from dil_kernels.ops.linear_head import TILE_SHAPES, peak_memory

# Of the memory of the device, the share that a stash may take by default.
STASH_SHARE = 1 / 8


@constant_in_graphs
def default_stash_bytes(device: torch.device) -> int:
    """What `stash_bytes=None` means: an eighth of the memory of the device, or of the machine on the CPU.

    Not of what is free: which rows are kept decides how gradients are rounded, and a run must be repeatable bit by bit.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        total = 8 << 30
    return int(STASH_SHARE * total)


def linear_memory_bytes(
    num_scored_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    num_tokens: int | None = None,
    hidden_states_grad: bool = True,
    lm_head_weight_grad: bool = True,
    lm_head_bias_grad: bool = False,
    stash_bytes: int | None = 0,
    device: torch.device | str = "cuda",
) -> int:
    """An upper bound of the memory that `linear_token_logps` takes, forward and backward, known before running it.

    Args:
        num_scored_tokens: scored positions (`max_scored_tokens`, where that is given).
        hidden_size: D.
        vocab_size: V.
        dtype: of hidden states and weight.
        num_tokens: all positions, if more.
        hidden_states_grad, lm_head_weight_grad, lm_head_bias_grad: what requires a gradient.
        stash_bytes: as given to `linear_token_logps`; None stands for its default on the device of this machine.
        device: where it runs.

    Returns:
        Bytes beyond the inputs, the log-probs and the gradients of the inputs, at the peak. On top come copies of
        inputs that autocast converts or that are not contiguous, and what a matrix product holds for itself.

    Raises:
        TypeError, ValueError: a size is no integer >= 0.
    """
    sizes = {"num_scored_tokens": num_scored_tokens, "hidden_size": hidden_size, "vocab_size": vocab_size}
    for name, value in (sizes | {"num_tokens": num_tokens, "stash_bytes": stash_bytes}).items():
        if value is not None:
            check_count(name, value)
    tile = TILE_SHAPES["cuda" if torch.device(device).type == "cuda" else "cpu"]
    return peak_memory(
        num_scored_tokens,
        num_scored_tokens if num_tokens is None else num_tokens,
        hidden_size,
        vocab_size,
        dtype,
        tile=tile,
        cuda=torch.device(device).type == "cuda",
        stash_bytes=default_stash_bytes(torch.device(device)) if stash_bytes is None else stash_bytes,
        grad_hidden=hidden_states_grad,
        grad_weight=lm_head_weight_grad,
        grad_bias=lm_head_bias_grad,
    )
