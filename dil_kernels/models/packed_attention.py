"""Several sequences in one row of a causal language model, without attending from one to another.

A packed row [1, N] has position_ids that restart at 0 with every sequence. FlashAttention takes such a row as it is.
For PyTorch's scaled_dot_product_attention, transformers forms the mask of all N x N pairs of tokens; here it is
taken apart into those of the single sequences, and attention runs sequence by sequence, without a mask where that is
causal, or on a GPU in one call for all of them (varlen_attention.py). The segments of a `SharedPrefixes` row
(prefix_sharing.py), whose positions do not tell them apart, attend to their prefixes, too, by the mask that their
sequence has.

Under torch.compile both stay outside of the graphs, of which one then serves rows of any sequences: what is between
two attentions is compiled, layer by layer.

Whether a model keeps the sequences of a row apart is measured, not looked up: see `packing_problem`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.wording import needs_extra

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(needs_extra("packing", "train", error)) from error

from dil_kernels.data.batches import Packed, Segments
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.probes import (
    difference,
    embeddings_as_leaves,
    in_fp32,
    is_rounding,
    probe_ids,
    tolerances,
    weights_are_whole,
)
from dil_kernels.models.rotary_lengths import keep_lengths_apart
from dil_kernels.models.varlen_attention import in_autocast_dtype, takes_varlen, varlen_attention, varlen_inputs

__all__ = ["UnsupportedPackingError", "install_packed_attention", "packing_problem"]

segments_of_row: ContextVar[Segments | None] = ContextVar("segments_of_row", default=None)  # while a model's body runs

NAME = "dil_packed_sdpa"  # of the attention, among those of transformers
PROBE_LENGTHS = (5, 7)
LONG = 2048  # tokens of a stretch, in the mean; from here on launches cost little beside the work (estimated)
OWN_CODE = "it attends by code of its own, not through transformers' interface of attention"


class UnsupportedPackingError(ValueError):
    """This model cannot take several sequences in one row; the message is the reason."""


def install_packed_attention(*models: nn.Module) -> None:
    """Prepare causal language models for packed rows; those that attend with "sdpa" get an attention for them.

    Rows of one sequence, padded batches and generation go through "sdpa" as before.

    Args:
        models: each a `PreTrainedModel` or `PeftModel` with its weights whole, not yet wrapped.

    Raises:
        UnsupportedPackingError: one of them does not keep the sequences of a row apart; none is changed then.
    """
    with packed_attention(*models):
        for problem in filter(None, map(packing_problem, models)):
            raise UnsupportedPackingError(problem)
    keep_lengths_apart(*models)


@contextlib.contextmanager
def packed_attention(*models: nn.Module) -> Iterator[None]:
    """Give those that attend with "sdpa" an attention for rows of several sequences; an error takes it back."""
    changed = [model for model in models if attention_of(model) == "sdpa"]
    try:
        for model in changed:
            before = _logits_alone(model)
            _set_attention(model, NAME)
            after = _logits_alone(model)
            if before is None or after is None:  # which the caller's check says
                continue
            if not is_rounding(difference(after, before), model):
                raise UnsupportedPackingError(
                    f"{type(model).__name__} computes otherwise where its config does not name 'sdpa'"
                )
        yield
    except BaseException:
        for model in changed:
            _set_attention(model, "sdpa")
        raise


def _logits_alone(model: Any) -> Tensor | None:
    """Those of two sequences; None where they cannot be computed."""
    with contextlib.suppress(Exception), evaluating(model):  # whatever a model's own code may raise
        return _alone(model)["logits"] if weights_are_whole(model) else None
    return None


@dataclass  # not a tuple, as Segments
class PackedMask:
    """What stands for the attention mask of a row of several sequences."""

    lengths: tuple[int, ...]  # T of stretches of tokens; they attend to themselves and to one stretch before them
    masks: tuple[Tensor | None, ...]  # [1, 1, T, P + T] bool of each, None for causal
    prefixes: tuple[int | None, ...]  # the place of the stretch of P tokens before each, None for none
    causal: bool  # with the ends of queries and keys aligned, without exception: no window, no chunks
    varlen: dict[torch.device, dict[str, Any]] = field(default_factory=dict, compare=False)  # made where it is used

    @property
    def in_one_call(self) -> bool:
        """Whether one call of FlashAttention can serve all stretches, and may be worth it.

        Long stretches without a mask are left to the kernel that "sdpa" chooses for the GPU, which may be a newer one.
        """
        short = sum(self.lengths) <= LONG * len(self.lengths)
        return self.causal and (short or any(prefix is not None for prefix in self.prefixes))


def _packed_sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention as transformers calls it: query [1, H, N, D]; the output is [1, N, H, D]."""
    sdpa = AttentionInterface()["sdpa"]
    if not isinstance(attention_mask, PackedMask):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    return _attend_by_stretches(sdpa, module, query, key, value, attention_mask, **kwargs), None


