"""The options that the configs of all trainers share: of the loss, and of how its log-probs are computed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from dil_kernels.backends import BACKEND_CHOICES
from dil_kernels.checks import check_choice, check_count, check_flag

HUB_TOKENS = ("hub_token", "push_to_hub_token")


@dataclass
class LossFields:
    """What defines the loss."""

    loss_type: str = field(
        default="lsif",
        metadata={
            "help": "The loss (docs/losses.md): lsif (the paper's default), ukl, bce, power, is or brier; sppo_hard, "
            "apo_zero; dpo, robust, hinge, ipo, exo_pair, apo_down or cal_dpo; or a registered one."
        },
    )
    link: str = field(
        default="imitation",
        metadata={
            "help": "How a Bregman divergence is put to work on a pair (docs/losses.md): imitation (DIL), ratio (BPO) "
            "or f_dpo."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the log ratios or of their difference, or what the loss itself calls beta (if not "
            "given, 1, and 0.1 with the other links and the losses that have one of their own)."
        },
    )
    offset: list[float] | None = field(
        default=None,
        metadata={
            "help": "Added to beta times the log ratios: one number, or one for chosen and one for rejected responses.",
            "nargs": "+",
            "type": float,
            "metavar": "FLOAT",
        },
    )
    scale: float = field(
        default=1.0,
        metadata={"help": "What a loss under the ratio link is divided by."},
    )
    power: float | None = field(
        default=None,
        metadata={"help": "Exponent of the power loss (0.5 if not given): 1 is lsif, 0 ukl, -1 Itakura-Saito."},
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={"help": "How likely a label is wrong: dpo and robust (0 if not given) and exo_pair (0.001)."},
    )
    alpha: float = field(
        default=0.0,
        metadata={"help": "Share of the chosen responses in the reference expectation, in [0, 1]; 0 is the paper's."},
    )
    max_log_ratio: float | None = field(
        default=None,
        metadata={"help": "Soft bound M on the log ratios in the loss, u -> M tanh(u/M); none if not given."},
    )
    chosen_weight: float = field(
        default=1.0,
        metadata={"help": "Factor of the chosen term of a separable loss."},
    )
    rejected_weight: float = field(
        default=1.0,
        metadata={"help": "Factor of the rejected term of a separable loss."},
    )
    nll_weight: float = field(
        default=0.0,
        metadata={
            "help": "Factor of the negative log-likelihood per token of the chosen responses, added to the loss (RPO)."
        },
    )

    def loss_options(self) -> dict[str, Any]:
        """The keywords of the fused losses that define the loss."""
        return {option.name: getattr(self, option.name) for option in dataclasses.fields(LossFields)}


@dataclass
class FusedLossFields(LossFields):
    """What defines the loss, what it is taken of, and what computes it."""

    average_log_prob: bool = field(
        default=True,
        metadata={"help": "Divide each log ratio by the number of scored tokens of its response."},
    )
    fused_head: bool | None = field(
        default=None,
        metadata={
            "help": "Take log-probs inside the output head, without logits: where the model allows it if not given, "
            "always (an error where it does not) if true, never if false."
        },
    )
    stash_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Bytes that the fused head may keep from forward to backward; less is slower. If not given, an "
            "eighth of the device's memory."
        },
    )
    backend: str = field(
        default="auto",
        metadata={"help": "The kernels to use: auto, triton (CUDA), cpp (CPU) or eager."},
    )

    def check_fields(self, *flags: str) -> None:
        """Check the options of how log-probs are taken; what is true or false is so, or None where that is the default.

        Args:
            flags: names of such fields beside those of this class.

        Raises:
            TypeError, ValueError: names the field and the value.
        """
        check_choice("backend", self.backend, BACKEND_CHOICES)
        if self.stash_bytes is not None:
            check_count("stash_bytes", self.stash_bytes)
            if self.fused_head is False:
                raise ValueError(f"stash_bytes={self.stash_bytes} was given, but fused_head=False keeps none")
        for name in ("average_log_prob", "fused_head", *flags):
            value = getattr(self, name)
            if value is not None or self.__dataclass_fields__[name].default is not None:
                check_flag(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Without tokens of the hub: transformers pickles the options beside the weights, and uploads both."""
        return {name: None if name in HUB_TOKENS else value for name, value in vars(self).items()}

    def __copy__(self) -> Self:
        """With all fields, unlike a pickle."""
        copied = object.__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """With all fields, unlike a pickle."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied
