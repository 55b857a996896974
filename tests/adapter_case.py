"""A batch of pairs, its policy and reference, and the truth for a loss of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_model import make_model
from torch import Tensor, nn

from dil_kernels import fused_dil_loss, token_logps

OPTIONS = {"loss_type": "ukl", "alpha": 0.5, "nll_weight": 2.0}


@dataclass
class Case:
    """Three pairs, the last of which has a rejected response without a token, and policy and reference."""

    policy: nn.Module
    ref: nn.Module
    ids: Tensor  # [6, 9]
    mask: Tensor  # [6, 9]
    labels: Tensor  # [6, 9]

    @property
    def batch(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}

    @property
    def prompts(self) -> list[int]:
        """How many tokens the prompts have."""
        return [int((row != -100).nonzero()[0]) if (row != -100).any() else 9 for row in self.labels]

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ref = self.ref(self.ids, attention_mask=self.mask).logits
        return self.policy(self.ids, attention_mask=self.mask).logits, ref

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.policy.parameters())))

    def assert_is(self, loss: Tensor, options: dict[str, Any], nll: float = 0.0, nll_of: str = "tokens") -> None:
        """That a loss and its gradients are those of `fused_dil_loss`, plus a share of the chosen NLL."""
        logits, ref_logits = self.logits()
        expected = fused_dil_loss(logits, self.labels, ref_logits=ref_logits, **options).loss
        if nll:
            chosen, lengths = token_logps(logits, self.labels)[:3].sum(1), (self.labels[:3, 1:] != -100).sum(1)
            of_tokens, of_responses = chosen.sum() / lengths.sum(), (chosen / lengths).mean()
            expected = expected - nll * (of_tokens if nll_of == "tokens" else of_responses)
        torch.testing.assert_close(loss.float(), expected)
        for actual, truth in zip(self.gradients(loss), self.gradients(expected), strict=True):
            torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)


def make_case() -> Case:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 200, (6, 9), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    ids[3:] = torch.cat([ids[:3, :2], ids[3:, 2:]], dim=1)
    for row, (prompt, end) in enumerate([(2, 9), (3, 6), (1, 5), (4, 9), (2, 4), (9, 9)]):
        labels[row, :prompt] = labels[row, end:] = -100
        mask[row, end:] = 0
    return Case(make_model(0), make_model(1).requires_grad_(False), ids, mask, labels)
