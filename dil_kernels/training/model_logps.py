"""Token log-probs of a batch under a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dil_kernels.backends import resolve_backend
from dil_kernels.data.batches import model_inputs
from dil_kernels.functional import token_logps


def model_token_logps(
    model: nn.Module, batch: dict[str, Any], *, fused_head: bool, backend: str, stash_bytes: int | None
) -> Tensor:
    """Log-probs [S, T - 1], or packed [N - 1], of the labels of a batch.

    Args:
        model: as it is wrapped; it is called.
        batch: as of `PreferenceCollator` or `PackedCollator`.
        fused_head: whether the model has a fused head, which then gives them; else they come from its logits.
        backend: of the kernels.
        stash_bytes: that the fused head may keep from forward to backward.
    """
    if fused_head:
        options = {"backend": backend, "stash_bytes": stash_bytes, "max_scored_tokens": batch.get("num_scored")}
        logps: Tensor = model(**model_inputs(batch), score_labels=batch["labels"], score_options=options).token_logps
    else:
        logits = model(**model_inputs(batch)).logits
        kernels = resolve_backend(backend, logits.device, logits.dtype) != "eager"
        # Nobody else needs the logits; a model that does gets autograd's error.
        inplace = kernels and logits.requires_grad
        logps = token_logps(logits, batch["labels"], inplace_backward=inplace, backend=backend)
    return logps.squeeze(0) if "cu_seqlens" in batch else logps
