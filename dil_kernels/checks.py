"""Checks of the public functions' arguments: each error names the argument, what it got and what it wants.

Checks that would read a tensor run on the CPU only, and not where there are no values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(tensor: Tensor) -> str:
    """The shape of a tensor, as errors show it."""
    return str(list(tensor.shape))


def check_tensors(**tensors: Tensor | None) -> None:
    """Tensors by their names, or None where the argument has that default."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to read: not while torch.compile traces, nor of a fake or a meta tensor."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return True
    from torch._subclasses.fake_tensor import FakeTensor  # only now: its import takes long

    return not isinstance(tensor, FakeTensor)


def readable(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu" and has_values(tensor)


def check_dtype(name: str, tensor: Tensor) -> None:
    """One of LOGITS_DTYPES."""
    if tensor.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")


def check_logits(logits: Tensor, labels: Tensor, *, ignore_index: int, shift: bool, part: bool) -> None:
    """Logits [B, T, V] or [N, V], labels [B, T] or [N]; of a part of the vocabulary, labels may be any."""
    check_tensors(logits=logits, labels=labels)
    if logits.ndim not in (2, 3):
        raise ValueError(f"logits must be [B, T, V] or [N, V], got {shape_of(logits)}")
    check_dtype("logits", logits)
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, but logits are on {logits.device}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits have an empty vocabulary: {shape_of(logits)}")
    _check_labels(labels, logits, "logits", None if part else logits.shape[-1], ignore_index, shift)


def check_head(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int,
    shift: bool,
    names: tuple[str, str, str],
    part: bool,
) -> None:
    """Hidden states [B, T, D] or [N, D], head [V, D] with bias [V], labels [B, T] or [N]; of a part of the vocabulary,
    labels may be any.
    """
    hidden_name, weight_name, bias_name = names
    if hidden_states.ndim not in (2, 3):
        raise ValueError(f"{hidden_name} must be [B, T, D] or [N, D], got {shape_of(hidden_states)}")
    if lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != hidden_states.shape[-1]:
        raise ValueError(
            f"{weight_name} must be [V, {hidden_states.shape[-1]}] to match {hidden_name} {shape_of(hidden_states)}, "
            f"got {shape_of(lm_head_weight)}"
        )
    V = lm_head_weight.shape[0]
    if V == 0 or hidden_states.shape[-1] == 0:
        raise ValueError(f"{weight_name} is empty: {shape_of(lm_head_weight)}")
    if lm_head_bias is not None and lm_head_bias.shape != (V,):
        raise ValueError(f"{bias_name} must be [{V}] to match {weight_name}, got {shape_of(lm_head_bias)}")
    check_dtype(hidden_name, hidden_states)
    for name, tensor in ((weight_name, lm_head_weight), (bias_name, lm_head_bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(f"{name} is on {tensor.device}, but {hidden_name} is on {hidden_states.device}")
        if tensor is not None and name != "labels" and tensor.dtype != hidden_states.dtype:
            raise TypeError(f"{name} must be {hidden_states.dtype} as {hidden_name}, got {tensor.dtype}")
    _check_labels(labels, hidden_states, hidden_name, None if part else V, ignore_index, shift)


def _check_labels(labels: Tensor, rows: Tensor, name: str, V: int | None, ignore_index: int, shift: bool) -> None:
    """Labels int64 of `rows` [B, T, ...] or [N, ...], which errors call `name`; in [0, V), where V is given."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels must be {list(rows.shape[:-1])} to match {name} {shape_of(rows)}, got {shape_of(labels)}"
        )
    if shift and labels.shape[-1] < 2:
        raise ValueError(
            f"{name} {shape_of(rows)} have {labels.shape[-1]} position(s); with shift=True at least 2 are needed, "
            "since position t predicts label t + 1"
        )
    if readable(labels) and V is not None:
        check_label_range(labels[..., 1:] if shift else labels, V, ignore_index)


def check_number(name: str, value: float) -> None:
    """A number of Python's."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a Tensor (no gradient flows to it)")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def is_integer(value: Any) -> bool:
    """Whether it is an integer, and not true or false, which Python takes for one."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: int) -> None:
    """An integer >= 0."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_flag(name: str, value: bool) -> None:
    """True or false, and not what Python takes for one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """A finite number > 0."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def check_label_range(targets: Tensor, V: int, ignore_index: int) -> None:
    """Targets in [0, V) or `ignore_index`."""
    invalid = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bool(invalid.any()):
        raise ValueError(f"labels must be in [0, {V}) or ignore_index={ignore_index}, got {int(targets[invalid][0])}")


def check_inplace(logits: Tensor) -> None:
    """Logits that a backward may overwrite."""
    if torch.compiler.is_compiling():
        raise RuntimeError("inplace_backward=True is not supported under torch.compile, which owns its buffers")
    owner = logits._base if logits._is_view() else logits
    if owner is not None and owner.is_leaf and owner.requires_grad:
        raise ValueError("inplace_backward=True would overwrite logits that are a leaf tensor, or a view of one")
    if _overlaps(logits):
        raise ValueError(f"inplace_backward=True needs logits without overlapping rows, got strides {logits.stride()}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"inplace_backward=True needs a contiguous vocabulary dimension, got strides {logits.stride()}"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a dimension steps less far than the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_cu_seqlens(cu_seqlens: Tensor, packed: Tensor, name: str, width: str) -> None:
    """Boundaries int32 [S + 1] of packed logits, or of another tensor with a row a token."""
    check_tensors(cu_seqlens=cu_seqlens)
    N = packed.shape[-2]
    if packed.ndim == 3 and packed.shape[0] != 1:
        raise ValueError(f"{name} must be [N, {width}] or [1, N, {width}] with cu_seqlens, got {shape_of(packed)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [S + 1] with S >= 1, got {shape_of(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != packed.device:
        raise ValueError(f"cu_seqlens are on {cu_seqlens.device}, but {name} are on {packed.device}")
    if readable(cu_seqlens):
        if int(cu_seqlens[0]) != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
        if bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
        if int(cu_seqlens[-1]) != N:
            raise ValueError(f"cu_seqlens must end at the number of tokens, {N}, got {int(cu_seqlens[-1])}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of the names that exist."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; available: {', '.join(choices)}")


def check_per_pair(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Log-probs of one response per pair, [B]."""
    check_tensors(**{name: tensor})
    if tensor.ndim != 1 or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape) or '[B]'}, got {shape_of(tensor)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be fp32 or fp64 (a sum of log-probs does not fit a lower precision), got {tensor.dtype}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but {device} is needed")
