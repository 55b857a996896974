"""Losses and gradients of log ratios in torch, a number a sequence: what csrc/divergences.h does in C++.

Gradients are the analytic ones. What overflows is an infinity of the right sign, never a NaN: of two terms that
overflow against each other, that of an infinite log ratio counts beside that of a finite one, and else their logarithms
are compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # exact everywhere; softplus turns linear above 20

from dil_kernels.losses.options import LossParameters
from dil_kernels.losses.registry import get_divergence


def pair_losses(u_w: Tensor, u_l: Tensor, parameters: LossParameters) -> Tensor:
    """Loss of each pair from its log ratios, [B] each."""
    p, divergence = parameters, get_divergence(parameters.loss_type)
    if divergence.separable and p.link == "imitation":
        return _SeparablePairs.apply(u_w, u_l, p)
    w, l = (soft_bound(u, p.max_log_ratio) for u in (u_w, u_l))
    if divergence.pair is not None:
        return divergence.pair(w, l, *p.own())
    if p.link == "ratio":  # the loss of two responses whose log ratios are beta d and -beta d
        x = p.beta * (w - l)
        return _SeparablePairs.apply(x, -x, p._replace(beta=1.0, max_log_ratio=0.0, link="imitation")) / p.scale
    return _SeparableContrast.apply(w, l, p)


def response_losses(u: Tensor, is_chosen: Tensor, parameters: LossParameters) -> Tensor:
    """The term of each response of unpaired data, [S], from its log ratio; the loss must be separable."""
    return _SeparableResponses.apply(u, is_chosen, parameters)


def total(losses: Tensor) -> Tensor:
    """The sum of losses; where it overflows in both directions, +inf instead of NaN."""
    return _Total.apply(losses)


def non_negative_loss(
    loss: Tensor,
    chosen: Tensor,
    chosen_counts: Tensor,
    rejected: Tensor,
    rejected_counts: Tensor,
    parameters: LossParameters,
    constant: float,
) -> Tensor:
    """The non-negative correction of Kato and Teshima 2021 (ICML, eq. 7) of a mean loss.

    With ``Q = P - P(-inf) >= 0`` and the weighted means over a batch, the loss is

        mean_w[-A + C Q] + max(0, (1 - alpha) mean_l[Q] + (alpha - C) mean_w[Q])

    so where the second term is positive the loss stays as it is, and elsewhere only the chosen term with ``alpha = C``
    is left. It couples a batch: exact for the responses it sees, not for a mean over micro-batches or processes.

    Args:
        loss: [], the mean loss without correction, carrying its gradient.
        chosen: log ratios of chosen responses, [B] or [S]; rejected: of rejected ones.
        chosen_counts, rejected_counts: which of them count, bool.
        parameters: of the loss.
        constant: C, below the reciprocal of the largest density ratio.
    """
    floor = parameters.floor_of_P(chosen.dtype, chosen.device)
    alone = parameters._replace(alpha=constant, rejected_weight=0.0)
    zeros = torch.zeros_like(chosen)
    chosen = torch.where(chosen_counts, chosen, 0)
    count = chosen_counts.sum().clamp(min=1)
    chosen_only = total(torch.where(chosen_counts, pair_losses(chosen, zeros, alone), 0) / count)
    with torch.no_grad():
        Q_w, Q_l = (
            torch.where(counts, parameters.term("P", _view(u, parameters, offset)[0]), floor) - floor
            for u, counts, offset in (
                (chosen, chosen_counts, parameters.chosen_offset),
                (rejected, rejected_counts, parameters.rejected_offset),
            )
        )
        Q_w_mean, Q_l_mean = Q_w.sum() / count, Q_l.sum() / rejected_counts.sum().clamp(min=1)
        rejected_part = _scaled(Q_l_mean, parameters.rejected_weight * (1.0 - parameters.alpha))
        kept = ~(rejected_part < _scaled(Q_w_mean, parameters.chosen_weight * (constant - parameters.alpha)))
    # The constants of P in the means, so that the loss does not jump where the second term changes sign.
    of_chosen = floor * (parameters.chosen_weight * (parameters.alpha - constant))
    of_rejected = floor * (parameters.rejected_weight * (1.0 - parameters.alpha))
    constants = torch.where(chosen_counts.any(), of_chosen, 0) + torch.where(rejected_counts.any(), of_rejected, 0)
    return torch.where(kept, loss, (chosen_only + constants).to(loss.dtype))


def tanh_slope(x: Tensor) -> Tensor:
    """``1 / cosh(x)^2``, exact in relative terms, as ``1 - tanh(x)^2`` is not."""
    e = (-2.0 * x.abs()).exp()
    return 4.0 * e / (1.0 + e).square()


def soft_bound(u: Tensor, M: float) -> Tensor:
    """``M tanh(u / M)``, differentiable, with the slope of `tanh_slope`; u where M is 0."""
    return _SoftBound.apply(u, M)


def _scaled(grad: Tensor, by: Tensor | float) -> Tensor:
    """A gradient or a mean, times a slope, a weight or a derivative; 0 where that is 0, however large the rest."""
    if isinstance(by, float):
        return torch.zeros_like(grad) if by == 0.0 else grad * by
    return torch.where(by == 0, 0, grad * by)


def _soft_bound(u: Tensor, M: float) -> tuple[Tensor, Tensor]:
    """``M tanh(u / M)`` and its slope ``1 / cosh(u / M)^2``; u itself where M is 0."""
    return (u, torch.ones_like(u)) if M == 0.0 else (M * (u / M).tanh(), tanh_slope(u / M))


def _view(u: Tensor, p: LossParameters, offset: float) -> tuple[Tensor, Tensor]:
    """What a separable loss sees of a log ratio, ``beta bound(u) + offset``, and its slope."""
    v, slope = _soft_bound(u, p.max_log_ratio)
    factor = p.factor_of_u()
    return factor * v + offset, factor * slope


def _overflowed(positive: Tensor, negative: Tensor) -> Tensor:  # e^positive - e^negative where both overflow
    return torch.where(positive < negative, -math.inf, math.inf)


def _log_term(name: str, u: Tensor, p: LossParameters, weight: float) -> Tensor:
    if getattr(get_divergence(p.loss_type), name) is None:  # not known, so that the loss is taken as +inf
        return torch.full_like(u, math.nan)
    if weight == 0.0:
        return torch.full_like(u, -math.inf)
    return math.log(weight) + p.term(name, u)


def _weighted(name: str, v: Tensor, p: LossParameters, weight: float) -> Tensor:
    """``weight P(v)`` or ``weight P'(v)``, finite also where only P is not."""
    term = p.term(name, v)
    if getattr(get_divergence(p.loss_type), f"log_{name}") is None:
        return weight * term
    return torch.where(term.isposinf(), _log_term(f"log_{name}", v, p, weight).exp(), weight * term)


