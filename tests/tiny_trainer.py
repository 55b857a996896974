"""A DILTrainer of a tiny model on a few pairs, and the runs of it that several tests share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer
from torch import Tensor

from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.metrics import METRICS


def unequal_pairs() -> datasets.Dataset:
    """Of two batches of 2 that are taken at once one has long responses, the other one a token each, or none scored."""
    rows = tokenized(make_pairs(12)).to_list()
    for index, row in enumerate(rows):
        first = index // 2 % 2 == 0
        for name in ("chosen_ids", "rejected_ids"):
            row[name] = (row[name] * 12)[:12] if first else row[name][:1]
    rows[6]["chosen_ids"] = rows[7]["rejected_ids"] = []
    return datasets.Dataset.from_list(rows)


def make_trainer(output_dir: Path, **options: Any) -> DILTrainer:
    arguments = {
        name: options.pop(name)
        for name in (
            "model",
            "ref_model",
            "train_dataset",
            "eval_dataset",
            "data_collator",
            "compute_metrics",
            "callbacks",
            "optimizers",
            "peft_config",
            "processing_class",
        )
        if name in options
    }
    config = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "ref_cache_dir": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 24,
    }
    args = DILConfig(str(output_dir), **{**config, **options})
    defaults = {"model": make_model(), "train_dataset": make_pairs(7), "processing_class": make_tokenizer()}
    return DILTrainer(args=args, **{**defaults, **arguments})


def tokenized(pairs: datasets.Dataset, max_length: int = 24) -> datasets.Dataset:
    return tokenize_dataset(
        pairs, make_tokenizer(), max_length=max_length, max_prompt_length=max_length // 2, truncation_mode="keep_end"
    )


def batch_of(pairs: datasets.Dataset, max_length: int = 24) -> dict[str, Tensor]:
    return PreferenceCollator(0)(tokenized(pairs, max_length).to_list())


def trained_weights(trainer: DILTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_bitwise_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs by {(actual[name] - value).abs().max():.1e}"


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, trainer_class: type, rows: int) -> None:
    """After a step of a batch of so many rows."""
    step = trainer_class.training_step

    def out_of_memory(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(trainer, *args, **kwargs)
        if trainer._train_batch_size == rows:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(trainer_class, "training_step", out_of_memory)


def distributed_run(output_dir: Path, **options: Any) -> DILTrainer:
    """The run that one and two processes must make alike: 3 micro-batches an epoch, two of them a step.

    Each process meets another number of pairs that do not count, and the evaluation set leaves one a pair short.
    """
    rows = tokenized(make_pairs(12)).to_list()
    for index in (0, 1, 4, 9):
        rows[index]["rejected_ids"] = []
    trainer = make_trainer(
        output_dir,
        ref_model=make_model(1),
        train_dataset=datasets.Dataset.from_list(rows),
        train_sampling_strategy="sequential",
        eval_dataset=make_pairs(5, seed=2),
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        optim="sgd",
        logging_steps=1,
        precompute_ref_log_probs=True,
        **options,
    )
    trainer.train()
    trainer.evaluate()
    save_result(trainer)
    return trainer


def save_result(trainer: DILTrainer) -> None:
    """Keep the weights and the log, for `assert_trained_as` in another process."""
    if trainer.is_world_process_zero():
        torch.save((trainer.model.state_dict(), trainer.state.log_history), Path(trainer.args.output_dir) / "result.pt")


def assert_trained_as(
    output_dir: Path, one: DILTrainer, metrics: Iterable[str] = (*METRICS, *(f"eval_{name}" for name in METRICS))
) -> None:
    """The result that was saved there is that of `one`, up to the order of sums."""
    weights, history = torch.load(output_dir / "result.pt")
    for name, value in trained_weights(one).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for actual, expected in zip(history, one.state.log_history, strict=True):
        for key in expected.keys() & set(metrics):
            assert actual[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


def resumable_run(output_dir: Path, **options: Any) -> DILTrainer:
    """6 steps over two epochs of uneven batches, a checkpoint every 2."""
    return make_trainer(
        output_dir,
        model=make_model(attention_dropout=0.3),
        train_dataset=make_pairs(7),
        max_steps=6,
        lr_scheduler_type="cosine",
        **{"save_strategy": "steps", "save_steps": 2, **options},
    )
