"""LoRA adapters of the tiny model, and what the reference of a trainer with one must be."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_training import plain_logps
from tiny_model import make_model, make_pairs
from tiny_trainer import batch_of
from torch import Tensor

from dil_kernels.data.batches import Batch
from dil_kernels.trainer import DILTrainer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora_config(**options: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **options})


def new_lora(model: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(make_model(tie_word_embeddings=False) if model is None else model, lora_config(**options))


def trained_lora(**options: Any) -> PeftModel:
    """A model whose adapter moves its log-probs by a few nats."""
    model = new_lora(**options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora_" in name else 0.02
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def batch_on(trainer: DILTrainer) -> dict[str, Tensor]:
    return trainer._prepare_inputs(batch_of(make_pairs(5, seed=3)))


def reference_logps(trainer: DILTrainer) -> Tensor:
    return trainer.batch_loss.reference_token_logps(trainer.model, Batch.of(batch_on(trainer)))


def assert_reference_is(trainer: DILTrainer, truth: torch.nn.Module) -> None:
    logps, _ = plain_logps(copy.deepcopy(truth).eval().double(), batch_on(trainer))
    torch.testing.assert_close(reference_logps(trainer).double(), logps, rtol=1e-4, atol=1e-4)
