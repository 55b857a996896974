"""Training runs of models that transformers has split over processes, each of which one process must equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from cpu_sharding import counted_gathers, small_tiles
from peft import LoraConfig
from tiny_model import make_model, make_pairs, make_tokenizer
from tiny_trainer import unequal_pairs
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dil_kernels.trainer import DILConfig, DILTrainer


@dataclass(frozen=True)
class Kind:
    """A run: its model, over which processes that is split, and the options of the trainer."""

    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] | None = None  # of DistributedConfig; None for tp_plan="auto"
    tied: bool = False
    vocabulary: int = 289
    reference: bool = False  # a ref_model, which FSDP2 allows no copies in place of
    unequal: bool = False  # of two batches that are taken at once one has long responses, the other next to none

    @property
    def data_processes(self) -> int:
        sizes = self.sizes or {}
        return sizes.get("dp_replicate_size", 1) * sizes.get("fsdp_size", 1)


LORA = {"peft_config": LoraConfig(target_modules=["gate_proj"], r=2, lora_alpha=4)}
BY_TOKENS = {"prefix_sharing": True, "max_tokens_per_batch": 64}
# By the number of processes.
KINDS = {
    2: {
        "full": Kind({"parallelism_config": ParallelismConfig(tp_size=2), "num_generations_at_eval": 2}),
        "tied": Kind(BY_TOKENS, tied=True),
        "precomputed": Kind({"precompute_ref_log_probs": True, "ref_cache_dir": "none", "padding_free": True}),
        "lora": Kind(LORA),
        "lora_fsdp2": Kind(LORA, {"fsdp_size": 2}, unequal=True),
        "fsdp2": Kind({"padding_free": True}, {"fsdp_size": 2}, tied=True, vocabulary=288, reference=True),
    },
    4: {
        "replicas": Kind({}, {"tp_size": 2, "dp_replicate_size": 2}, tied=True, reference=True, unequal=True),
        "sharded": Kind(
            {**BY_TOKENS, "precompute_ref_log_probs": True, "ref_cache_dir": "none"}, {"tp_size": 2, "fsdp_size": 2}
        ),
    },
}


def saved(folder: Path, tied: bool, vocabulary: int = 289) -> Path:
    """The directory of a model, which the first process writes, unless it is there: another may be reading it."""
    directory = folder / f"model-{'tied' if tied else 'untied'}-{vocabulary}"
    if not directory.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        make_model(7, tie_word_embeddings=tied, vocab_size=vocabulary).save_pretrained(directory)
    if dist.is_initialized():
        dist.barrier()
    return directory


def loaded(directory: Path, split: bool = True, sizes: dict[str, int] | None = None) -> Any:
    how = {"tp_plan": "auto"} if sizes is None else {"distributed_config": DistributedConfig(**sizes)}
    return AutoModelForCausalLM.from_pretrained(directory, **(how if split else {}))


def trainer_of(folder: Path, model: Any, split: bool, kind: Kind | None = None, **options: Any) -> DILTrainer:
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=False)
    kind = Kind() if kind is None else kind
    options = {**kind.options, **options}
    given = {name: options.pop(name) for name in ("ref_model", "peft_config", "compute_metrics") if name in options}
    at_once = kind.data_processes if split else 1
    by_tokens = "max_tokens_per_batch" in options
    config: dict[str, Any] = {
        "per_device_train_batch_size": 4 // at_once,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2 * (2 // at_once) if by_tokens else 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,  # gradients that are rounding alone make no steps
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 24,
        "use_cpu": not split,
        **options,
    }
    if not split:
        config["parallelism_config"] = None
    torch.manual_seed(3 + (dist.get_rank() if split else 0))  # a new adapter is that of the first process
    return DILTrainer(
        model,
        args=DILConfig(str(folder), **config),
        train_dataset=unequal_pairs() if kind.unequal else datasets.Dataset.from_list(make_pairs(12).to_list()),
        eval_dataset=make_pairs(5, seed=2),
        processing_class=make_tokenizer(),
        **given,
    )


def assert_same_on_all(value: Tensor) -> None:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    for other in values:
        torch.testing.assert_close(other, values[0], rtol=0, atol=0)


def train(folder: Path, name: str, split: bool) -> None:
    """One run, whose log, evaluation, predictions and weights go to files."""
    kind = next(kinds[name] for kinds in KINDS.values() if name in kinds)
    directory = saved(folder, kind.tied, kind.vocabulary)
    predicted: list[Any] = []

    def compute_metrics(found: Any) -> dict[str, float]:
        predicted[:] = [np.array(found.predictions), np.array(found.label_ids)]
        return {"pairs": len(found.label_ids)}

    reference = {"ref_model": loaded(directory, split, kind.sizes)} if kind.reference else {}
    trainer = trainer_of(
        folder / f"run-{name}-{split}",
        loaded(directory, split, kind.sizes),
        split,
        kind,
        compute_metrics=compute_metrics,
        **reference,
    )
    assert trainer.uses_fused_head
    for parameter_name, parameter in trainer.model.named_parameters():
        if "lora_A" in parameter_name:
            if split:
                assert_same_on_all(parameter.detach())
            # PEFT draws other numbers for a module that is split.
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter_name)))
            parameter.data.copy_(0.2 * values)
    if name == "sharded" and split:
        with small_tiles(), counted_gathers(trainer.model.lm_head) as count:
            trainer.train()
        micro_batches = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        # At most once forward and once backward, of some 15 tiles.
        assert trainer.state.global_step <= count() <= 2 * micro_batches, (count(), micro_batches)
    else:
        trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model(str(folder / f"{name}-{split}"))
    if trainer.is_world_process_zero():
        torch.save([trainer.state.log_history, evaluated, predicted], folder / f"{name}-{split}.pt")
