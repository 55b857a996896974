"""`DILTrainer` and its `DILConfig`: Direct Imitation Learning on the Hugging Face Trainer."""

from dil_kernels.training.checkpoints import last_complete_checkpoint
from dil_kernels.training.config import DILConfig
from dil_kernels.training.set_up import disable_dropout
from dil_kernels.training.trainer import DILTrainer

__all__ = ["DILConfig", "DILTrainer", "disable_dropout", "last_complete_checkpoint"]
