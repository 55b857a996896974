"""What `DILTrainer` on TRL does to its models before they are wrapped, and how it finds them in their wrappers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from dil_kernels.integrations.trl_config import DILConfig
from dil_kernels.models.fused_head import UnsupportedHeadError, install_fused_head
from dil_kernels.models.rotary_lengths import keep_lengths_apart
from dil_kernels.training.model_checks import check_rows, keep_gradients_of_4_bits
from dil_kernels.training.set_up import disable_noise

logger = logging.getLogger(__name__)


@dataclass
class ScoredModels:
    """Policy and reference, which score labels without logits where they can.

    Attributes:
        args: of the trainer.
        accelerator: of the trainer.
    """

    args: DILConfig
    accelerator: Any
    _fused: dict[nn.Module, bool] = field(default_factory=dict)

    def unwrapped(self, model: Any) -> Any:
        """The model as it was before it was wrapped or compiled."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def prepare(self, model: Any, name: str) -> None:
        """Let a model, not yet wrapped, take each sequence by its own length, and score labels without logits.

        Args:
            model: changed in place.
            name: of the argument.

        Raises:
            UnsupportedHeadError: its head cannot be fused, and fused_head=True.
            NotImplementedError: a response would depend on others of its batch, or it takes no gradients.
            TypeError: it is no causal language model.
        """
        keep_gradients_of_4_bits(model, name)
        if self.args.disable_dropout:
            disable_noise(model, tell=self.accelerator.is_main_process and name == "model")
        keep_lengths_apart(model)
        check_rows(model)
        problem = self._head_problem(model)
        if problem is not None and self.args.fused_head:
            raise UnsupportedHeadError(f"fused_head=True was given, but {problem}")
        if problem is not None and self.args.fused_head is None:
            logger.warning("log-probs are taken from logits, since %s", problem)
        self._fused[model] = problem is None

    def _head_problem(self, model: Any) -> str | None:
        """Why the model does not score labels without logits; None if it does."""
        if self.args.fused_head is False:
            return "fused_head=False was given"
        if self.adds_virtual_tokens(model):
            return "prompt tuning adds virtual tokens, which have no label"
        try:
            install_fused_head(model)
        except UnsupportedHeadError as error:
            return str(error)
        return None

    def has_fused_head(self, model: nn.Module) -> bool:
        """Whether the model, as it is wrapped, scores labels without logits; one that is new is prepared."""
        unwrapped = self.unwrapped(model)
        if unwrapped not in self._fused:
            self.prepare(unwrapped, "model")
        return self._fused[unwrapped]

    def adds_virtual_tokens(self, model: nn.Module) -> bool:
        """Whether the forward puts tokens of its own before the inputs."""
        unwrapped = self.unwrapped(model)
        return is_peft_model(unwrapped) and bool(unwrapped.active_peft_config.is_prompt_learning)
