"""Several sequences in one row of a causal language model, without attending from one to another.

A packed row [1, N] has position_ids that restart at 0 with every sequence. FlashAttention takes such a row as it is.
For PyTorch's scaled_dot_product_attention, transformers forms the mask of all N x N pairs of tokens; here it is
taken apart into those of the single sequences, and attention runs sequence by sequence, without a mask where that is
causal.

Whether a model keeps the sequences of a row apart is measured, not looked up: see `packing_problem`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(f"packing needs the extra [train]: pip install 'dil-kernels[train]' ({error})") from error

from dil_kernels.data.batches import Packed
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.rotary_lengths import keep_lengths_apart

__all__ = ["UnsupportedPackingError", "install_packed_attention", "packing_problem"]

NAME = "dil_packed_sdpa"  # of the attention, among those of transformers
PROBE_LENGTHS = (5, 7)


class UnsupportedPackingError(ValueError):
    """This model cannot take several sequences in one row; the message is the reason."""


def install_packed_attention(*models: nn.Module) -> None:
    """Prepare causal language models for packed rows; those that attend with "sdpa" get an attention for them.

    Rows of one sequence, padded batches and generation go through "sdpa" as before.

    Args:
        models: `PreTrainedModel`s or `PeftModel`s with their weights whole, not yet wrapped.

    Raises:
        UnsupportedPackingError: one of them does not keep the sequences of a row apart; none is changed then.
    """
    before = [_attention_of(model) for model in models]
    for model in models:
        if _attention_of(model) == "sdpa":
            _set_attention(model, NAME)
    problem = next(filter(None, map(packing_problem, models)), None)
    if problem is not None:
        for model, attention in zip(models, before, strict=True):
            if _attention_of(model) != attention:
                _set_attention(model, attention)
        raise UnsupportedPackingError(problem)
    keep_lengths_apart(*models)


class PackedMask(NamedTuple):
    """What stands for the attention mask of a packed row."""

    lengths: tuple[int, ...]  # of stretches of tokens that attend only to themselves
    masks: tuple[Tensor | None, ...]  # [1, 1, T, T] bool of each, None for causal


def _packed_sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention as transformers calls it: query [1, H, N, D]; the output is [1, N, H, D]."""
    sdpa = AttentionInterface()["sdpa"]
    if not isinstance(attention_mask, PackedMask):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("its attention adds a bias of positions")
    kwargs["is_causal"] = True  # a mask that is none
    parts = (x.split(attention_mask.lengths, dim=2) for x in (query, key, value))
    outputs = [sdpa(module, *qkv, mask, **kwargs)[0] for *qkv, mask in zip(*parts, attention_mask.masks, strict=True)]
    return torch.cat(outputs, dim=1), None


def _packed_sdpa_mask(
    *, kv_length: int, mask_function: Callable[..., Tensor], attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | PackedMask | None:
    """A mask as transformers asks for it; a `PackedMask` for a packed row."""
    device = kwargs["device"] if "device" in kwargs else kwargs["cache_position"].device
    # With a mask of its own, a batch is padded; with a skip allowed, no sequence follows another.
    packed = attention_mask is None and not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
    found = _take_apart(mask_function, kv_length, device) if packed and kwargs["batch_size"] == 1 else None
    if found is not None:
        return found
    return sdpa_mask(kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _take_apart(mask_function: Callable[..., Tensor], num_tokens: int, device: torch.device) -> PackedMask | None:
    """The mask of each stretch of tokens that attend to the one before them; None if it is one, or not causal.

    In the masks of transformers (causal, sliding windows, chunks), a token that does not attend to the one before it
    attends to none before, and a stretch whose last token attends to its first is causal without exception.
    """
    index = torch.arange(num_tokens, device=device)

    def attends(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(index.new_zeros(()), index.new_zeros(()), query, key)

    starts = [0, *((~attends(index[1:], index[:-1])).nonzero().squeeze(1) + 1).tolist()]
    if len(starts) == 1:
        return None
    ends = [*starts[1:], num_tokens]
    first, last = torch.tensor([starts, ends], device=device)
    last = last - 1
    causal, backwards = torch.stack([attends(last, first), attends(first, last) & (first < last)]).tolist()
    if any(backwards):
        return None
    masks = (
        None if whole else attends(index[start:end, None], index[None, start:end])[None, None]
        for start, end, whole in zip(starts, ends, causal, strict=True)
    )
    return PackedMask(tuple(end - start for start, end in zip(starts, ends, strict=True)), tuple(masks))


def _attention_of(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", None))


def _set_attention(model: Any, attention: str) -> None:
    AttentionInterface.register(NAME, _packed_sdpa_attention)
    AttentionMaskInterface.register(NAME, _packed_sdpa_mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(attention)


def packing_problem(model: nn.Module) -> str | None:
    """Why the model cannot take several sequences in one row; None if it can.

    Measured on two short sequences, whatever the model is made of: the logits of the second must not depend on the
    first, whose embeddings' gradient must be exactly zero, and the logits of both must be those of each sequence alone.
    Attention through a mask of all pairs of tokens ("eager") is refused for what it costs.
    """
    name = type(model).__name__
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return f"{name} does not have its weights whole at construction, so that packing could not be checked"
    try:
        with evaluating(model), torch.enable_grad():
            problem = _measured_problem(model, name)
    except Exception as error:  # whatever a model's own code may raise
        problem = f"{name} cannot run on several sequences in one row: {error}"
    if problem is None and _attention_of(model) == "eager":
        problem = f"{name} attends with 'eager', which forms the scores of all pairs of tokens of a row"
    return problem


def _measured_problem(model: Any, name: str) -> str | None:
    V, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = (torch.arange(sum(PROBE_LENGTHS), device=device) * V // sum(PROBE_LENGTHS)).unsqueeze(0)
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS]).unsqueeze(0)
    boundaries = torch.tensor([0, *itertools.accumulate(PROBE_LENGTHS)], dtype=torch.int32, device=device)
    embedded: list[Tensor] = []

    def as_leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        packed = model(**Packed(ids, positions, boundaries, max(PROBE_LENGTHS)).model_inputs()).logits
    finally:
        handle.remove()
    if packed.shape[:2] != ids.shape:
        return f"{name} turns a row of {ids.shape[1]} tokens into one of {packed.shape[1]}"
    (gradient,) = torch.autograd.grad(packed[:, PROBE_LENGTHS[0] :].float().square().sum(), embedded[0])
    of_first, of_second = (part.count_nonzero().item() for part in gradient.split(PROBE_LENGTHS, dim=1))
    if of_first or not of_second:
        return f"{name} lets a sequence depend on the one before it in its row"
    with torch.no_grad():
        alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(PROBE_LENGTHS, dim=1)]
    expected = torch.cat(alone, dim=1).float()
    error = (packed.detach().float() - expected).abs().max() / expected.abs().max()
    if not error <= _coarsest_rounding(model) ** 0.5:
        return f"{name} computes other logits for a sequence in a row with others (relative difference {error:.1e})"
    return None


def _coarsest_rounding(model: nn.Module) -> float:
    """Of the dtypes that the model computes in."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    device_type = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device_type):
        dtypes.add(torch.get_autocast_dtype(device_type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)
