"""Models that transformers has split over two processes: `torchrun tensor_parallel_runs.py FOLDER RUNS`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from cpu_sharding import let_processes_shard
from peft import LoraConfig
from tiny_model import make_model, make_pairs, make_tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dil_kernels.models.fused_head import install_fused_head, remove_fused_head
from dil_kernels.models.tensor_parallel import copied
from dil_kernels.trainer import DILConfig, DILTrainer

IDS = torch.randint(6, 180, (4, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(11) < 4, -100)


def saved(folder: Path, tied: bool) -> Path:
    """The directory of a model, which the first process writes."""
    directory = folder / ("tied" if tied else "untied")
    if not dist.is_initialized() or dist.get_rank() == 0:
        make_model(7, tie_word_embeddings=tied, vocab_size=289).save_pretrained(directory)
    if dist.is_initialized():
        dist.barrier()
    return directory


def loaded(folder: Path, tied: bool = False, split: bool = True) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved(folder, tied), **({"tp_plan": "auto"} if split else {}))


def whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def scores(model: Any, how: Any = None) -> dict[str, Tensor]:
    """Log-probs, statistics and the gradients of all weights."""
    model.zero_grad()
    call = model if how is None else how
    options = {"return_statistics": True} if how is None else {}
    output = call(input_ids=IDS, score_labels=LABELS, score_options=options)
    weights = torch.linspace(-1, 2, output.token_logps.numel()).view_as(output.token_logps)
    (output.token_logps * weights).sum().backward()
    found = {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}
    found["token_logps"] = output.token_logps.detach()
    if how is None:
        found["entropy"] = output.entropy
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=2e-5 * float(value.abs().max()), msg=name)


def assert_same_on_both(value: Tensor) -> None:
    values = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(values, value)
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)


def fused_heads(folder: Path) -> None:
    """In place of logits, tied or not, with recomputed activations; removed, all is as before."""
    for tied in (False, True):
        one, split = loaded(folder, tied, split=False), loaded(folder, tied)
        assert isinstance(split.lm_head.weight, DTensor)
        logits = split(input_ids=IDS).logits.detach()
        for model in (one, split):
            install_fused_head(model)
        assert_same(scores(split), scores(one))
        torch.testing.assert_close(split(input_ids=IDS).logits.detach(), logits, rtol=0, atol=0)
        split.gradient_checkpointing_enable({"use_reentrant": False})
        split.train()
        assert_same(scores(split), scores(one))
        replica = copied(split, {})
        expected = scores(replica)
        with torch.no_grad():
            for parameter in split.parameters():
                whole_part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                whole_part.mul_(0.5)
        assert_same(scores(replica), expected)
        assert float((scores(split)["token_logps"] - expected["token_logps"]).abs().max()) > 1e-3
        remove_fused_head(replica)
        torch.testing.assert_close(replica(input_ids=IDS).logits.detach(), logits)


def compiled(folder: Path) -> None:
    one, split = loaded(folder, split=False), loaded(folder)
    for model in (one, split):
        install_fused_head(model)
    expected = scores(one)
    expected.pop("entropy")
    assert_same(scores(split, torch.compile(split)), expected)


def trainer_of(folder: Path, model: Any, split: bool, **options: Any) -> DILTrainer:
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=False)
    given = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    config: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 24,
        "use_cpu": not split,
        "parallelism_config": ParallelismConfig(tp_size=2) if split else None,
    }
    args = DILConfig(str(folder / "run"), **{**config, **options})
    torch.manual_seed(3 + (dist.get_rank() if split else 0))  # a new adapter is that of the first process
    data = datasets.Dataset.from_list(make_pairs(10).to_list())
    return DILTrainer(
        model,
        args=args,
        train_dataset=data,
        eval_dataset=make_pairs(5, seed=2),
        processing_class=make_tokenizer(),
        **given,
    )


KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "full": (False, {}),
    "tied": (True, {"prefix_sharing": True}),
    "precomputed": (False, {"precompute_ref_log_probs": True, "ref_cache_dir": "none", "padding_free": True}),
    "lora": (False, {"peft_config": LoraConfig(target_modules=["gate_proj"], r=2, lora_alpha=4)}),
}


def train(folder: Path, kind: str, split: bool) -> None:
    """One run, whose log and weights go to a file."""
    tied, options = KINDS[kind]
    trainer = trainer_of(folder, loaded(folder, tied, split), split, **options)
    assert trainer.uses_fused_head
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            if split:
                assert_same_on_both(parameter.detach())
            # PEFT draws other numbers for a module that is split.
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(0.2 * values)
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model(str(folder / f"{kind}-{split}"))
    if trainer.is_world_process_zero():
        torch.save([trainer.state.log_history, evaluated], folder / f"{kind}-{split}.pt")


def training(folder: Path) -> None:
    let_processes_shard()
    for kind in KINDS:
        train(folder, kind, split=True)


def refusals(folder: Path) -> None:
    let_processes_shard()
    with pytest.raises(NotImplementedError, match="max_tokens_per_batch shares out batches"):
        trainer_of(folder, loaded(folder), True, max_tokens_per_batch=64, padding_free=True)
    with pytest.raises(NotImplementedError, match="but model is not split so"):
        trainer_of(folder, loaded(folder, split=False), True)


RUNS = {run.__name__: run for run in (fused_heads, compiled, training, refusals)}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for name in names:
        RUNS[name](folder)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{name}: passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
