"""Rotary embeddings that go by the longest sequence of a batch, made to take each sequence by its own length.

Some (of transformers, those of rope_type "longrope" and "dynamic") choose their frequencies by the largest position of
a call, and may keep them for the next call. A sequence then has other log-probs beside a long one than beside short
ones, and other ones in the batches of a reference than in those of training.

Which modules do so is measured, not looked up: on numbers of positions, so that it takes no weights and no long
sequence.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_lengths_apart"]

NEAR, FAR = 8, 2**20  # positions within, and beyond, the original length of any model
TOLERANCE = 1e-5  # of a cosine


def keep_lengths_apart(*models: nn.Module) -> bool:
    """Make what causal language models compute for a sequence independent of the lengths of others, if it is not.

    Their rotary embeddings then run sequence by sequence: row by row in a padded batch, whose positions count from the
    first token that attention_mask keeps, and from each position 0 on in a packed row. All else, and every other model,
    stays as it is. Deep copies are changed, too; checkpoints stay as they were.

    Args:
        models: each a `PreTrainedModel` or `PeftModel`, not yet wrapped; its weights need not be whole.

    Returns:
        Whether one of them is changed, now or before.

    Raises:
        NotImplementedError: one of them cannot be changed so.
    """
    changed = [_keep_apart(model) for model in models]
    return any(changed)


def _keep_apart(model: Any) -> bool:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, body = type(model).__name__, getattr(model, "base_model", model)
    changed = any(_by_sequence in module._forward_hooks.values() for module in model.modules())
    found = {module: calls for module in model.modules() if _mixes_lengths(module, calls := _calls(module))}
    for module, calls in found.items():
        handle = module.register_forward_hook(_by_sequence, with_kwargs=True)
        if body is model or _mixes_lengths(module, calls):
            handle.remove()
            raise NotImplementedError(
                f"the rotary embedding of {name} ({type(module).__name__}) goes by the longest sequence that it has "
                "seen: the log-probs of a response would depend on those beside it and before it. Load the model with "
                "a rope_type that does not depend on lengths"
            )
    if found and not changed:
        body.register_forward_pre_hook(_add_positions, with_kwargs=True)
    return changed or bool(found)


def _calls(module: nn.Module) -> list[dict[str, Any]]:
    """The keywords of each kind of call of a rotary embedding, beside x and position_ids; none of another module."""
    parameters = inspect.signature(module.forward).parameters
    if not {"x", "position_ids"} <= parameters.keys() or next(module.parameters(), None) is not None:
        return []
    if "layer_type" in parameters and isinstance(rope_types := getattr(module, "rope_type", None), dict):
        return [{"layer_type": layer_type} for layer_type in rope_types]
    return [{}]


def _mixes_lengths(module: nn.Module, calls: list[dict[str, Any]]) -> bool:
    """Whether it gives a sequence other values beside others, or after them, than alone."""
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    if calls and device.type == "meta":
        raise NotImplementedError(
            f"{type(module).__name__} is on the meta device, so that it could not be checked whether it goes by the "
            "longest sequence of a batch; load the model's buffers first"
        )
    near = torch.arange(NEAR, device=device)
    rows = torch.stack([near + FAR, near + FAR // 2, near])

    @torch.no_grad()
    def values(positions: Tensor, call: dict[str, Any]) -> Tensor:  # [rows, T, D]
        x = torch.zeros(*positions.shape, 1, device=device)
        output = copy.deepcopy(module)(x, position_ids=positions, **call)
        parts = output if isinstance(output, tuple) else (output,)
        return torch.cat([torch.view_as_real(part).flatten(2) if part.is_complex() else part for part in parts], dim=-1)

    for call in calls:
        try:
            alone, together = [values(row.unsqueeze(0), call) for row in rows], values(rows, call)
        except Exception:  # it is called otherwise, as are those of images
            return False
        if not torch.allclose(torch.cat(alone), together, rtol=0.0, atol=TOLERANCE):
            return True
    return False


@torch.compiler.disable
def _by_sequence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """In place of the output for position_ids [rows, T], or [1, N] of packed sequences, that of each sequence alone."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    position_ids = call.arguments.get("position_ids")
    if position_ids is None or position_ids.ndim != 2:
        shape = None if position_ids is None else list(position_ids.shape)
        raise NotImplementedError(
            f"{type(module).__name__} goes by the longest sequence of a batch, and is taken apart for position_ids "
            f"[rows, tokens] only; got {shape}"
        )

    def run(positions: Tensor) -> Any:
        call.arguments["position_ids"] = positions
        return module.forward(*call.args, **call.kwargs)

    packed = len(position_ids) == 1
    outputs = []
    for positions in _packed_sequences(position_ids) if packed else position_ids.split(1):
        run(position_ids.new_zeros(1, 1))  # brings back the frequencies of short sequences
        outputs.append(run(positions))
    if isinstance(output, tuple):
        return tuple(torch.cat(parts, dim=int(packed)) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, dim=int(packed))


def _packed_sequences(position_ids: Tensor) -> tuple[Tensor, ...]:  # [1, N] into [1, T] each
    starts = (position_ids[0, 1:] <= position_ids[0, :-1]).nonzero().squeeze(1) + 1
    return position_ids.tensor_split(starts.cpu(), dim=1)


def _add_positions(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a padded batch positions of its own for each row, which say how long it is."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        positions = (mask.long().cumsum(1) - 1) * (mask != 0)
        kwargs["position_ids"] = positions[:, -tokens.shape[1] :]
    return args, kwargs
