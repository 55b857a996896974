"""Runs of DILTrainer on TRL's DPOTrainer with tiny models: the real TRL, and the truth in plain PyTorch.

The tests pass with TRL 1.0 to 1.16; another version is tested by `pip install --no-deps --target DIR trl==1.0.0` and
then `PYTHONPATH=DIR python -m pytest tests/test_trl_*.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import plain_metrics
from tiny_model import make_model, make_pairs, make_tokenizer
from tiny_trainer import trained_weights
from torch import Tensor

trl = pytest.importorskip("trl", reason="needs the extra [trl]")
peft = pytest.importorskip("peft", reason="needs peft")

from dil_kernels.integrations.trl import DILConfig, DILTrainer  # noqa: E402

EXACT = 1e-9  # fp64 against fp64, of the largest entry
PLAIN = {
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}


def make_trainer(
    output_dir: Path,
    trainer_class: Any = DILTrainer,
    config_class: Any = DILConfig,
    model: Any = None,
    ref_model: Any = None,
    train_dataset: Any = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer whose reference is not its policy, so that every loss and gradient depends on both."""
    arguments = arguments or {}
    if ref_model is None and "peft_config" not in arguments and not isinstance(model, peft.PeftModel):
        ref_model = make_model(1)
    return trainer_class(
        model=make_model(0) if model is None else model,
        ref_model=ref_model,
        args=config_class(str(output_dir), **{**PLAIN, **options}),
        train_dataset=make_pairs(7) if train_dataset is None else train_dataset,
        processing_class=make_tokenizer(),
        **arguments,
    )


def near(model: torch.nn.Module, scale: float = 0.02) -> Any:
    """A copy so near that the exponentials of a whole sequence's log ratio stay finite."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def plain_pairs(
    policy: torch.nn.Module, ref: torch.nn.Module, batch: dict[str, Tensor], name: str = "lsif", average: bool = True
) -> dict[str, Tensor]:
    """METRICS of every pair [B] in plain PyTorch, for a batch of TRL's collator."""
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]

    def logps_of(model: torch.nn.Module) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -mask.shape[1] - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask

    logps = logps_of(policy)
    with torch.no_grad():
        u_ref = logps_of(ref).sum(1)
    u = (logps.sum(1) - u_ref) / (mask.sum(1) if average else 1)
    return plain_metrics(u, logps.sum(1), mask.sum(1), name)


def batch_of(trainer: Any, dataset: Any = None) -> dict[str, Tensor]:
    dataset = trainer.train_dataset if dataset is None else dataset
    return trainer.data_collator(dataset.to_list())


STATISTICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")


def accumulated(output_dir: Path, batch_size: int, accumulation: int, **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(
        output_dir,
        model=make_model(0).double(),
        ref_model=make_model(1).double(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return trained_weights(trainer)


class Unscored:
    """TRL's collator, but the rejected responses of pairs with an odd prompt have no scored token."""

    def __init__(self) -> None:
        self.collate = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(examples)
        unscored = [len(examples) + index for index, row in enumerate(examples) if len(row["prompt_ids"]) % 2]
        batch["completion_mask"][unscored] = 0
        return batch
