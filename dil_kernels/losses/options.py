"""The options of a loss, declared as those of scoring are (`dil_kernels.options`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from dil_kernels.checks import check_choice, check_flag, check_number, check_positive, has_values
from dil_kernels.losses.divergence import PAIR_BETA, PARAMETER_NAMES, Divergence
from dil_kernels.losses.registry import get_divergence
from dil_kernels.options import ScoringOptions

LINKS = ("imitation", "ratio", "f_dpo")
REDUCTIONS = ("mean", "sum", "none")
PAIR_LAYOUTS = ("concatenated", "interleaved")


class LossParameters(NamedTuple):
    """Everything beside the log ratios that the loss of a pair depends on, as csrc/parameters.h has it."""

    loss_type: str
    beta: float = 1.0  #: the loss's own, or the factor of u, of the difference of two, or of that of A
    power: float = 0.0  #: the loss's own; 0 where it has none
    label_smoothing: float = 0.0  #: likewise
    alpha: float = 0.0
    max_log_ratio: float = 0.0  #: 0 for no bound
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    chosen_offset: float = 0.0
    rejected_offset: float = 0.0
    scale: float = 1.0
    link: str = "imitation"

    def floor_of_P(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """P of a separable loss at r = 0, its least value; []."""
        return self.term("P", torch.full((), -math.inf, dtype=dtype, device=device))

    def term(self, name: str, u: Tensor) -> Tensor:
        """One of the divergence's functions at `u`."""
        return get_divergence(self.loss_type).term(name, u, self.own())

    def own(self) -> tuple[float, ...]:
        """The values of the loss's own parameters."""
        return tuple(getattr(self, parameter.name) for parameter in get_divergence(self.loss_type).parameters)

    def factor_of_u(self) -> float:
        """What multiplies the log ratios that a separable loss sees: beta, where that is not the loss's own."""
        return self.beta if get_divergence(self.loss_type).own("beta") is None else 1.0


class SequenceOptions(NamedTuple):
    """How token log-probs become log ratios of sequences, and their losses one loss."""

    average: bool
    interleaved: bool
    mean: bool  # over the items that count
    ignore_index: int
    shift: bool


