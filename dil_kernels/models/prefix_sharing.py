"""Rows in which each prompt stands once for all responses to it, as `dil_kernels.data.share_prefixes` makes them.

A segment - the last token of the prompt and a response - attends to its prefix and to itself, as in the sequence that
it ends: causal from the bottom right, windows and chunks counted in the positions of the sequence. The keys and values
of a prefix serve all its segments, and get the gradients of all.

Whether a model computes the same on such a row is measured, not looked up: see `sharing_problem`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.data.batches import Segments, SharedPrefixes
from dil_kernels.data.collators import share_prefixes
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.packed_attention import (
    NAME,
    OWN_CODE,
    UnsupportedPackingError,
    attention_of,
    known_problem,
    packed_attention,
    segments_of_row,
    what_failed,
)
from dil_kernels.models.prefix_sharing_flash import flash_inputs, is_flash, keys_repeat, let_keys_repeat
from dil_kernels.models.probes import (
    difference,
    embeddings_as_leaves,
    in_fp32,
    probe_ids,
    tolerances,
    weights_are_whole,
)
from dil_kernels.models.rotary_lengths import keep_lengths_apart

__all__ = ["install_prefix_sharing", "sharing_problem"]

PROBE_PROMPTS, PROBE_RESPONSES = (5, 5, 3), (4, 2, 3)  # tokens; the first two sequences share their prompt


def install_prefix_sharing(*models: nn.Module) -> None:
    """Prepare causal language models that attend with "sdpa" or FlashAttention for `SharedPrefixes` rows.

    Packed rows, padded batches and generation stay as they are.

    Args:
        models: each a `PreTrainedModel` or `PeftModel` with its weights whole, not yet wrapped.

    Raises:
        UnsupportedPackingError: one of them does not compute on such a row what it computes on the sequences.
    """
    for attention in filter(is_flash, map(attention_of, models)):
        let_keys_repeat(attention)
    with packed_attention(*models):
        handles = [handle for model in models for handle in _hook(model)]
        for problem in filter(None, map(sharing_problem, models)):
            for handle in handles:
                handle.remove()
            raise UnsupportedPackingError(problem)


def _hook(model: Any) -> list[Any]:
    """Let the body of a model, on its way in, take `Segments` for its attention mask."""
    body = _body(model)
    if _take_segments in body._forward_pre_hooks.values():
        return []
    before = body.register_forward_pre_hook(_take_segments, with_kwargs=True)
    return [before, body.register_forward_hook(_forget_segments, always_call=True)]


def _body(model: Any) -> nn.Module:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = getattr(model, "base_model", model)
    return body


@torch.compiler.disable
def _take_segments(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    segments, attention = kwargs.get("attention_mask"), attention_of(body)
    segments_of_row.set(None)
    if isinstance(segments, Segments) and is_flash(attention):
        if not keys_repeat(attention):
            raise RuntimeError(f"{attention!r} was loaded again after install_prefix_sharing; install it again")
        kwargs |= {"attention_mask": None, **flash_inputs(segments, kwargs["position_ids"].device)}
    elif isinstance(segments, Segments):
        segments_of_row.set(segments)
        # With a mask, transformers asks for that of the layer, whatever the positions are.
        kwargs["attention_mask"] = torch.ones_like(kwargs["position_ids"])
    return args, kwargs


@torch.compiler.disable
def _forget_segments(*_: Any) -> None:
    segments_of_row.set(None)


def sharing_problem(model: Any) -> str | None:
    """Why an installed model cannot take rows that share prefixes; None if it can.

    Measured on two responses to one prompt and one to another: logits and gradients, those of the prompts' embeddings
    included, must be those of the separate sequences, and no response may depend on another.
    """
    name = type(model).__name__
    if not weights_are_whole(model):
        return f"{name} does not have its weights whole at construction, so that sharing prefixes could not be checked"
    attention = attention_of(model)
    if attention == "sdpa":
        return f"prefixes cannot be shared in {name}: {OWN_CODE}"
    if attention != NAME and not is_flash(attention):
        return f"{name} attends with {attention!r}, and prefixes are shared by 'sdpa' and FlashAttention only"
    if getattr(model.config, "output_router_logits", False):
        return f"{name} adds a loss of its router, in which the tokens of a shared prompt would count once"
    known = known_problem(model)
    if known is not None:
        return known
    try:
        if keep_lengths_apart(model):
            return f"the rotary embedding of {name} goes by the length of a sequence, and a shared prompt is in several"
        measured = model if is_flash(attention) else in_fp32(model)
        with evaluating(measured), torch.enable_grad():
            return _measured_problem(measured, name)
    except Exception as error:  # whatever a model's own code may raise
        return f"{name} cannot run on a row that shares prefixes: {what_failed(error)}"


def _measured_problem(model: Any, name: str) -> str | None:
    distinct = sum(PROBE_PROMPTS[1:]) + sum(PROBE_RESPONSES)
    ids = iter(probe_ids(model.config.get_text_config().vocab_size, distinct))
    first, second = ([next(ids) for _ in range(length)] for length in PROBE_PROMPTS[1:])
    sequences = [
        (p, [next(ids) for _ in range(n)]) for p, n in zip((first, first, second), PROBE_RESPONSES, strict=True)
    ]
    row = share_prefixes(sequences)[0].to(next(model.parameters()).device)
    body, calls = _body(model), []
    handle = body.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with embeddings_as_leaves(model) as embedded:
            logits = model(**row.model_inputs()).logits
    except Exception:
        if calls:
            raise
        return f"{name} does not call its base model ({type(body).__name__}), which would take rows that share prefixes"
    finally:
        handle.remove()
    if logits.shape[:2] != row.input_ids.shape:
        return f"{name} turns a row of {row.input_ids.shape[1]} tokens into one of {logits.shape[1]}"
    of_responses = []
    for place, length in zip(_places(row), PROBE_RESPONSES, strict=True):
        of_responses.append(logits[:, place[-length - 1 :]])
        (seen,) = torch.autograd.grad(_weighted(of_responses[-1]), embedded[0], retain_graph=True)
        others = torch.ones(len(row.input_ids[0]), dtype=torch.bool)
        others[place] = False
        if seen[:, others.to(seen.device)].count_nonzero():
            return f"{name} lets a response depend on another sequence of its row"
    (gradients,) = torch.autograd.grad(torch.stack([*map(_weighted, of_responses)]).sum(), embedded[0])
    truth = _alone(model, row)
    allowed = tolerances(model, truth, functools.partial(_alone, model, row))
    for what, actual in (("logits", torch.cat(of_responses, 1)), ("gradients", gradients)):
        error = difference(actual, truth[what])
        if not error <= allowed[what]:
            return (
                f"{name} computes other {what} for responses that share their prompt (relative difference {error:.1e})"
            )
    return None


def _alone(model: Any, row: SharedPrefixes, rounded: float = 0.0) -> dict[str, Tensor]:
    """Of each sequence alone, with embeddings that are rounded: the logits of the responses, the row's gradients."""
    logits, gradients = [], []
    with embeddings_as_leaves(model, rounded) as embedded:
        for place, length in zip(_places(row), PROBE_RESPONSES, strict=True):
            logits.append(model(input_ids=row.input_ids[:, place], use_cache=False).logits[:, -length - 1 :])
            (of_sequence,) = torch.autograd.grad(_weighted(logits[-1]), embedded[-1])
            zeros = of_sequence.new_zeros(1, row.input_ids.shape[1], of_sequence.shape[-1])
            gradients.append(zeros.index_copy(1, place.to(zeros.device), of_sequence))
    return {"logits": torch.cat(logits, 1), "gradients": torch.stack(gradients).sum(0)}


def _weighted(logits: Tensor) -> Tensor:
    """A sum of logits in which each has another weight."""
    weights = torch.arange(logits.numel(), dtype=torch.float32, device=logits.device).cos()
    return (logits.float().flatten() * weights).sum()


def _places(row: SharedPrefixes) -> list[Tensor]:
    """Of each sequence, which tokens of the row it has."""
    stretches = torch.arange(row.input_ids.shape[1]).split(row.stretch_lengths)
    segments = zip(stretches, row.stretch_prefixes, strict=True)
    return [torch.cat([stretches[prefix], segment]) for segment, prefix in segments if prefix is not None]
