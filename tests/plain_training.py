"""What a trainer must compute, in plain PyTorch and fp64: the log-probs, losses, metrics and gradients of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import TrainerCallback

RELATIVE = 1e-5  # fp32 against fp64, of the largest entry: two layers, a few hundred terms a sum
PLAIN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsif": lambda u_w, u_l: -u_w.exp() + (2 * u_l).exp() / 2,
    "ukl": lambda u_w, u_l: -u_w + u_l.exp(),
    "bce": lambda u_w, u_l: softplus(-u_w) + softplus(u_l),
    "dpo": lambda u_w, u_l: softplus(-0.3 * (u_w - u_l)),
    "bce, alpha 0.5": lambda u_w, u_l: softplus(-u_w) + softplus(u_w) / 2 + softplus(u_l) / 2,
    "dpo, nll": lambda u_w, u_l: softplus(-0.3 * (u_w - u_l)),
    "robust": lambda u_w, u_l: (0.9 * softplus(-0.3 * (u_w - u_l)) - 0.1 * softplus(0.3 * (u_w - u_l))) / 0.8,
    "sppo_hard": lambda u_w, u_l: (u_w - 1.25) ** 2 + (u_l + 1.25) ** 2,
    "power": lambda u_w, u_l: -torch.expm1(0.25 * u_w) / 0.25 + (1.25 * u_l).exp() / 1.25,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "bce, alpha 0.5": {"loss_type": "bce", "alpha": 0.5},
    "dpo, nll": {"loss_type": "dpo", "beta": 0.3, "nll_weight": 0.2},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
    "sppo_hard": {"beta": 0.4},
    "power": {"power": 0.25},
}

DEFAULTS = (("beta", 1.0), ("nll_weight", 0.0))


def plain_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-prob of each scored token, 0 elsewhere, and the mask; fp64, the whole log_softmax."""
    batch = {
        name: value.to(next(model.parameters()).device)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * mask, mask


def plain_pairs(
    policy: torch.nn.Module, ref: torch.nn.Module, batch: dict[str, Tensor], name: str = "lsif", average: bool = True
) -> dict[str, Tensor]:
    """METRICS of every pair, [B] each."""
    logps, mask = plain_logps(policy, batch)
    with torch.no_grad():
        ref_logps, _ = plain_logps(ref, batch)
    u = (logps - ref_logps).sum(1)
    return plain_metrics(u / mask.sum(1) if average else u, logps.sum(1), mask.sum(1), name)


def plain_metrics(u: Tensor, logps: Tensor, lengths: Tensor, name: str) -> dict[str, Tensor]:
    """METRICS of every pair [B] from log ratios, log-probs and lengths [2 B]; rewards are beta log ratios."""
    beta, nll_weight = (OPTIONS.get(name, {}).get(option, default) for option, default in DEFAULTS)
    (u_w, u_l), (chosen, rejected) = u.chunk(2), logps.chunk(2)
    return {
        "loss": PLAIN_LOSSES[name](u_w, u_l) - nll_weight * chosen / lengths.chunk(2)[0],
        "rewards/chosen": beta * u_w,
        "rewards/rejected": beta * u_l,
        "rewards/margins": beta * (u_w - u_l),
        "rewards/accuracies": (u_w > u_l).double(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def plain_gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_all_close(actual: dict[str, Tensor], truth: dict[str, Tensor], relative: float = RELATIVE) -> None:
    """Gradients, or weights; the error counts in parts of the largest entry of all."""
    assert actual.keys() == truth.keys()
    scale = max(value.abs().max().item() for value in truth.values())
    assert scale > 1e-3, "values that vanish prove nothing"
    for name, value in truth.items():
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= relative * scale, f"{name}: {error / scale:.2e} of the largest"


class GradientRecorder(TrainerCallback):
    """The gradients of each optimizer step, before it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        self.steps.append({name: value.clone() for name, value in gradients.items() if value is not None})
