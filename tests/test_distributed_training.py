"""DDP, FSDP2 and DeepSpeed ZeRO-3, from the configs that are shipped, on two CPU processes: each trains as one does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import RUNS, main
from peft import PeftModel
from tiny_model import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dil_kernels.training.metrics import METRICS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "dil_kernels" / "recipes" / "accelerate"
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
pytestmark = pytest.mark.xdist_group("distributed training")  # whose runs are made once, not once a worker
ENGINES = ["ddp", "fsdp2", pytest.param("deepspeed_zero3", marks=NEEDS_DEEPSPEED)]


def prepare(folder: Path) -> Path:
    make_model(7, tie_word_embeddings=False).save_pretrained(folder / "initial")
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("one"))
    threads = torch.get_num_threads()
    main(folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp(request.param))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / f"{request.param}.yaml"),
        "--main_process_port",
        "0",  # a free one
    ]
    command = [*launch, "--num_processes", "2", str(ROOT / "tests" / "distributed_runs.py"), str(folder)]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": python_path,
        "PYTHONWARNINGS": "ignore",
    }
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def saved_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "adapter_config.json").exists():
        model: Any = PeftModel.from_pretrained(make_model(tie_word_embeddings=False), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict()


@pytest.mark.parametrize("run", [name for name in RUNS if name != "half_precision"])
def test_two_processes_train_as_one(one_process: Path, two_processes: Path, run: str) -> None:
    histories = [torch.load(folder / run / "history.pt") for folder in (two_processes, one_process)]
    assert histories[0][0]["sharded"] == ("ddp" not in two_processes.name)
    assert any(log.get("grad_norm", 0.0) > 1.0 for log in histories[1]), "nothing was clipped"
    names = {"loss", "grad_norm", "eval_loss", *METRICS, *(f"eval_{metric}" for metric in METRICS)}
    if run != "reference_given":  # where all margins are 0 at first, accuracies are noise
        names = {name for name in names if "accuracies" not in name}
    for actual, expected in zip(*histories, strict=True):
        for key in expected.keys() & names:
            assert actual[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    actual, expected = (saved_weights(folder / run) for folder in (two_processes, one_process))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_policy_and_reference_round_alike_and_log_probs_not_at_all(two_processes: Path) -> None:
    first = torch.load(two_processes / "half_precision" / "history.pt")[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["exact"]
