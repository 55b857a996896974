"""Compares every loss of an adapter, and its gradients, with `fused_dil_loss` of the same models' logits."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Any

import torch
from torch import Tensor

from dil_kernels import fused_dil_loss

# Of policy and reference: model, logits, labels, boundaries.
calls: list[tuple[Any, Tensor, Tensor, Tensor | None]] = []


def record(model: Any, inputs: dict[str, Any], labels: Tensor, cu_seqlens: Tensor | None = None) -> None:
    """The logits of a batch, which is about to be scored."""
    if "deepspeed" in sys.modules:
        set_deepspeed_aside()
    while hasattr(model, "module"):
        model = model.module
    calls.append((model, model(**{**inputs, "use_cache": False}).logits.float(), labels, cu_seqlens))


def compare(loss: Tensor, options: dict[str, Any]) -> None:
    """A loss, and its gradients, with the truth for the two calls before it."""
    (model, logits, labels, cu_seqlens), (_, ref_logits, *_) = calls[-2:]
    calls.clear()
    truth = fused_dil_loss(logits, labels, ref_logits=ref_logits, cu_seqlens=cu_seqlens, **options)
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 3e-2
    torch.testing.assert_close(loss.double(), truth.loss.double(), rtol=tolerance, atol=tolerance)
    of_gradients = "without gradients"
    if loss.requires_grad:
        parameters = [p for p in model.parameters() if p.requires_grad]
        with unnoticed:
            actual = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(truth.loss, parameters, allow_unused=True)
        norm = max(float(g.float().norm()) for g in expected if g is not None)
        differences = [a.float() - e.float() for a, e in zip(actual, expected, strict=True) if e is not None]
        worst = max(float(d.norm()) for d in differences) / norm
        assert worst < 10 * tolerance, worst
        of_gradients = f"gradients differ by {worst:.1e}"
    print(f"verified: loss {loss.item():.6f} is {truth.loss.item():.6f}, {of_gradients}", flush=True)


class Unnoticed:
    """While it is entered, DeepSpeed takes no backward for one of its own."""

    entered = False

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *_: object) -> None:
        self.entered = False


unnoticed = Unnoticed()


@functools.cache
def set_deepspeed_aside() -> None:
    """Its hooks on the outputs of a model begin its own backward, but not while `unnoticed` is entered."""
    from deepspeed.runtime.utils import OutputBackwardHookManager

    make_hook = OutputBackwardHookManager._make_backward_hook

    def make_hook_to_be_set_aside(self: Any, output: Tensor) -> Any:
        hook = make_hook(self, output)
        return lambda gradient: gradient if unnoticed.entered else hook(gradient)

    OutputBackwardHookManager._make_backward_hook = make_hook_to_be_set_aside


def watch_hook() -> None:
    """The adapters that are made of `Hook`."""
    from dil_kernels.integrations.hooks import Hook

    score, losses = Hook.score, Hook.losses

    def recording_score(self: Hook, model: Any, inputs: Any, labels: Any, cu_seqlens: Any = None, **rest: Any) -> Any:
        record(model, inputs, labels, cu_seqlens)
        return score(self, model, inputs, labels, cu_seqlens, **rest)

    def checked_losses(self: Hook, *logps: Any) -> Any:
        results = losses(self, *logps)
        average = {"average_log_prob": self.options.average_log_prob}
        compare(results[0].mean(), self.options.loss_options() | average)
        return results

    Hook.score, Hook.losses = recording_score, checked_losses


def watch_trl() -> None:
    """The one that is TRL's trainer."""
    from dil_kernels.integrations import trl

    score, loss_of_token_logps = trl.DILTrainer._score, trl.loss_of_token_logps

    def recording_score(self: Any, model: Any, inputs: Any, batch: Any, **rest: Any) -> Any:
        record(model, trl.model_inputs(inputs, batch), batch.row_labels, batch.layout.cu_seqlens)
        return score(self, model, inputs, batch, **rest)

    def checked_loss(logps: Any, labels: Any, cu_seqlens: Any, ref: Any, sums: Any, options: Any, **rest: Any) -> Any:
        output = loss_of_token_logps(logps, labels, cu_seqlens, ref, sums, options, **rest)
        compare(output.loss, dataclasses.asdict(options))
        return output

    trl.DILTrainer._score, trl.loss_of_token_logps = recording_score, checked_loss


{"hook": watch_hook, "trl": watch_trl}[os.environ["DIL_VERIFY"]]()
