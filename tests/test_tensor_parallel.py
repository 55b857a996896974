"""Models that transformers splits over two processes (`tp_plan="auto"`): fused heads and training are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from peft import PeftModel
from tensor_parallel_runs import KINDS, RUNS, loaded, train
from transformers import AutoModelForCausalLM

from dil_kernels.training.metrics import METRICS
from dil_kernels.training.set_up import refuse_split_batches

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where `RUNS` have left their results, and what they have printed."""
    folder = tmp_path_factory.mktemp("split")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [*launch, str(TESTS / "tensor_parallel_runs.py"), str(folder), *RUNS],
        capture_output=True, text=True, timeout=900, env={**os.environ, **environment},
    )  # fmt: skip
    return folder, result.stdout + result.stderr


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_compute_as_one(two_processes: tuple[Path, str], run: str) -> None:
    assert f"{run}: passed" in two_processes[1], two_processes[1][-6000:]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(two_processes: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    folder, output = two_processes
    assert "training: passed" in output, output[-6000:]
    train(tmp_path, kind, split=False)
    (history, evaluated), (expected_history, expected) = (
        torch.load(path) for path in (folder / f"{kind}-True.pt", tmp_path / f"{kind}-False.pt")
    )
    names = [name for name in METRICS if "accuracies" not in name]  # noise where margins are 0, as at first
    for name in names:
        assert evaluated[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    assert len(history) == len(expected_history) > 3
    for log, expected_log in zip(history, expected_history, strict=True):
        for name in (*names, "grad_norm"):
            if name in expected_log:
                assert log[name] == pytest.approx(expected_log[name], rel=1e-4, abs=1e-5), name
    states = []
    for directory in (folder / f"{kind}-True", tmp_path / f"{kind}-False"):
        if (directory / "adapter_config.json").exists():
            states.append(PeftModel.from_pretrained(loaded(tmp_path, split=False), directory).state_dict())
        else:
            states.append(AutoModelForCausalLM.from_pretrained(directory).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cp_size": 2}, "cuts sequences apart"),
        ({"sp_size": 2}, "cuts sequences apart"),
        ({"tp_size": 2, "dp_shard_size": 2}, "accelerate has no DDP beside"),
    ],
)
def test_what_is_not_exact_is_refused(sizes: dict[str, int], message: str) -> None:
    accelerator = SimpleNamespace(num_processes=1, parallelism_config=ParallelismConfig(**sizes))
    loading = SimpleNamespace(dispatch_batches=None, split_batches=False)
    args = SimpleNamespace(n_gpu=1, accelerator_config=loading, max_tokens_per_batch=None)
    trainer = SimpleNamespace(accelerator=accelerator, args=args, model=None, compute_metrics=None)
    with pytest.raises(NotImplementedError, match=message):
        refuse_split_batches(trainer, tensor_parallelism=True)
    with pytest.raises(NotImplementedError, match="the trainer on TRL supports data parallelism only"):
        refuse_split_batches(trainer)
