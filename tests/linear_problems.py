"""Problems of the head: hidden states, weight, labels and upstream gradient, for any backend and for plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from problems import IGNORE
from torch import Tensor

from dil_kernels import linear_token_logps, token_logps


@dataclass
class Problem:
    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [B, T]
    upstream: Tensor  # [B, T - shift], non-uniform
    shift: bool
    options: dict[str, float | None]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        tensors = (None if x is None else x.to(device, dtype) for x in (self.hidden, self.weight, self.bias))
        hidden, weight, bias = tensors
        return Problem(hidden, weight, bias, self.labels.to(device), self.upstream.to(device), self.shift, self.options)

    def run(self, backend: str, **how: object) -> tuple[Tensor, ...]:
        """Log-probs and the gradients of hidden states, weight and bias."""
        inputs = [x.detach().requires_grad_() for x in (self.hidden, self.weight, self.bias) if x is not None]
        logps = linear_token_logps(
            inputs[0],
            inputs[1],
            self.labels,
            lm_head_bias=inputs[2] if self.bias is not None else None,
            shift=self.shift,
            backend=backend,
            **self.options,
            **how,
        )
        return logps.detach(), *torch.autograd.grad(logps, inputs, self.upstream.to(logps.dtype))

    def as_models_do(self) -> tuple[Tensor, ...]:
        """The same with plain PyTorch, logits in the precision of the head."""
        options = dict(self.options)
        scale = options.pop("logit_scale", 1.0)
        inputs = [x.detach().requires_grad_() for x in (self.hidden, self.weight, self.bias) if x is not None]
        scored = (targets_of(self) != IGNORE).unsqueeze(-1)
        logits = scale * torch.nn.functional.linear(torch.where(scored, inputs[0], 0), *inputs[1:])
        logps = token_logps(logits, self.labels, shift=self.shift, backend="eager", **options)
        return logps.detach(), *torch.autograd.grad(logps, inputs, self.upstream.to(logps.dtype))


def make_problem(
    B: int, T: int, D: int, V: int, *, seed: int = 0, bias: bool = False, shift: bool = False, scale: float = 1.0
) -> Problem:
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=gen, dtype=torch.float64)
    weight = scale * torch.randn(V, D, generator=gen, dtype=torch.float64)
    b = torch.randn(V, generator=gen, dtype=torch.float64) if bias else None
    labels = torch.randint(0, V, (B, T), generator=gen)
    upstream = torch.randn(B, T - shift, generator=gen, dtype=torch.float64)
    return Problem(hidden, weight, b, labels, upstream, shift, {})


def targets_of(problem: Problem) -> Tensor:
    if not problem.shift:
        return problem.labels
    return torch.nn.functional.pad(problem.labels[:, 1:], (0, 1), value=IGNORE)