@torch.compiler.disable
def _attend_by_stretches(
    sdpa: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedMask,
    **kwargs: Any,
) -> Tensor:
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("its attention adds a bias of positions")
    if packed.in_one_call and query.shape[2] == key.shape[2] == sum(packed.lengths):
        cast = in_autocast_dtype(query, key, value)
        if takes_varlen(*cast, **kwargs):
            if query.device not in packed.varlen:
                packed.varlen[query.device] = varlen_inputs(Segments(packed.lengths, packed.prefixes), query.device)
            return varlen_attention(*cast, packed.varlen[query.device], kwargs.get("scaling"))
    kwargs["is_causal"] = True  # a mask that is none
    queries, keys, values = (x.split(packed.lengths, dim=2) for x in (query, key, value))
    outputs = []
    stretches = zip(queries, keys, values, packed.masks, packed.prefixes, strict=True)
    for q, k, v, mask, prefix in stretches:
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        outputs.append(sdpa(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1)


@torch.compiler.disable
def _packed_sdpa_mask(
    *, kv_length: int, mask_function: Callable[..., Tensor], attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | PackedMask | None:
    """A mask as transformers asks for it; a `PackedMask` for a row of several sequences."""
    device = kwargs["device"] if "device" in kwargs else kwargs["cache_position"].device
    segments = segments_of_row.get()
    if segments is not None and sum(segments.lengths) == kv_length:  # an interrupt may have left those of another row
        if kwargs.get("use_vmap"):
            raise NotImplementedError("its attention masks are not those of positions alone")
        return _mask_of_segments(mask_function, segments, device)
    # With a mask of its own, a batch is padded; with a skip allowed, no sequence follows another.
    packed = attention_mask is None and not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
    found = _take_apart(mask_function, kv_length, device) if packed and kwargs["batch_size"] == 1 else None
    if found is not None:
        return found
    return sdpa_mask(kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _packed_sdpa_attention)
AttentionMaskInterface.register(NAME, _packed_sdpa_mask)


def _take_apart(mask_function: Callable[..., Tensor], num_tokens: int, device: torch.device) -> PackedMask | None:
    """The mask of each stretch of tokens that attend to the one before them; None if it is one, or not causal.

    In the masks of transformers (causal, sliding windows, chunks), a token that does not attend to the one before it
    attends to none before.
    """
    index = torch.arange(num_tokens, device=device)
    zero = index.new_zeros(())
    starts = [0, *((~mask_function(zero, zero, index[1:], index[:-1])).nonzero().squeeze(1) + 1).tolist()]
    if len(starts) == 1:
        return None
    bounds = [(start, start, end) for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]
    return _packed_mask(mask_function, bounds, (None,) * len(bounds), device)


def _mask_of_segments(mask_function: Callable[..., Tensor], segments: Segments, device: torch.device) -> PackedMask:
    """The mask of each prefix, and of each segment after its prefix, in the positions of its sequence."""
    lengths, prefixes = segments.lengths, segments.prefixes
    before = [0 if prefix is None else lengths[prefix] for prefix in prefixes]
    bounds = [(0, start, start + length) for start, length in zip(before, lengths, strict=True)]
    mask = _packed_mask(mask_function, bounds, prefixes, device)
    if mask is None:
        raise NotImplementedError("its tokens attend to later ones")
    return mask


def _packed_mask(
    mask_function: Callable[..., Tensor],
    bounds: Sequence[tuple[int, int, int]],
    prefixes: tuple[int | None, ...],
    device: torch.device,
) -> PackedMask | None:
    """Of stretches given by first key, first query and end; None if one is not causal.

    In the masks of transformers, a stretch whose last token attends to its first is causal without exception.
    """
    first, _, end = torch.tensor(bounds, device=device).T
    index, zero, last = torch.arange(max(end for *_, end in bounds), device=device), end.new_zeros(()), end - 1

    def attends(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(zero, zero, query, key)

    causal, backwards = torch.stack([attends(last, first), attends(first, last) & (first < last)]).tolist()
    if any(backwards):
        return None
    masks = tuple(
        None if whole and key == query else attends(index[query:end, None], index[None, key:end])[None, None]
        for (key, query, end), whole in zip(bounds, causal, strict=True)
    )
    return PackedMask(tuple(end - query for _, query, end in bounds), masks, prefixes, all(causal))


def attention_of(model: Any) -> str:
    """By its name in transformers."""
    return str(getattr(model.config, "_attn_implementation", None))


def _set_attention(model: Any, attention: str) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(attention)


def packing_problem(model: nn.Module) -> str | None:
    """Why the model cannot take several sequences in one row; None if it can.

    Measured on two short sequences, whatever the model is made of: the logits of the second must not depend on the
    first, whose embeddings' gradient must be exactly zero, and the logits of both must be those of each sequence alone.
    Attention through a mask of all pairs of tokens ("eager") is refused for what it costs.
    """
    name = type(model).__name__
    if not weights_are_whole(model):
        return f"{name} does not have its weights whole at construction, so that packing could not be checked"
    known = known_problem(model)
    if known is not None:
        return known
    attention = attention_of(model)
    try:
        measured = model if "flash" in attention else in_fp32(model)  # which has no fp32
        with evaluating(measured), torch.enable_grad():
            problem = _measured_problem(measured, name)
    except Exception as error:  # whatever a model's own code may raise
        problem = f"{name} cannot run on several sequences in one row: {what_failed(error)}"
    if problem is not None and attention == "sdpa":
        problem += f" ({OWN_CODE})"
    if problem is None and attention == "eager":
        problem = f"{name} attends with 'eager', which forms the scores of all pairs of tokens of a row"
    return problem


def what_failed(error: Exception) -> str:
    """In words, where a model's own code fails on a `PackedMask`."""
    return "its own code reads the mask of its attention" if PackedMask.__name__ in str(error) else str(error)


def known_problem(model: Any) -> str | None:
    """What goes by the whole row, but shows in none as short as those of the checks; None if nothing does."""
    name = type(model).__name__
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):  # Llama 4, from 8,192 tokens on
        return f"{name} scales its attention by the place in the row (attn_temperature_tuning)"
    indexer = next((type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Indexer")), None)
    if indexer is not None:  # sparse attention, from more tokens on than it selects
        return f"{name} selects the tokens that it attends to ({indexer})"
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "alora_invocation_tokens", None):
            return f"an adapter of {name} begins where its row has tokens last (alora_invocation_tokens)"
    return None


def _measured_problem(model: Any, name: str) -> str | None:
    ids, positions, boundaries = _probe(model)
    with embeddings_as_leaves(model) as embedded:
        packed = model(**Packed(ids, positions, boundaries, max(PROBE_LENGTHS)).model_inputs()).logits
    if packed.shape[:2] != ids.shape:
        return f"{name} turns a row of {ids.shape[1]} tokens into one of {packed.shape[1]}"
    (gradient,) = torch.autograd.grad(packed[:, PROBE_LENGTHS[0] :].float().square().sum(), embedded[0])
    of_first, of_second = (part.count_nonzero().item() for part in gradient.split(PROBE_LENGTHS, dim=1))
    if of_first or not of_second:
        return f"{name} lets a sequence depend on the one before it in its row"
    truth = _alone(model)
    error, allowed = difference(packed, truth["logits"]), tolerances(model, truth, functools.partial(_alone, model))
    if not error <= allowed["logits"]:
        return f"{name} computes other logits for a sequence in a row with others (relative difference {error:.1e})"
    return None


def _probe(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and boundaries of a row of two sequences."""
    device = next(model.parameters()).device
    ids = torch.tensor([probe_ids(model.config.get_text_config().vocab_size, sum(PROBE_LENGTHS))], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS]).unsqueeze(0)
    return ids, positions, torch.tensor([0, *itertools.accumulate(PROBE_LENGTHS)], dtype=torch.int32, device=device)


@torch.no_grad()
def _alone(model: Any, rounded: float = 0.0) -> dict[str, Tensor]:
    """The logits of each of the sequences alone, one after another, with embeddings that are rounded."""
    with embeddings_as_leaves(model, rounded):
        parts = [model(input_ids=part, use_cache=False).logits for part in _probe(model)[0].split(PROBE_LENGTHS, dim=1)]
    return {"logits": torch.cat(parts, dim=1)}
