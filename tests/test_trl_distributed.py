"""DILTrainer on TRL's DPOTrainer under FSDP2 and DeepSpeed ZeRO-3 on two CPU processes: it trains as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed_training import CONFIGS, NEEDS_DEEPSPEED, ROOT
from trl_distributed_runs import RUNS, run, save_pairs
from trl_runs import STATISTICS

from dil_kernels.training.metrics import METRICS

pytestmark = pytest.mark.xdist_group("distributed training in TRL")  # whose runs are made once, not once a worker
ENGINES = ["fsdp2", pytest.param("deepspeed_zero3", marks=NEEDS_DEEPSPEED)]


@pytest.fixture(scope="module", params=ENGINES)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pairs(tmp_path_factory.mktemp(request.param))
    config = CONFIGS / f"{request.param}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    command += ["--main_process_port", "0"]  # a free one
    command += [str(ROOT / "tests" / "trl_distributed_runs.py"), str(folder)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    environment["DS_ACCELERATOR"] = "cpu"
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_two_processes_train_as_one(tmp_path: Path, sharded: Path, name: str) -> None:
    history = torch.load(sharded / f"{name}.pt")
    metrics = {"grad_norm", *METRICS, *STATISTICS}
    compared = metrics | {f"eval_{metric}" for metric in metrics}
    for actual, expected in zip(history, run(name, save_pairs(tmp_path), processes=1), strict=True):
        for key in expected.keys() & compared:
            assert actual[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


def test_policy_and_reference_round_alike_and_log_probs_not_at_all(sharded: Path) -> None:
    first, *_ = torch.load(sharded / "bf16.pt")
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["exact"]
