"""A table of prompts and responses small enough that every expectation is a sum, and a solver for its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dil_kernels import dil_loss
from dil_kernels.losses import divergence_names, get_divergence

MIN_PROBABILITY = 0.02  # so that each response is in every large sample
LONGEST_STEP = 2.0  # nats, in any coordinate
ROUNDING = 1e-14  # relative, of an expected loss
DIFFERENCE = 1e-5  # nats, for second derivatives
FROM_REFERENCE, FROM_REJECTED = "y_l from pi_ref", "y_l rejected"
SETUPS = (FROM_REFERENCE, FROM_REJECTED)
DIVERGENCES = tuple(n for n in divergence_names() if get_divergence(n).separable and get_divergence(n).bregman)

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Table:
    """Distributions over V responses for each of N prompts, [N, V] fp64."""

    chosen: Tensor
    rejected: Tensor
    reference: Tensor


def make_table(seed: int, prompts: int, responses: int) -> Table:
    """Random chosen, rejected and reference distributions, unrelated to each other."""
    generator = torch.Generator().manual_seed(seed)

    def distribution() -> Tensor:
        scores = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
        return MIN_PROBABILITY + (1.0 - MIN_PROBABILITY * responses) * scores.softmax(-1)

    return Table(distribution(), distribution(), distribution())


def arrange(table: Table, setup: str) -> tuple[Tensor, Tensor]:
    """The distribution of y_l and the reference policy of a set-up."""
    if setup == FROM_REFERENCE:
        return table.reference, table.reference
    return table.rejected, (table.chosen + table.rejected) / 2


def sample(distribution: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Empirical distributions [N, V] of `count` draws a row."""
    draws = torch.multinomial(distribution, count, replacement=True, generator=generator)
    counts = torch.zeros_like(distribution).scatter_add_(1, draws, torch.ones_like(draws, dtype=distribution.dtype))
    return counts / count


@dataclass(frozen=True)
class Loss:
    """A registered loss with its options."""

    loss_type: str
    alpha: float = 0.0
    beta: float | None = None
    link: str = "imitation"

    def expected(self, logratios: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Expected loss [N] over y_w from `chosen` and y_l from `rejected` ([N, V]), at log ratios [N, V]."""
        pairs = torch.broadcast_tensors(logratios[:, :, None], logratios[:, None, :])  # u_w, u_l: [N, V, V]
        u_w, u_l = (side.flatten() for side in pairs)
        zeros = torch.zeros_like(u_w)
        options = {"loss_type": self.loss_type, "alpha": self.alpha, "beta": self.beta, "link": self.link}
        losses, _, _ = dil_loss(u_w, u_l, zeros, zeros, **options)
        return (chosen[:, :, None] * rejected[:, None, :] * losses.view_as(pairs[0])).sum((1, 2))


@dataclass(frozen=True)
class Solution:
    """Where the solver ended, from the reference policy on."""

    policy: Tensor  # [N, V]
    normaliser: Tensor  # [N], sum of the reference times the ratio: 1 for a normalised policy
    gradient_norm: Tensor  # [N]


def solve(loss: Loss, chosen: Tensor, rejected: Tensor, reference: Tensor, *, two_stage: bool = False) -> Solution:
    """Minimise the expected loss.

    Args:
        loss: what to minimise.
        chosen, rejected: the distributions of y_w and y_l, [N, V].
        reference: pi_ref, [N, V].
        two_stage: fit an unconstrained log r first, then take pi_ref r / Z (eqs. 21 and 22 of the paper with beta = 1)
            instead of fitting a normalised policy directly.
    """
    log_reference = reference.log()

    def logratios(parameters: Tensor) -> Tensor:
        return parameters if two_stage else parameters.log_softmax(-1) - log_reference

    def objective(parameters: Tensor) -> Tensor:
        return loss.expected(logratios(parameters), chosen, rejected)

    start = torch.zeros_like(log_reference) if two_stage else log_reference
    parameters, gradient_norm = _minimise(objective, start)
    unnormalised = reference * logratios(parameters).exp()
    normaliser = unnormalised.sum(-1)
    return Solution(unnormalised / normaliser[:, None], normaliser, gradient_norm)


def _minimise(
    objective: Objective, start: Tensor, *, steps: int = 200, tolerance: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Newton's method with absolute eigenvalues and halving steps, for N problems [N, V] at once.

    Returns:
        Where it ended [N, V], and the norm of the gradient there [N].
    """
    x = start.clone()
    for _ in range(steps):
        value, gradient = _value_and_gradient(objective, x)
        if bool((gradient.norm(dim=1) < tolerance).all()):
            break
        eigenvalues, vectors = torch.linalg.eigh(_hessian(objective, x))
        scale = eigenvalues.abs().clamp(min=1e-10 * eigenvalues.abs().amax(1, keepdim=True))
        step = -(vectors @ ((vectors.mT @ gradient[:, :, None]) / scale[:, :, None])).squeeze(2)
        step = step * (LONGEST_STEP / step.abs().amax(1, keepdim=True)).clamp(max=1.0)
        size = torch.ones(len(x), 1, dtype=x.dtype)
        for _ in range(30):
            worse = objective(x + size * step) > value + ROUNDING * value.abs()
            if not bool(worse.any()):
                break
            size = torch.where(worse[:, None], size / 2, size)
        x = x + size * step
    return x, _value_and_gradient(objective, x)[1].norm(dim=1)


def _value_and_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value [N] and gradient [N, V] of N independent problems."""
    x = x.detach().requires_grad_()
    value = objective(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def _hessian(objective: Objective, x: Tensor) -> Tensor:
    """Hessian [N, V, V] by central differences of the gradient, which the package's ops give in closed form."""
    columns = []
    for shift in DIFFERENCE * torch.eye(x.shape[1], dtype=x.dtype):
        ahead, behind = (_value_and_gradient(objective, x + sign * shift)[1] for sign in (1, -1))
        columns.append((ahead - behind) / (2 * DIFFERENCE))
    hessian = torch.stack(columns, dim=1)
    return (hessian + hessian.mT) / 2


def total_variation(policy: Tensor, target: Tensor) -> Tensor:
    """Total-variation distance [N]."""
    return 0.5 * (policy - target).abs().sum(-1)
