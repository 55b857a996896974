"""The score of a sequence-classification model at the end of each row, where the attention mask says that it ends.

transformers takes the last token of a row to be the last that is not `config.pad_token_id`. Where a response ends with
that token, as with padding by EOS, that is the token before its end. So the head of the model returns the score of the
end for every token of the row, and it does not matter which of them the model reads.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["install_end_of_row", "scores_at_end"]

HEADS = ("score", "classifier")  # names of the head in the models of transformers


class _Call(threading.local):
    """What the head is to know of the call that this thread makes."""

    def __init__(self) -> None:
        self.attention_mask: Tensor | None = None
        self.answered = False


_call = _Call()


def install_end_of_row(model: Any) -> None:
    """Prepare a sequence-classification model with one output for `scores_at_end`; what else it does stays."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = [getattr(model, name) for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    for head in heads:
        if _score_of_end not in head._forward_hooks.values():
            head.register_forward_hook(_score_of_end)


def scores_at_end(model: nn.Module, config: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Any]:
    """Scores [S] fp32 of the last tokens that are attended to, and what the model returned.

    Args:
        model: as it is wrapped; prepared by `install_end_of_row`.
        config: of the model.
        input_ids, attention_mask: [S, T] int64.

    Raises:
        ValueError: the model reads a score before the end of a row, and its head cannot be told.
    """
    _call.attention_mask, _call.answered = attention_mask, False
    try:
        outputs = model(input_ids=input_ids, attention_mask=attention_mask)
        answered = _call.answered
    finally:
        _call.attention_mask = None
    if not answered:
        _check_ends(model, config.get_text_config().pad_token_id, input_ids, attention_mask)
    return outputs.logits.squeeze(-1).float(), outputs


def _last(mask: Tensor) -> Tensor:
    """The index [S] of the last entry of each row that is not 0."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)


def _score_of_end(_head: nn.Module, _args: Any, scores: Tensor) -> Tensor | None:
    """A forward hook of the head: [S, T, 1], where the model reads one of the T afterwards."""
    mask = _call.attention_mask
    if mask is None or scores.shape != (*mask.shape, 1):
        return None
    _call.answered = True
    return scores.gather(1, _last(mask).view(-1, 1, 1)).expand_as(scores)


def _check_ends(model: nn.Module, pad: int | None, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Whether transformers finds the ends by the padding token."""
    if pad is not None and bool((_last((input_ids != pad).long()) != _last(attention_mask)).any()):
        raise ValueError(
            f"{type(model).__name__} reads the score of a row at its last token other than config.pad_token_id={pad}, "
            "which is not where the row ends; give model and tokenizer a padding token that no response ends with"
        )
