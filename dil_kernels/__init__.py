"""Direct Imitation Learning (DIL, ICLR 2025) from preference pairs, with fused log-probabilities and losses."""

from dil_kernels.functional import (
    DILOutput,
    LogitStatistics,
    dil_loss,
    fused_dil_loss,
    fused_linear_dil_loss,
    linear_memory_bytes,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    token_logps,
    unpaired_dil_loss,
)
from dil_kernels.losses import Divergence, register_divergence

__version__ = "0.1.0"

__all__ = [
    "DILOutput",
    "Divergence",
    "LogitStatistics",
    "dil_loss",
    "fused_dil_loss",
    "fused_linear_dil_loss",
    "linear_memory_bytes",
    "linear_sequence_logps",
    "linear_token_logps",
    "register_divergence",
    "sequence_logps",
    "token_logps",
    "unpaired_dil_loss",
]
