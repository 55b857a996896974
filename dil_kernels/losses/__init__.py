"""What a loss is: its divergence, its options, its scalar math in torch, and the tabular optimum."""

from dil_kernels.losses import built_in as _registered  # noqa: F401
from dil_kernels.losses.divergence import Divergence, Parameter
from dil_kernels.losses.options import FusedLossOptions, LossOptions, LossParameters
from dil_kernels.losses.registry import divergence_names, get_divergence, register_divergence

__all__ = [
    "Divergence",
    "FusedLossOptions",
    "LossOptions",
    "LossParameters",
    "Parameter",
    "divergence_names",
    "get_divergence",
    "register_divergence",
]
