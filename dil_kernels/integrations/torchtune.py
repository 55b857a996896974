"""torchtune: a loss for its DPO recipes.

    loss:
      _component_: dil_kernels.integrations.torchtune.DILLoss
      loss_type: lsif

The models of torchtune are none of Hugging Face's, so the logits are held; their log-probs are taken by the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchtune import rlhf

from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.functional import token_logps
from dil_kernels.integrations.hooks import Hook, HookOptions, check_trainer, refuse, say

__all__ = ["DILLoss"]

PACKAGE = check_trainer(
    "torchtune",
    ("0.6.1",),
    {rlhf.get_batch_log_probs: ("logits", "labels", "label_pad_token_id", "return_average_logprobs")},
)
UNUSED = {"fused_head": None, "stash_bytes": None, "padding_free": False}


class DILLoss(nn.Module):
    """A density-ratio loss in the place of `torchtune.rlhf.loss.DPOLoss`.

    The recipes hand a loss sums of log-probs alone. This one needs the lengths, too, and puts a function that keeps
    them in the place of `torchtune.rlhf.get_batch_log_probs`, which the recipes call.

    Args:
        options: the fields of `HookOptions`.

    Raises:
        ValueError: an option that would have no effect.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        refuse(options, UNUSED, "the models of torchtune have no fused head")
        self._hook = Hook(PACKAGE, HookOptions.of(options, "loss"))
        self._lengths: list[Tensor] = []
        rlhf.get_batch_log_probs = self._sums
        say(f"dil_kernels in {PACKAGE}: loss {self._hook.options}, log-probs from logits")

    def _sums(
        self,
        logits: Tensor,
        labels: Tensor,
        label_pad_token_id: int = IGNORE_INDEX,
        return_average_logprobs: bool = False,
    ) -> Tensor:
        """Sums of log-probs [S] of the labels [S, T] under the logits [S, T, V]; the loss will need the lengths."""
        if return_average_logprobs:
            raise ValueError("return_average_logprobs=True was given; see the option average_log_prob of the loss")
        labels = labels.masked_fill(labels == label_pad_token_id, IGNORE_INDEX)
        self._lengths.append((labels[:, 1:] != IGNORE_INDEX).sum(1))
        return token_logps(logits, labels, backend=self._hook.options.backend).double().sum(1)

    def forward(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair, and the rewards, from the sums [B] of policy and reference, chosen and rejected."""
        lengths = torch.cat(self._lengths)[-2 * len(logps[0]) :].chunk(2)
        self._lengths.clear()
        return self._hook.losses(*logps, *lengths)
