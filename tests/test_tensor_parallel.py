"""Models that transformers splits over processes as it loads them: fused heads and training are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, PeftModel
from tensor_parallel_runs import RUNS
from tensor_parallel_training import KINDS, train
from tiny_model import make_model
from transformers import AutoModelForCausalLM

from dil_kernels.training.adapters import with_adapter
from dil_kernels.training.metrics import METRICS
from dil_kernels.training.set_up import policy_and_reference, refuse_split_batches

TESTS = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("tensor parallelism")  # whose runs are made once, not once a worker


def launched(folder: Path, processes: int, *runs: str) -> tuple[Path, str]:
    """Where some of `RUNS` have left their results, and what they have printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [*launch, str(TESTS / "tensor_parallel_runs.py"), str(folder), *runs],
        capture_output=True, text=True, timeout=900, env={**os.environ, **environment},
    )  # fmt: skip
    return folder, result.stdout + result.stderr


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return launched(tmp_path_factory.mktemp("two"), 2, *RUNS)


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return launched(tmp_path_factory.mktemp("four"), 4, "training")


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_compute_as_one(two_processes: tuple[Path, str], run: str) -> None:
    assert f"{run}: passed" in two_processes[1], two_processes[1][-6000:]


@pytest.mark.parametrize("name", KINDS[2])
def test_two_processes_train_as_one(two_processes: tuple[Path, str], tmp_path: Path, name: str) -> None:
    assert_trained_as_one(*two_processes, tmp_path, name)


@pytest.mark.parametrize("name", KINDS[4])
def test_data_parallelism_beside_it_trains_as_one(four_processes: tuple[Path, str], tmp_path: Path, name: str) -> None:
    assert_trained_as_one(*four_processes, tmp_path, name)


def assert_trained_as_one(folder: Path, output: str, alone: Path, name: str) -> None:
    """Losses, gradient norms, metrics, evaluation, predictions, answers to prompts and weights."""
    assert "training: passed" in output, output[-6000:]
    train(alone, name, split=False)
    (history, evaluated, predicted), (expected_history, expected, expected_predicted) = (
        torch.load(path, weights_only=False) for path in (folder / f"{name}-True.pt", alone / f"{name}-False.pt")
    )
    names = [metric for metric in METRICS if "accuracies" not in metric]  # noise where margins are 0, as at first
    assert evaluated["eval_pairs"] == expected["eval_pairs"] == 5
    for metric in names:
        assert evaluated[f"eval_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-4, abs=1e-5), metric
    for actual, value in zip(predicted, expected_predicted, strict=True):
        assert actual == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert len(history) == len(expected_history) > 3
    for log, expected_log in zip(history, expected_history, strict=True):
        for metric in (*names, "grad_norm"):
            if metric in expected_log:
                assert log[metric] == pytest.approx(expected_log[metric], rel=1e-4, abs=1e-5), metric
    answers = [path / "generations.md" for path in (folder / f"run-{name}-True", alone / f"run-{name}-False")]
    assert answers[0].exists() == answers[1].exists() == (name == "full")
    assert name != "full" or answers[0].read_text() == answers[1].read_text()
    states = []
    for directory in (folder / f"{name}-True", alone / f"{name}-False"):
        if (directory / "adapter_config.json").exists():
            base = AutoModelForCausalLM.from_pretrained(alone / "model-untied-289")
            states.append(PeftModel.from_pretrained(base, directory).state_dict())
        else:
            states.append(AutoModelForCausalLM.from_pretrained(directory).state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cp_size": 2}, "cuts sequences apart"),
        ({"sp_size": 2}, "cuts sequences apart"),
        ({"dp_shard_size": 2}, "but no tp_size: leave it out"),
        ({"tp_size": 2, "dp_shard_size": 2}, "tp_size=2 and 2 for data parallelism, but model was loaded with 1 and 1"),
    ],
)
def test_what_is_not_exact_is_refused(sizes: dict[str, int], message: str) -> None:
    accelerator = SimpleNamespace(num_processes=1, parallelism_config=ParallelismConfig(**sizes))
    loading = SimpleNamespace(dispatch_batches=None, split_batches=False)
    args = SimpleNamespace(n_gpu=1, accelerator_config=loading)
    trainer = SimpleNamespace(accelerator=accelerator, args=args, model=None, eval_dataset=None)
    with pytest.raises(NotImplementedError, match=message):
        refuse_split_batches(trainer, tensor_parallelism=True)
    with pytest.raises(NotImplementedError, match="the trainer on TRL supports data parallelism only"):
        refuse_split_batches(trainer)


def test_balanced_batches_are_not_dealt_out_to_the_parts_of_a_model() -> None:
    config = SimpleNamespace(distributed_config=SimpleNamespace(dp_size=1))
    model = SimpleNamespace(is_distributed_loading_by_transformers=True, _tp_size=2, config=config)
    loading = SimpleNamespace(dispatch_batches=None, split_batches=False)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2, parallelism_config=ParallelismConfig(tp_size=2)),
        args=SimpleNamespace(n_gpu=1, accelerator_config=loading, train_sampling_strategy="batch_rebalance"),
        model=model,
        eval_dataset=None,
    )
    with pytest.raises(NotImplementedError, match="'batch_rebalance' was given, but it deals out batches"):
        refuse_split_batches(trainer, tensor_parallelism=True)


def test_a_reference_is_not_split_over_processes_with_different_batches() -> None:
    model, ref_model = make_model(), make_model()
    ref_model._tp_size = 2
    with pytest.raises(NotImplementedError, match="ref_model was loaded with tp_size=2, but model with 1"):
        policy_and_reference(model, ref_model, None)
    for sizes in ((2, 2), (4, 2), (2, 1)):
        model._tp_size, ref_model._tp_size = sizes
        assert policy_and_reference(model, ref_model, None) == (model, ref_model)


def test_layers_of_a_split_model_are_not_copied_into_an_adapter() -> None:
    model = make_model()
    model._tp_size = 2
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(NotImplementedError, match="peft cannot copy layers of a model that is split"):
        with_adapter(model, config, SimpleNamespace(seed=0))


@pytest.mark.parametrize(("target", "name"), [("lm_head", "head"), ("embed_tokens", "embeddings")])
def test_adapters_on_a_split_vocabulary_are_refused(target: str, name: str) -> None:
    model = make_model()
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match=f"the adapter is on the {name}, whose vocabulary is split"):
        with_adapter(model, LoraConfig(target_modules=["q_proj", target]), SimpleNamespace(seed=0))


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_model_in_parts_is_not_given_to_another_engine(engine: str) -> None:
    model = SimpleNamespace(is_distributed_loading_by_transformers=True)
    loading = SimpleNamespace(dispatch_batches=None, split_batches=False)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, parallelism_config=None),
        args=SimpleNamespace(n_gpu=1, accelerator_config=loading),
        model=model,
        ref_model=None,
        eval_dataset=None,
        is_fsdp_enabled=engine == "fsdp",
        is_deepspeed_enabled=engine == "deepspeed",
    )
    with pytest.raises(NotImplementedError, match="accelerate was asked for FSDP or DeepSpeed: launch with torchrun"):
        refuse_split_batches(trainer, tensor_parallelism=True)
    for models in ({"model": model}, {"model": SimpleNamespace(), "ref_model": model}):
        vars(trainer).update(models)
        with pytest.raises(NotImplementedError, match="and load models whole"):
            refuse_split_batches(trainer)