class LossKeywords(TypedDict, total=False):
    """See `LossOptions`."""

    loss_type: str
    link: str
    beta: float | None
    offset: float | Sequence[float] | None
    scale: float
    power: float | None
    label_smoothing: float | None
    alpha: float
    max_log_ratio: float | None
    non_negative: float | None
    chosen_weight: float
    rejected_weight: float
    nll_weight: float
    reduction: str


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """A loss, checked.

    Attributes:
        loss_type: a registered name; docs/losses.md describes each.
        link: how a Bregman divergence is put to work on the log ratios u of a pair, d = u_w - u_l: "imitation"
            (-A(u_w) + P(u_l), DIL), "ratio" (P(-beta d) - A(beta d), BPO, arXiv 2505.19601) or "f_dpo"
            (softplus(-beta (A(u_w) - A(u_l))), arXiv 2309.16240).
        beta: factor of the log ratios, of their difference, or of that of A: 1 if not given with "imitation", 0.1 with
            the other links and the losses that have a beta of their own.
        offset: added to beta u (to u, where beta is the loss's own), one number or one for chosen and one for rejected
            responses; "imitation" only.
        scale: what the loss is divided by, "ratio" only; 4 gives "lsif", "ukl", "power" and "is" the gradient of "dpo"
            where d = 0.
        power: exponent of "power" (default 0.5): 1 is "lsif", 0 "ukl", -1 "is", up to constants; an error with any
            other loss.
        label_smoothing: how likely a label is wrong: "dpo" (0, conservative DPO), "robust" (0) and "exo_pair" (0.001);
            an error with any other loss.
        alpha: share of the chosen responses in the reference expectation, for separable Bregman divergences; 0 is the
            paper.
        max_log_ratio: soft bound M on the log ratios, u -> M tanh(u / M), whose gradient is that of the loss there
            times 1 / cosh(u / M)^2; the rewards stay unbounded. None for no bound.
        non_negative: C of the non-negative correction (`dil_kernels.losses.scalar.non_negative_loss`), which needs
            reduction "mean" and is exact only for the responses of this call; the losses stay uncorrected.
        chosen_weight, rejected_weight: factors of the two terms of a separable loss.
        nll_weight: of the negative log-likelihood of the chosen response, which is added to any loss: its mean over the
            scored tokens (RPO, arXiv 2404.19733), or minus the log-prob as it is given to `dil_loss`.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: unknown loss, an option that the loss does not use, or a value out of range.
        TypeError: a value that is no number; a tensor among them, since no gradient would flow to it.
    """

    loss_type: str = "lsif"
    link: str = "imitation"
    beta: float | None = None
    offset: float | Sequence[float] | None = None
    scale: float = 1.0
    power: float | None = None
    label_smoothing: float | None = None
    alpha: float = 0.0
    max_log_ratio: float | None = None
    non_negative: float | None = None
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    nll_weight: float = 0.0
    reduction: str = "none"

    def __post_init__(self) -> None:
        divergence = get_divergence(self.loss_type)
        check_choice("link", self.link, LINKS)
        if self.link != "imitation":
            what = _not_bregman(divergence)
            if divergence.own("beta") is not None and divergence.separable and what is None:
                what = f"loss_type={self.loss_type!r} has a beta of its own"
            if what is not None:
                raise ValueError(f"link={self.link!r} was given, but {what}; leave it 'imitation'")
        for name in PARAMETER_NAMES:
            value, own = getattr(self, name), divergence.own(name)
            if value is None:
                continue
            if own is not None:
                own.check(value)
            elif name == "beta" and divergence.separable:
                check_positive("beta", value)
            else:
                raise ValueError(
                    f"{name}={value} was given, but loss_type={self.loss_type!r} has no {name}; leave it out"
                )
        check_number("alpha", self.alpha)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.max_log_ratio is not None:
            check_positive("max_log_ratio", self.max_log_ratio)
        check_positive("scale", self.scale)
        for offset in self._offsets:
            check_number("offset", offset)
            if not -math.inf < offset < math.inf:
                raise ValueError(f"offset must be finite, got {self.offset}")
        for name in ("chosen_weight", "rejected_weight", "nll_weight"):
            check_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        self._check_used(divergence)
        check_choice("reduction", self.reduction, REDUCTIONS)
        if self.non_negative is not None:
            self._check_non_negative(self.non_negative)

    def _check_used(self, divergence: Divergence) -> None:
        """What only some links and losses use is left at its default with the others."""
        defaults: dict[str, Any] = {"alpha": 0, "chosen_weight": 1, "rejected_weight": 1, "offset": None, "scale": 1}
        used = {"imitation": defaults.keys() - {"scale"}, "ratio": {"scale"}}.get(self.link, set())
        for name, default in defaults.items():
            what = _not_bregman(divergence) if name == "alpha" or not divergence.separable else None
            if what is None and name not in used:
                what = f"link={self.link!r} has no {name}"
            if what is not None and (value := getattr(self, name)) != default:
                raise ValueError(f"{name}={value} was given, but {what}; leave it {default}")

    def _check_non_negative(self, constant: float) -> None:
        check_number("non_negative", constant)
        if not 0.0 < constant < 1.0:
            raise ValueError(f"non_negative must be between 0 and 1 (it is below 1 / sup r), got {constant}")
        what = f"loss_type={self.loss_type!r}" if self.link == "imitation" else f"link={self.link!r}"
        has_floor = self.separable and self.divergence.bregman
        if has_floor:
            floor = self.parameters.floor_of_P(torch.float64, "cpu")
            # A number cannot be read under torch.compile; there such a loss gives a loss that is not finite.
            has_floor = not has_values(floor) or math.isfinite(floor)
        if not has_floor:
            raise ValueError(
                f"non_negative={constant} was given, but {what} has no non-negative part: it "
                "needs a separable Bregman divergence with a finite P(-inf)"
            )
        if self.reduction != "mean":
            raise ValueError(
                f"non_negative={constant} corrects means over the batch: reduction must be 'mean', got "
                f"{self.reduction!r}"
            )

    @property
    def divergence(self) -> Divergence:
        """What `loss_type` names."""
        return get_divergence(self.loss_type)

    @property
    def _offsets(self) -> tuple[float, float]:
        if not isinstance(self.offset, (list, tuple)):
            return (0.0, 0.0) if self.offset is None else (self.offset, self.offset)  # type: ignore[return-value]
        if len(self.offset) not in (1, 2):
            raise ValueError(f"offset must be one number, or one for chosen and one for rejected, got {self.offset}")
        return self.offset[0], self.offset[-1]

    @property
    def separable(self) -> bool:
        """Whether each response has a loss of its own, so that unpaired ones have, too."""
        return self.link == "imitation" and self.divergence.separable

    @property
    def factor(self) -> float:
        """beta, given or not; 1 where the loss has none. It times a log ratio is the reward of the response."""
        divergence = self.divergence
        if divergence.own("beta") is not None or not divergence.separable:
            return self._own_value("beta", 1.0)
        return float(self.beta if self.beta is not None else 1.0 if self.link == "imitation" else PAIR_BETA)

    def _own_value(self, name: str, without: float = 0.0) -> float:
        """Of the loss's own parameter of that name."""
        own = self.divergence.own(name)
        if own is None:
            return without
        given = getattr(self, name)
        return float(own.default if given is None else given)

    @property
    def parameters(self) -> LossParameters:
        """For the scalar math."""
        chosen_offset, rejected_offset = self._offsets
        return LossParameters(
            loss_type=self.divergence.name,
            beta=self.factor,
            power=self._own_value("power"),
            label_smoothing=self._own_value("label_smoothing"),
            alpha=float(self.alpha),
            max_log_ratio=float(self.max_log_ratio or 0.0),
            chosen_weight=float(self.chosen_weight),
            rejected_weight=float(self.rejected_weight),
            chosen_offset=float(chosen_offset),
            rejected_offset=float(rejected_offset),
            scale=float(self.scale),
            link=self.link,
        )


