"""Log-probs of labels under a model: the one place where its forward and the kernels meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from dil_kernels.backends import resolve_backend
from dil_kernels.functional import token_logps
from dil_kernels.functional.logps import LogitStatistics


class Scores(NamedTuple):
    """What a model has to say of the labels of S rows."""

    token_logps: Tensor  # [S, T - 1] fp32
    statistics: LogitStatistics | None  # [S, T - 1] each, if asked for
    outputs: Any  # of the model


def score(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    fused_head: bool,
    backend: str,
    stash_bytes: int | None,
    max_scored_tokens: int | None,
    return_statistics: bool = False,
    keep_logits: bool = False,
    virtual_tokens: bool = False,
) -> Scores:
    """Score the labels [S, T] of rows.

    Args:
        model: as it is wrapped; it is called.
        inputs: of its forward.
        labels: [S, T] int64; position t scores label t + 1, -100 is not scored.
        fused_head: whether the model has a fused head, which then scores; else its logits are.
        backend: of the kernels.
        stash_bytes: that the fused head may keep from forward to backward.
        max_scored_tokens: at most so many labels are scored; None if the device would have to be asked.
        return_statistics: of the logits, too.
        keep_logits: the outputs must have them, as the model computed them.
        virtual_tokens: the model puts tokens of its own before the inputs, as prompt tuning does; they have no label.
    """
    statistics = None
    if fused_head and not keep_logits:
        options = {"backend": backend, "stash_bytes": stash_bytes, "max_scored_tokens": max_scored_tokens}
        options["return_statistics"] = return_statistics
        outputs = model(**inputs, score_labels=labels, score_options=options)
        if return_statistics:
            statistics = LogitStatistics(outputs.mean_logit, outputs.entropy, outputs.top1_hit)
        return Scores(outputs.token_logps, statistics, outputs)
    outputs = model(**inputs)
    logits = outputs.logits
    if virtual_tokens:
        logits, keep_logits = logits[:, -labels.shape[1] :], True
    # Nobody else needs the logits; a model that does gets autograd's error.
    kernels = resolve_backend(backend, logits.device, logits.dtype) != "eager"
    inplace = kernels and logits.requires_grad and not keep_logits
    if not return_statistics:
        return Scores(token_logps(logits, labels, inplace_backward=inplace, backend=backend), None, outputs)
    logps, statistics = token_logps(logits, labels, return_statistics=True, inplace_backward=inplace, backend=backend)
    return Scores(logps, statistics, outputs)
