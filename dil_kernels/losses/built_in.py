"""The losses of the package; csrc/divergences.h is the twin in C++, and docs/losses.md describes each.

A loss is added here and there: its name, its math and its source; a test compares the two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # exact everywhere; softplus turns linear above 20

from dil_kernels.losses.divergence import PAIR_BETA, Divergence, Parameter
from dil_kernels.losses.registry import register_divergence


def _product(k: float, u: Tensor) -> Tensor:
    """``k u``, where 0 times an infinity is 0."""
    return k * u if k != 0 else torch.where(u.isinf(), 0.0, 0.0 * u)


def _expm1_over(k: float, u: Tensor) -> Tensor:
    """``(e^{k u} - 1) / k``, which is u where k is 0."""
    x = _product(k, u)
    quotient = torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))
    return torch.where(x.abs() < 1, u * quotient, torch.expm1(x) / (k or 1.0))


def _power_P(u: Tensor, k: float) -> Tensor:
    # The constant makes the loss continuous in k: that of ukl at 0, finite at -1.
    return ((1.0 + k) * u).exp() / (1.0 + k) if k >= 0 else _expm1_over(1.0 + k, u) + (1.0 + k)


_BETA = Parameter(name="beta", default=PAIR_BETA, minimum=0.0, exclusive=True)
_SMOOTHING = Parameter(name="label_smoothing", default=0.0, minimum=0.0, below=0.5)
_LARGEST_X = 750.0  # e^-x is 0 from here on in fp64


def _of_labels(x: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """What the label as it is, and as it is not, add to the loss, by how likely each is."""
    wrong = -label_smoothing * logsigmoid(-x) if label_smoothing else torch.zeros_like(x)  # 0 times an infinity is not
    return -(1.0 - label_smoothing) * logsigmoid(x), wrong


def _dpo(u_w: Tensor, u_l: Tensor, beta: float, label_smoothing: float) -> Tensor:
    right, wrong = _of_labels(beta * (u_w - u_l), label_smoothing)
    return right + wrong


def _robust(u_w: Tensor, u_l: Tensor, beta: float, label_smoothing: float) -> Tensor:
    right, wrong = _of_labels(beta * (u_w - u_l), label_smoothing)
    return (right - wrong) / (1.0 - 2.0 * label_smoothing)


def _exo_pair(u_w: Tensor, u_l: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """``KL(q || p)``, ``q = sigmoid(+-x)``, ``p = (1 - label_smoothing, label_smoothing)``."""
    x = beta * (u_w - u_l)
    x = torch.where(x.abs() > _LARGEST_X, x.sign() * _LARGEST_X, x)
    log_w, log_l = logsigmoid(x), logsigmoid(-x)
    return log_w.exp() * (log_w - math.log1p(-label_smoothing)) + log_l.exp() * (log_l - math.log(label_smoothing))


def _apo_down(u_w: Tensor, u_l: Tensor, beta: float) -> Tensor:
    # The derivative of logsigmoid is exact, that of sigmoid cancels.
    return logsigmoid(beta * u_w).exp() + logsigmoid(-beta * (u_w - u_l)).exp()


def _builtin(**fields: Any) -> None:
    register_divergence(Divergence(**fields))


_builtin(
    name="lsif",  # h(r) = (r - 1)^2 / 2
    source="DIL (arXiv 2503.05079) eq. 24",
    A=lambda u: u.exp(),
    P=lambda u: 0.5 * (2.0 * u).exp(),
    dA=lambda u: u.exp(),
    dP=lambda u: (2.0 * u).exp(),
    log_A=lambda u: u,
    log_P=lambda u: 2.0 * u - math.log(2.0),
    log_dP=lambda u: 2.0 * u,
)
_builtin(
    name="ukl",  # h(r) = r log r - r
    source="DIL (arXiv 2503.05079) table 1",
    A=lambda u: 1.0 * u,
    P=lambda u: u.exp(),
    dA=lambda u: torch.ones_like(u),
    dP=lambda u: u.exp(),
    log_P=lambda u: u,
    log_dP=lambda u: u,
)
_builtin(
    name="bce",  # h(r) = r log r - (1 + r) log(1 + r)
    source="DIL (arXiv 2503.05079) table 1",
    A=lambda u: logsigmoid(u),
    P=lambda u: -logsigmoid(-u),
    dA=lambda u: (-u).sigmoid(),
    dP=lambda u: u.sigmoid(),
)
_builtin(
    name="power",  # h(r) = (r^{1+k} - r) / (k (1+k)); below -1 the loss is unbounded in the rejected term, too
    source="Basu et al. 1998, Biometrika 85; Sugiyama et al. 2012, Ann. Inst. Stat. Math. 64",
    A=lambda u, k: _expm1_over(k, u),
    P=_power_P,
    dA=lambda u, k: _product(k, u).exp(),
    dP=lambda u, k: _product(1.0 + k, u).exp(),
    log_A=lambda u, k: k * u - math.log(k) if k > 0 else torch.full_like(u, -math.inf),
    log_P=lambda u, k: (1.0 + k) * u - math.log1p(k) if k > -1 else torch.full_like(u, math.inf),
    log_dP=lambda u, k: _product(1.0 + k, u),
    parameters=(Parameter(name="power", default=0.5, minimum=-1.0),),
)
_builtin(
    name="is",  # h(r) = -log r
    source="Itakura-Saito: Banerjee et al. 2005, JMLR 6; power at -1",
    A=lambda u: -(-u).exp(),
    P=lambda u: 1.0 * u,
    dA=lambda u: (-u).exp(),
    dP=lambda u: torch.ones_like(u),
)
_builtin(
    name="brier",  # h(r) = 1 / (1 + r)
    source="Menon and Ong 2016, ICML: the square loss of a classifier of chosen against reference",
    A=lambda u: -(-u).sigmoid().square(),
    P=lambda u: u.sigmoid().square(),
    dA=lambda u: 2.0 * u.sigmoid() * (-u).sigmoid().square(),
    dP=lambda u: 2.0 * u.sigmoid().square() * (-u).sigmoid(),
)
_builtin(
    name="sppo_hard",
    source="SPPO (arXiv 2405.00675) eq. 4.7 with the winner's probability 1",
    A=lambda u, beta: -(u - 0.5 / beta).square(),
    P=lambda u, beta: (u + 0.5 / beta).square(),
    dA=lambda u, beta: -2.0 * (u - 0.5 / beta),
    dP=lambda u, beta: 2.0 * (u + 0.5 / beta),
    parameters=(_BETA,),
    bregman=False,
)
_builtin(
    name="apo_zero",
    source="APO (arXiv 2408.06266) eq. 7",
    A=lambda u, beta: -(-beta * u).sigmoid(),
    P=lambda u, beta: (beta * u).sigmoid(),
    dA=lambda u, beta: beta * (beta * u).sigmoid() * (-beta * u).sigmoid(),
    dP=lambda u, beta: beta * (beta * u).sigmoid() * (-beta * u).sigmoid(),
    parameters=(_BETA,),
    bregman=False,
)
_builtin(
    name="dpo",
    source="DIL (arXiv 2503.05079) eq. 27; DPO (arXiv 2305.18290) eq. 7; label smoothing: cDPO (E. Mitchell 2023)",
    pair=_dpo,
    parameters=(_BETA, _SMOOTHING),
)
_builtin(
    name="robust",
    source="Robust DPO (arXiv 2403.00409)",
    pair=_robust,
    parameters=(_BETA, _SMOOTHING),
)
_builtin(
    name="hinge",
    source="SLiC-HF (arXiv 2305.10425); RSO (arXiv 2309.06657)",
    pair=lambda u_w, u_l, beta: (1.0 - beta * (u_w - u_l)).relu(),
    parameters=(_BETA,),
)
_builtin(
    name="ipo",
    source="IPO (arXiv 2310.12036) eq. 17",
    pair=lambda u_w, u_l, beta: ((beta * (u_w - u_l) - 0.5) / beta).square(),
    parameters=(_BETA,),
)
_builtin(
    name="exo_pair",
    source="EXO (arXiv 2402.00856) eq. 16",
    pair=_exo_pair,
    parameters=(_BETA, Parameter(name="label_smoothing", default=1e-3, minimum=0.0, exclusive=True, below=0.5)),
)
_builtin(
    name="apo_down",
    source="APO (arXiv 2408.06266) eq. 8",
    pair=_apo_down,
    parameters=(_BETA,),
)
_builtin(
    name="cal_dpo",
    source="Cal-DPO (arXiv 2412.14516)",
    pair=lambda u_w, u_l, beta: -logsigmoid(u_w - u_l) + (u_w - 0.5 / beta).square() + (u_l + 0.5 / beta).square(),
    parameters=(_BETA,),
)
