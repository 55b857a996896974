"""`DILConfig`: TRL's `DPOConfig` with the options of the density-ratio losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import trl
from packaging.version import Version
from trl import DPOConfig, DPOTrainer

from dil_kernels.losses import LossOptions, get_divergence
from dil_kernels.training.config import check_evaluation, check_joined_rows
from dil_kernels.training.loss_fields import FusedLossFields

if Version(trl.__version__) < Version("1.0.0"):
    raise ImportError(f"this DILTrainer needs TRL 1.0 or later, found {trl.__version__}; see dil_kernels.dil_loss")

# What TRL's losses use and ours do not; anything but the default would be silently ignored.
UNUSED_OPTIONS = (
    "label_smoothing_factor",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "ld_alpha",
    "loss_weights",
    "discopop_tau",
)
NAMES_IN_TRL = {
    "sigmoid": "is here loss_type='dpo' with average_log_prob=False",
    "sigmoid_norm": "is here loss_type='dpo' with average_log_prob=True",
    "bco_pair": "is here loss_type='bce' and TRL's beta=0.1 with average_log_prob=False",
    "nca_pair": "is here loss_type='bce', alpha=0.5 and TRL's beta=0.1 with average_log_prob=False",
    "aot": "sorts log ratios over a batch, so that the loss depends on how a step is cut into batches: it is not here",
    "aot_unpaired": "sorts log ratios over a batch, as aot: it is not here",
    "discopop": "is not here; a loss of your own is registered with dil_kernels.register_divergence",
    "sft": "has no rejected responses; nll_weight adds the chosen ones' likelihood to any loss",
}
# TRL takes these of summed log ratios; here the same name would go with averages, if nothing else is said.
SUMMED_IN_TRL = ("sppo_hard", "apo_zero", "robust", "hinge", "exo_pair", "apo_down")
F_DIVERGENCES = {
    "forward_kl": "loss_type='is', link='f_dpo'",
    "js_divergence": "loss_type='bce', link='f_dpo'",
    "alpha_divergence": "loss_type='power', link='f_dpo' and power=f_alpha_divergence_coef - 1",
}


@dataclass
class DILConfig(FusedLossFields, DPOConfig):
    """TRL's `DPOConfig` with the options of the density-ratio losses; checked at construction.

    Raises:
        ValueError, TypeError: an option that is unknown, out of range, of another type, or not used by the loss.
    """

    loss_type: list[str] = field(  # type: ignore[assignment]  # TRL has a list
        default_factory=lambda: ["lsif"],
        metadata={"help": FusedLossFields.__dataclass_fields__["loss_type"].metadata["help"]},
    )
    average_log_prob: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Divide each log ratio by the number of scored tokens of its response: yes if not given, which "
            "losses that TRL sums under the same name do not leave open."
        },
    )

    prefix_sharing: bool = field(
        default=False,
        metadata={
            "help": "Compute each prompt of a batch once for all responses to it, without padding; an error where the "
            "model would not give each response what it gives it alone."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # makes a list of loss_type
        self._check()

    @classmethod
    def from_dpo_config(cls, config: DPOConfig, **options: Any) -> DILConfig:
        """The options of a `DPOConfig` that a launcher such as axolotl built, with another loss.

        Args:
            config: whose other options are taken; it is left as it is.
            options: those that this class adds, loss_type and beta; the rest of them take their defaults, and
                label_smoothing that of the config.

        Raises:
            TypeError: an option that is not of this class.
            ValueError: an option that the loss does not use, as at construction.
        """
        names = {option.name for option in dataclasses.fields(FusedLossFields)} | {"prefix_sharing"}
        if unknown := options.keys() - names:
            raise TypeError(f"options of the DPOConfig itself, or unknown ones: {', '.join(sorted(unknown))}")
        new = cls.__new__(cls)  # what is computed at construction, as the device is, comes along
        ours = {name: cls.__dataclass_fields__[name].default for name in names}
        new.__dict__.update(
            vars(config), **{**ours, "loss_type": "lsif", "label_smoothing": config.label_smoothing, **options}
        )
        new.loss_type = [new.loss_type] if isinstance(new.loss_type, str) else new.loss_type
        new._check()
        return new

    def loss_options(self) -> dict[str, Any]:
        """The keywords of the fused losses that define the loss."""
        return super().loss_options() | {"loss_type": self.loss_type[0]}

    def _check(self) -> None:
        self.check_fields("prefix_sharing")
        if not isinstance(self.loss_type, list) or len(self.loss_type) != 1:
            raise ValueError(f"loss_type must be one loss, got {self.loss_type}")
        (loss_type,) = self.loss_type
        divergence = getattr(self, "f_divergence_type", None)
        if divergence in F_DIVERGENCES:
            raise ValueError(
                f"f_divergence_type={divergence!r} was given, but no loss here uses it: TRL's sigmoid loss with it is "
                f"{F_DIVERGENCES[divergence]}, with average_log_prob=False"
            )
        if loss_type in NAMES_IN_TRL:
            raise ValueError(f"loss_type={loss_type!r} of TRL {NAMES_IN_TRL[loss_type]}")
        if self.average_log_prob is None and loss_type in SUMMED_IN_TRL:
            raise ValueError(
                f"loss_type={loss_type!r} is taken of summed log ratios by TRL: give average_log_prob=False for those, "
                "or True for averages"
            )
        self.average_log_prob = self.average_log_prob is not False
        if not self.label_smoothing:  # 0.0 is TRL's default, and TRL looks at it
            own = get_divergence(loss_type).own("label_smoothing")
            self.label_smoothing = None if own is None else own.default
        LossOptions(**self.loss_options())
        check_joined_rows(self)
        check_evaluation(self)
        options = self.__dataclass_fields__
        for name in UNUSED_OPTIONS:
            if name in options and getattr(self, name) != options[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} was given, but no DIL loss uses it")
        if self.use_liger_kernel and hasattr(DPOTrainer, "_compute_loss_liger"):
            raise ValueError("use_liger_kernel=True was given, but in this version of TRL it replaces the loss")
