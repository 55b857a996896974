"""Models that transformers has split over processes: `torchrun tensor_parallel_runs.py FOLDER RUNS`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from cpu_sharding import let_processes_shard
from tensor_parallel_training import KINDS, loaded, saved, train, trainer_of
from torch import Tensor
from torch.distributed.tensor import DTensor

from dil_kernels.models.fused_head import install_fused_head, remove_fused_head
from dil_kernels.models.tensor_parallel import copied

IDS = torch.randint(6, 180, (4, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(11) < 4, -100)


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


def fused_heads(folder: Path) -> None:
    """In place of logits, tied or not, with recomputed activations; removed, all is as before."""
    for tied in (False, True):
        one, split = (loaded(saved(folder, tied), split) for split in (False, True))
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
    one, split = (loaded(saved(folder, tied=False), split) for split in (False, True))
    for model in (one, split):
        install_fused_head(model)
    expected = scores(one)
    expected.pop("entropy")
    assert_same(scores(split, torch.compile(split)), expected)


def training(folder: Path) -> None:
    let_processes_shard()
    for name in KINDS[dist.get_world_size()]:
        train(folder, name, split=True)


def refusals(folder: Path) -> None:
    let_processes_shard()
    untied, fsdp2 = saved(folder, tied=False), {"fsdp_size": 2}
    two, tied_in_parts = ParallelismConfig(tp_size=2), loaded(saved(folder, tied=True), sizes=fsdp2)
    for error, message, model, options in (
        (NotImplementedError, "but model was loaded with 1 and 1", loaded(untied, False), {"parallelism_config": two}),
        (NotImplementedError, "the 289 rows of the tied embeddings cannot be dealt out evenly", tied_in_parts, {}),
        (NotImplementedError, "with which it was loaded, allows none: give ref_model", loaded(untied, True, fsdp2), {}),
        (ValueError, "Resuming is not supported for models sharded", loaded(untied), {"save_strategy": "epoch"}),
    ):
        with pytest.raises(error, match=message):
            trainer_of(folder / "none", model, True, **options)


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
