"""A reference that follows the policy: every so many steps it becomes a mix of both (TR-DPO, arXiv 2404.09656)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from dil_kernels.models.tensor_parallel import is_loaded_in_parts
from dil_kernels.training.adapters import has_adapters
from dil_kernels.training.sharding import is_wrapped_late

REFERENCE_NAME = "reference.safetensors"  # in every checkpoint of such a run


class ReferenceSync(TrainerCallback):
    """Sets reference <- alpha policy + (1 - alpha) reference after every so many optimizer steps, as `DILConfig` says.

    Args:
        policy: the model that is trained, not wrapped.
        reference: of the same parameters; None where the weights of the policy hold it.
        accelerator: of the trainer.

    Raises:
        NotImplementedError: the policy has adapters, or is sharded.
        ValueError: the parameters of the reference are others.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module | None, accelerator: Any) -> None:
        if reference is None or has_adapters(policy):
            raise NotImplementedError(
                "sync_ref_model=True was given, but the model is trained by adapters: the reference cannot follow them"
            )
        if is_wrapped_late(accelerator) or is_loaded_in_parts(policy):
            raise NotImplementedError(
                "sync_ref_model=True was given, but not for FSDP, DeepSpeed or a model that was loaded in parts"
            )
        own, other = ({name: value.shape for name, value in model.named_parameters()} for model in (policy, reference))
        for name in {**own, **other}:
            if own.get(name) != other.get(name):
                shapes = [tuple(shapes[name]) if name in shapes else "missing" for shapes in (own, other)]
                raise ValueError(
                    f"sync_ref_model=True was given, but parameter {name} is {shapes[0]} in model and {shapes[1]} in "
                    "ref_model"
                )
        self._policy, self._reference = policy, reference

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mix, if it is time."""
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = dict(self._policy.named_parameters())
        with torch.no_grad():
            for name, value in self._reference.named_parameters():
                value.lerp_(policy[name].to(value), args.ref_model_mixup_alpha)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the reference of the checkpoint whose policy is taken."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(Path(state.best_model_checkpoint))

    def save(self, directory: Path) -> None:
        """Write the reference into a checkpoint, which cannot be resumed from without."""
        save_model(self._reference, str(directory / REFERENCE_NAME))

    def load(self, checkpoint: Path) -> None:
        """Take the reference of a checkpoint."""
        load_model(self._reference, checkpoint / REFERENCE_NAME)
