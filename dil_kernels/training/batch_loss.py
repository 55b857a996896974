"""The loss of a batch: log-probs of its labels under the policy and the reference, and the fused loss of both."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.backends import resolve_backend
from dil_kernels.data.batches import Batch
from dil_kernels.functional import DILOutput
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.losses import FusedLossOptions
from dil_kernels.models.scoring import score
from dil_kernels.training.config import DILConfig
from dil_kernels.training.reference_policy import ReferencePolicy


@dataclass
class BatchLoss:
    """The fused loss of a batch, summed.

    Attributes:
        args: of the trainer.
        accelerator: of the trainer.
        fused_head: whether policy and reference have one.
        reference: of the log ratios; None where the rows of every batch bring its log-probs.
    """

    args: DILConfig
    accelerator: Any
    fused_head: bool
    reference: ReferencePolicy | None

    @property
    def options(self) -> FusedLossOptions:
        """Of the loss, as the arguments are now."""
        of_lengths = self.args.average_log_prob
        return FusedLossOptions(**self.args.loss_options(), average_log_prob=of_lengths, reduction="sum")

    def __call__(self, model: nn.Module, batch: Batch) -> DILOutput:
        """The loss of a batch on the device; `model` is the policy as it is wrapped."""
        options = self.options
        ref_token_logps = ref_logps = None
        if self.reference is not None:
            ref_token_logps = self.reference_token_logps(model, batch)
        else:
            ref_logps = batch.ref_logps(options)
        policy_token_logps = self.token_logps(model, batch)
        return loss_of_token_logps(
            policy_token_logps,
            batch.labels,
            batch.layout.cu_seqlens,
            ref_token_logps,
            ref_logps,
            options,
            is_chosen=batch.is_chosen,
            backend=resolve_backend(self.args.backend, batch.labels.device, policy_token_logps.dtype),
        )

    def reference_token_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `token_logps`, under the reference and without gradients; `model` is the policy as it is wrapped."""
        assert self.reference is not None
        # FSDP2 computes in the precision of its own policy instead.
        autocast = contextlib.nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.autocast()
        with torch.no_grad(), autocast, self.reference.module(model) as module:
            return self.token_logps(module, batch)

    def token_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probs [S, T - 1], or packed [N - 1], of the labels; the wrapped model is called."""
        scores = score(
            model,
            batch.layout.model_inputs(),
            batch.row_labels,
            fused_head=self.fused_head,
            backend=self.args.backend,
            stash_bytes=self.args.stash_bytes,
            max_scored_tokens=batch.num_scored,
        )
        return batch.of_rows(scores.token_logps)
