"""The public functions: validate, choose a backend, compose."""

from dil_kernels.functional.linear import fused_linear_dil_loss, linear_sequence_logps, linear_token_logps
from dil_kernels.functional.logps import LogitStatistics, sequence_logps, token_logps
from dil_kernels.functional.loss import dil_loss, fused_dil_loss, unpaired_dil_loss
from dil_kernels.functional.memory import default_stash_bytes, linear_memory_bytes
from dil_kernels.functional.output import DILOutput

__all__ = [
    "DILOutput",
    "LogitStatistics",
    "default_stash_bytes",
    "dil_loss",
    "fused_dil_loss",
    "fused_linear_dil_loss",
    "linear_memory_bytes",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "token_logps",
    "unpaired_dil_loss",
]
