"""The public functions: validate, choose a backend, compose."""

from dil_kernels.functional.logps import sequence_logps, token_logps
from dil_kernels.functional.loss import DILOutput, dil_loss, fused_dil_loss

__all__ = ["DILOutput", "dil_loss", "fused_dil_loss", "sequence_logps", "token_logps"]
