"""Two machines without a shared file system: processes of one run, each in a home of its own, over loopback (gloo)."""

from __future__ import annotations

import contextlib
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import Run, Runner, make_inputs, result
from tiny_model import make_model
from tiny_trainer import make_trainer
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from dil_kernels.training import agreement, start
from dil_kernels.training.agreement import done_by_all
from dil_kernels.training.sharding import _uses_all_parameters, expect_all_gradients

HOST = socket.gethostname()
pytestmark = pytest.mark.xdist_group("runs of dil-train")  # one process forks all of them


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(make_inputs(tmp_path_factory.mktemp("machines") / "inputs"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_on_two(runner: Runner, homes: list[Path], out: str = "out", **more: Any) -> list[Run]:
    """One run; torchrun and SLURM give the same variables."""
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        return [
            stack.enter_context(
                runner.start(
                    home,
                    Path(out),
                    environment={
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port,
                        "WORLD_SIZE": "2",
                        "RANK": str(rank),
                        "LOCAL_RANK": "0",
                        "LOCAL_WORLD_SIZE": "1",
                        "OMP_NUM_THREADS": "1",  # which accelerate would set to more
                        "HOME": str(home),
                    },
                    **{"per_device_train_batch_size": 2, "ddp_backend": "gloo", **more},
                )
            )
            for rank, home in enumerate(homes)
        ]


@pytest.fixture(scope="module")
def machines(runner: Runner) -> list[Path]:
    """The homes of two machines after a run."""
    homes = [runner.folder(name) for name in ("one", "two")]
    for run in run_on_two(runner, homes):
        assert run.status == 0, run.said
        assert "find_unused_parameters" not in run.said
    return homes


def test_each_machine_has_caches_of_its_own_and_both_train_as_on_one(runner: Runner, machines: list[Path]) -> None:
    shared = runner.folder("shared")
    for run in run_on_two(runner, [shared, shared]):
        assert run.status == 0, run.said
    assert result(machines[0] / "out") == result(shared / "out")
    assert not list((machines[1] / "out").rglob("*.safetensors"))
    again = run_on_two(runner, machines, out="again")  # the main process has the references, the other one has not
    assert [run.status for run in again] == [0, 0]
    assert f"read from {machines[0]}/caches/refs" in again[0].said
    assert result(machines[0] / "again") == result(shared / "out")


def test_a_checkpoint_that_one_machine_lacks_is_said_on_both(runner: Runner, machines: list[Path]) -> None:
    runs = run_on_two(runner, machines, resume_from_checkpoint=True)
    assert [run.status for run in runs] == [2, 2]
    assert runs[0].error == runs[1].error
    assert runs[0].error.startswith(
        f"--resume-from-checkpoint: process 1 on {HOST}: out: no complete checkpoint to resume from; every process "
        "reads the checkpoint: let --output-dir be on a file system that all machines share, or copy"
    )


def test_a_checkpoint_that_was_copied_is_resumed_from(runner: Runner, machines: list[Path]) -> None:
    copies = [home.with_name(f"{home.name}_copy") for home in machines]
    for home, copy in zip(machines, copies, strict=True):
        shutil.copytree(home, copy)
        shutil.rmtree(copy / "out" / "checkpoint-6")
    shutil.copytree(copies[0] / "out" / "checkpoint-4", copies[1] / "out" / "checkpoint-4", dirs_exist_ok=True)
    runs = run_on_two(runner, copies, resume_from_checkpoint=True)
    assert [run.status for run in runs] == [0, 0], runs[0].said
    assert result(copies[0] / "out") == result(machines[0] / "out")


@pytest.mark.parametrize("theirs", ["another", "broken", "as here"])
def test_a_checkpoint_is_resumed_from_where_every_process_has_the_same(
    theirs: str, machines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second process only what it tells is there."""
    here = machines[0] / "out" / "checkpoint-4"

    def told(value: Any) -> list[Any]:
        if len(value) == 2:  # whether each has found a whole one
            return [value, ("there", "out/checkpoint-4 is broken" if theirs == "broken" else None)]
        return [value, ("there", "out/checkpoint-4", "of another" if theirs == "another" else value[2])]

    monkeypatch.setattr(agreement, "told_by_all", told)
    monkeypatch.setattr(start, "told_by_all", told)
    if theirs == "as here":
        assert start.agreed_checkpoint(str(here), here.parent) == here
        return
    with pytest.raises(start.CannotStartError) as caught:
        start.agreed_checkpoint(str(here), here.parent)
    said = "process 1 on there: out/checkpoint-4 is broken"
    if theirs == "another":
        said = f"process 0 on {HOST} would resume from {here}, but process 1 on there from out/checkpoint-4, "
        said += "which is another one"
    assert str(caught.value) == f"{said}; {start.TO_SHARE}"


def test_data_that_one_machine_lacks_are_said_on_both(runner: Runner, machines: list[Path]) -> None:
    homes = [machines[0], runner.folder("empty")]
    (homes[1] / "pairs.jsonl").unlink()
    runs = run_on_two(runner, homes, out="new", train_file="pairs.jsonl")
    assert [run.status for run in runs] == [2, 2]
    assert runs[0].error == runs[1].error == f"process 1 on {HOST}: pairs.jsonl: no such file"


def test_processes_that_would_train_alone_are_refused_before_data_are_read(runner: Runner) -> None:
    folder = runner.folder("alone")
    shutil.rmtree(folder / "model")
    (folder / "pairs.jsonl").unlink()
    run = runner.run(folder, folder / "out", environment={"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, use_cpu=False)
    assert run.status == 2
    assert run.error.startswith("2 processes were launched, but each would train alone, on all of the data")
    assert not (folder / "out").exists()


def test_one_process_has_its_own_errors() -> None:
    assert done_by_all(lambda: 3, RuntimeError) == 3
    with pytest.raises(KeyError, match="mine"):
        done_by_all(lambda: {}["mine"], RuntimeError)


def unused(model: Any) -> Any:
    model.unused = torch.nn.Parameter(torch.zeros(2))
    return model


def test_where_nothing_can_be_unused() -> None:
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixture = MixtralForCausalLM(
        MixtralConfig(**small, num_key_value_heads=2, intermediate_size=16, num_local_experts=2)
    )
    skipping = {**small, "ffn_dim": 16, "word_embed_proj_dim": 16}
    assert _uses_all_parameters(make_model())
    assert _uses_all_parameters(OPTForCausalLM(OPTConfig(**skipping)))
    assert not _uses_all_parameters(OPTForCausalLM(OPTConfig(**skipping, layerdrop=0.5)))
    assert not _uses_all_parameters(mixture)
    assert not _uses_all_parameters(unused(make_model()))
    frozen = unused(make_model())
    frozen.unused.requires_grad_(False)
    assert _uses_all_parameters(frozen)


def test_the_search_is_left_to_ddp_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for given in (None, True):
        trainer = make_trainer(tmp_path, ddp_find_unused_parameters=given)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        expect_all_gradients(trainer.model, trainer.accelerator, given)
        found.append(trainer.accelerator.ddp_handler.find_unused_parameters)
        monkeypatch.undo()
    assert found == [False, True]
