"""What DILTrainer on TRL's DPOTrainer must do on any number of processes: `python trl_distributed_runs.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from cpu_sharding import is_sharded, let_deepspeed_start, let_processes_shard
from datasets import load_from_disk
from distributed_runs import shards
from tiny_model import make_model, make_pairs
from trl_runs import Unscored, make_trainer, peft

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
# Each process meets another number of pairs that do not count; the second step of an epoch has one micro-batch.
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": True},
    "packed": {"padding_free": True},
    "shared, lora": {"prefix_sharing": True, "peft_config": True},
    "packed, precomputed": {"padding_free": True, "precompute_ref_log_probs": True},
    "bf16": {"bf16": True, "max_steps": 1, "loss_type": "bce"},
}


def save_pairs(folder: Path) -> Path:
    """TRL shares precomputed log-probs between processes through the cache beside the files of a data set."""
    make_pairs(12, seed=3).save_to_disk(folder / "train")
    make_pairs(5, seed=2).save_to_disk(folder / "test")
    return folder


def run(name: str, folder: Path, processes: int) -> list[dict[str, float]]:
    """The log of a run, whose pairs are in the folder."""
    options = {"num_train_epochs": 2, **RUNS[name]}
    arguments: dict[str, Any] = {"eval_dataset": load_from_disk(folder / "test"), "data_collator": Unscored()}
    if options.pop("peft_config", False):
        arguments["peft_config"] = peft.LoraConfig(**LORA)
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    trainer = make_trainer(
        folder / "out",
        model=make_model(0, tie_word_embeddings=False),
        ref_model=None if "peft_config" in arguments else make_model(int(name != "bf16"), tie_word_embeddings=False),
        arguments=arguments,
        train_dataset=load_from_disk(folder / "train"),
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=not shards(),
        **options,
    )
    exact = []
    as_before = trainer._score

    def recording(*args: Any, **kwargs: Any) -> Any:
        scores = as_before(*args, **kwargs)
        exact.append(not torch.equal(scores.token_logps, scores.token_logps.bfloat16().float()))
        return scores

    trainer._score = recording
    trainer.train()
    trainer.state.log_history[0]["exact"] = all(exact)
    assert not shards() or is_sharded(trainer.model)
    trainer.evaluate()
    if shards() and trainer.is_world_process_zero():
        torch.save(trainer.state.log_history, folder / f"{name}.pt")
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_processes_shard()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        let_deepspeed_start()
    for name in RUNS:
        run(name, Path(sys.argv[1]), processes=2)