def _not_bregman(divergence: Divergence) -> str | None:
    """Why a loss has no h; None if it has one."""
    if not divergence.separable:
        return f"loss_type={divergence.name!r} is not separable"
    return None if divergence.bregman else f"loss_type={divergence.name!r} is no Bregman divergence"


class FusedLossKeywords(LossKeywords, total=False):
    """See `FusedLossOptions`."""

    average_log_prob: bool
    pair_layout: str


@dataclass(frozen=True, kw_only=True)
class FusedLossOptions(LossOptions):
    """A loss of token log-probs, checked.

    Attributes:
        reduction: "mean" (over the pairs whose responses both have a scored token; unpaired, over the chosen responses
            with one, plus over the rejected), "sum" or "none".
        average_log_prob: divide each log ratio by its number of scored tokens, as the authors' code does. LSIF on
            summed log ratios overflows or diverges easily.
        pair_layout: "concatenated" (pair i is sequences i and B + i) or "interleaved" (2i and 2i + 1).
    """

    reduction: str = "mean"
    average_log_prob: bool = True
    pair_layout: str = "concatenated"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("average_log_prob", self.average_log_prob)
        check_choice("pair_layout", self.pair_layout, PAIR_LAYOUTS)

    def of_sequences(self, scoring: ScoringOptions) -> SequenceOptions:
        """With what counts as scored."""
        interleaved, mean = self.pair_layout == "interleaved", self.reduction != "sum"
        return SequenceOptions(self.average_log_prob, interleaved, mean, scoring.ignore_index, scoring.shift)
