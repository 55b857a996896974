"""The training runs that every engine must make as one process does: `python distributed_runs.py OUTPUT`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from cpu_sharding import counted_gathers, is_sharded, let_deepspeed_start, let_processes_shard, small_tiles
from tiny_lora import new_lora, trained_lora
from tiny_model import make_model, make_pairs, make_tokenizer
from tiny_trainer import tokenized, unequal_pairs
from transformers import AutoModelForCausalLM

from dil_kernels.trainer import DILConfig, DILTrainer


def uneven_pairs() -> datasets.Dataset:
    """3 micro-batches of 4 pairs; each of two processes meets another number of pairs that do not count."""
    rows = tokenized(make_pairs(12)).to_list()
    for index in (0, 1, 4, 9):
        rows[index]["rejected_ids"] = []
    return datasets.Dataset.from_list(rows)


def trainer_of(
    folder: Path, make: Callable[[], Any], ref: Callable[[], Any] | None = None, **options: Any
) -> DILTrainer:
    """The options come before the models, as DeepSpeed wants it."""
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = {
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,  # the second step of an epoch has one micro-batch
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 24,
        "use_cpu": not shards(),
        "ddp_backend": "gloo" if processes > 1 and not shards() else None,
    }
    data = options.pop("train_dataset", None)
    args = DILConfig(str(folder), **{**config, **options})
    return DILTrainer(
        make(),
        None if ref is None else ref(),
        args=args,
        train_dataset=uneven_pairs() if data is None else data,
        eval_dataset=make_pairs(5, seed=2),
        processing_class=make_tokenizer(),
    )


def shards() -> bool:
    return any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("FSDP", "DEEPSPEED"))


def reference_given(folder: Path) -> DILTrainer:
    """All weights, tied embeddings, clipping, evaluation, a whole model saved."""
    trainer = trainer_of(folder, make_model, lambda: make_model(1), eval_on_start=True)
    if trainer.accelerator.is_fsdp2:
        with pytest.raises(NotImplementedError, match="evaluate then"):
            trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def resumed(folder: Path) -> DILTrainer:
    """A model from disk, its frozen copy, Adam, a checkpoint that another trainer goes on from."""
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder.parent / "initial")

    trainer_of(folder, load, max_steps=2, lr_scheduler_type="constant", **saving).train()
    trainer = trainer_of(folder, load, max_steps=4, lr_scheduler_type="constant", resume_with_changes=True, **saving)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer


def precomputed(folder: Path) -> DILTrainer:
    """The reference's log-probs before training, under the initial policy; recomputed activations."""
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = trainer_of(
        folder, lambda: make_model(tie_word_embeddings=False), precompute_ref_log_probs=True, **options
    )
    trainer.train()
    trainer.save_model()
    return trainer


def new_adapter(folder: Path) -> DILTrainer:
    """The reference is the base; the first forward of all has the adapter off."""
    trainer = trainer_of(folder, lambda: new_lora(modules_to_save=["lm_head"]))
    trainer.train()
    trainer.save_model()
    return trainer


def trained_adapter(folder: Path) -> DILTrainer:
    """The reference is a frozen copy of the adapter."""
    trainer = trainer_of(folder, lambda: trained_lora(lora_dropout=0.0))
    trainer.train()
    trainer.save_model()
    return trainer


def half_precision(folder: Path) -> DILTrainer:
    """bf16: policy and reference must round alike, and their log-probs not at all."""
    trainer = trainer_of(folder, lambda: make_model(tie_word_embeddings=False), bf16=True, max_steps=1)
    dtypes = []
    as_before = trainer.batch_loss.token_logps
    trainer.batch_loss.token_logps = lambda *args: dtypes.append(as_before(*args)) or dtypes[-1]
    trainer.train()
    trainer.state.log_history[0]["exact"] = all(
        logps.dtype == torch.float32 and not torch.equal(logps, logps.bfloat16().float()) for logps in dtypes
    )
    return trainer


def shared_prefixes(folder: Path) -> DILTrainer:
    """Each prompt once, batches filled by tokens: 5 of them an epoch, so that one of two processes has one less."""
    accumulated = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    options = {"prefix_sharing": True, "max_tokens_per_batch": 64, "gradient_accumulation_steps": accumulated}
    options |= {"train_sampling_strategy": "random", "data_seed": 5}
    trainer = trainer_of(folder, make_model, lambda: make_model(1), **options)
    assert len(trainer.get_train_dataloader()) == (5 if accumulated == 4 else 3)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def unequal_rows(folder: Path) -> DILTrainer:
    """Processes with other numbers of scored rows, and so of chunks; the head is gathered as often as for logits."""
    trainers, gathers = [], []
    with small_tiles():
        for fused_head in (False, True):
            options = {"train_dataset": unequal_pairs(), "max_steps": 2, "fused_head": fused_head}
            options |= {"stash_bytes": 4096} if fused_head else {}
            trainer = trainer_of(folder, lambda: make_model(tie_word_embeddings=False), **options)
            with counted_gathers(trainer.model.lm_head) as count:
                trainer.train()
            trainers.append(trainer)
            gathers.append(count())
    assert gathers[0] == gathers[1], gathers
    # Of 2 steps with 2 and 1 micro-batches, each at most once forward and once backward.
    assert 3 <= gathers[1] <= 6 if shards() else gathers[1] == 0, gathers
    trainers[1].save_model()
    return trainers[1]


RUNS = {
    run.__name__: run
    for run in (
        reference_given,
        resumed,
        precomputed,
        new_adapter,
        trained_adapter,
        half_precision,
        shared_prefixes,
        unequal_rows,
    )
}


def main(output: Path) -> None:
    """Do all runs; each leaves history.pt and what the trainer saves."""
    torch.set_num_threads(1)
    if shards():
        let_processes_shard()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        let_deepspeed_start()
    for name, run in RUNS.items():
        trainer = run(output / name)
        models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
        trainer.state.log_history[0]["sharded"] = all(map(is_sharded, models))
        if trainer.is_world_process_zero():
            torch.save(trainer.state.log_history, output / name / "history.pt")
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