def _chosen(u: Tensor, p: LossParameters) -> tuple[Tensor, Tensor]:
    """``chosen_weight [-A(v) + alpha P(v)]`` and its derivative, v as of `_view`."""
    v, slope = _view(u, p, p.chosen_offset)
    loss, grad = -p.term("A", v), -p.term("dA", v)
    if p.alpha != 0.0:
        loss = loss + _weighted("P", v, p, p.alpha)
        grad = grad + _weighted("dP", v, p, p.alpha)
        positive, negative = _log_term("log_P", v, p, p.alpha), _log_term("log_A", v, p, 1.0)
        loss = torch.where(loss.isnan() & ~u.isnan(), _overflowed(positive, negative), loss)
        # A'(u) (alpha e^u - 1)
        grad = torch.where(grad.isnan() & ~u.isnan(), _overflowed(math.log(p.alpha) + v, torch.zeros_like(v)), grad)
    return _scaled(loss, p.chosen_weight), _scaled(_scaled(grad, slope), p.chosen_weight)


def _rejected(u: Tensor, p: LossParameters) -> tuple[Tensor, Tensor]:
    """``rejected_weight (1 - alpha) P(v)`` and its derivative; zeros where the weight is 0."""
    weight = p.rejected_weight * (1.0 - p.alpha)
    if weight == 0.0:
        return torch.zeros_like(u), torch.zeros_like(u)
    v, slope = _view(u, p, p.rejected_offset)
    return _weighted("P", v, p, weight), _scaled(_weighted("dP", v, p, weight), slope)


def _pair(u_w: Tensor, u_l: Tensor, p: LossParameters) -> Tensor:
    chosen, rejected = _chosen(u_w, p)[0], _rejected(u_l, p)[0]
    loss = chosen + rejected
    w, l = _view(u_w, p, p.chosen_offset)[0], _view(u_l, p, p.rejected_offset)[0]
    positive = torch.logaddexp(
        _log_term("log_P", w, p, p.chosen_weight * p.alpha),
        _log_term("log_P", l, p, p.rejected_weight * (1.0 - p.alpha)),
    )
    signed = _overflowed(positive, _log_term("log_A", w, p, p.chosen_weight))
    signed = torch.where(w.isinf() & ~l.isinf(), chosen, torch.where(l.isinf() & ~w.isinf(), rejected, signed))
    return torch.where(loss.isnan() & ~u_w.isnan() & ~u_l.isnan(), signed, loss)


def _contrast(u_w: Tensor, u_l: Tensor, p: LossParameters) -> Tensor:
    """``beta (A(u_w) - A(u_l))``; A increases: where it overflows for both, the larger log ratio has the larger one."""
    A_w, A_l = p.term("A", u_w), p.term("A", u_l)
    sign = torch.where(u_w == u_l, 0.0, torch.where(u_w > u_l, math.inf, -math.inf))
    both = A_w.isinf() & (A_w == A_l) & ~((u_w == u_l) & u_w.isinf())
    return torch.where(both, sign, p.beta * (A_w - A_l))


class _SeparablePairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_w: Tensor, u_l: Tensor, parameters: LossParameters) -> Tensor:
        ctx.save_for_backward(u_w, u_l)
        ctx.parameters = parameters
        return _pair(u_w, u_l, parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u_w, u_l = ctx.saved_tensors
        p = ctx.parameters
        grad_w, grad_l = _chosen(u_w, p)[1], _rejected(u_l, p)[1]
        return _scaled(grad_w, grad), _scaled(grad_l, grad), None


class _SeparableResponses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, is_chosen: Tensor, parameters: LossParameters) -> Tensor:
        ctx.save_for_backward(u, is_chosen)
        ctx.parameters = p = parameters
        return torch.where(is_chosen, _chosen(u, p)[0], _rejected(u, p)[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        u, is_chosen = ctx.saved_tensors
        p = ctx.parameters
        slope = torch.where(is_chosen, _chosen(u, p)[1], _rejected(u, p)[1])
        return _scaled(slope, grad), None, None


class _SeparableContrast(torch.autograd.Function):
    """``softplus(-beta (A(u_w) - A(u_l)))``."""

    @staticmethod
    def forward(ctx: Any, u_w: Tensor, u_l: Tensor, parameters: LossParameters) -> Tensor:
        ctx.save_for_backward(u_w, u_l)
        ctx.parameters = parameters
        return -logsigmoid(_contrast(u_w, u_l, parameters))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u_w, u_l = ctx.saved_tensors
        p = ctx.parameters
        push = p.beta * (-_contrast(u_w, u_l, p)).sigmoid() * grad
        return -_scaled(p.term("dA", u_w), push), _scaled(p.term("dA", u_l), push), None


class _SoftBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, M: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.M = M
        return _soft_bound(u, M)[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return _scaled(grad, _soft_bound(u, ctx.M)[1]), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        ctx.shape = losses.shape
        positive = torch.where(losses > 0, losses, 0).sum()
        rest = torch.where(losses > 0, 0, losses).sum()  # NaN, too
        return torch.where((positive == math.inf) & ~rest.isnan(), positive, positive + rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.shape)
