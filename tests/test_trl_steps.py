"""Training by DILTrainer on TRL's DPOTrainer against plain PyTorch: steps, accumulation, two processes, evaluation,
resumption."""

from __future__ import annotations

import copy
import functools
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from plain_training import OPTIONS, RELATIVE, GradientRecorder, assert_all_close, plain_gradients
from tiny_model import make_model, make_pairs, save_model
from tiny_trainer import run_out_of_memory, trained_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl_runs import (
    EXACT,
    STATISTICS,
    Unscored,
    accumulated,
    batch_of,
    logs_of,
    make_trainer,
    near,
    peft,
    plain_pairs,
)
from two_processes import run_on_two_processes

from dil_kernels.integrations.trl import DILTrainer
from dil_kernels.training.metrics import METRICS

WAYS = {"fused head": {}, "logits": {"fused_head": False}, "eager": {"fused_head": False, "backend": "eager"}}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("name", ["lsif", "ukl", "bce", "dpo", "dpo, nll", "power"])
def test_a_step_is_that_of_plain_pytorch(tmp_path: Path, name: str, average: bool, way: dict[str, Any]) -> None:
    ref, recorder = make_model(0).double(), GradientRecorder()
    policy = near(ref)
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        arguments={"callbacks": [recorder]},
        per_device_train_batch_size=7,
        max_steps=1,
        average_log_prob=average,
        **{"loss_type": name, **OPTIONS.get(name, {})},
        **way,
    )
    trainer.train()
    truth = plain_pairs(policy, ref, batch_of(trainer), name, average)
    (logged,) = logs_of(trainer)
    for metric in METRICS:
        relative = RELATIVE if metric == "loss" else EXACT  # transformers sums the loss in fp32
        assert logged[metric] == pytest.approx(truth[metric].mean().item(), rel=relative), metric
    assert_all_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy), EXACT)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (3, 3), (1, 7)])
def test_accumulation_gives_the_weights_of_the_full_batch(tmp_path: Path, batch_size: int, accumulation: int) -> None:
    full = accumulated(tmp_path, 7, 1)
    assert_all_close(accumulated(tmp_path, batch_size, accumulation), full, 1e-12)
    moved = max((value - make_model(0).double().state_dict()[name]).abs().max() for name, value in full.items())
    assert moved > 1e-3


class HostReads(TorchDispatchMode):
    """The files in which a value of a tensor is read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            callers = (Path(frame.filename) for frame in reversed(traceback.extract_stack()[:-1]))
            self.files.append(next(path.name for path in callers if "torch" not in path.parts))
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_does_not_wait_for_the_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    batch = batch_of(trainer)
    trainer.model.train()
    with HostReads() as reads:
        trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
        trainer.compute_loss(trainer.model, batch)
    # transformers looks for padding; the rest is checked on the CPU only
    assert set(reads.files) <= {"masking_utils.py", "checks.py", "logit_processing.py", "linear.py"}


def test_a_head_that_cannot_be_fused_is_scored_from_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(model: Any) -> dict[str, Tensor]:
        trainer = make_trainer(tmp_path, model=model.double(), ref_model=make_model(1).double(), max_steps=2)
        trainer.train()
        return trained_weights(trainer)

    model = make_model(0)
    model.lm_head.forward = functools.partial(torch.nn.Linear.forward, model.lm_head)
    actual = run(model)
    assert "taken from logits, since LlamaForCausalLM: the forward of its output head was replaced" in caplog.text
    assert_all_close(actual, run(make_model(0)), EXACT)
    model = make_model(0)
    model.lm_head.forward = functools.partial(torch.nn.Linear.forward, model.lm_head)
    with pytest.raises(ValueError, match="fused_head=True was given, but LlamaForCausalLM: the forward"):
        make_trainer(tmp_path, model=model, fused_head=True, max_steps=2).train()


def test_pairs_without_a_scored_token_are_left_out_of_the_mean(tmp_path: Path) -> None:
    arguments = {"data_collator": Unscored()}
    actual = accumulated(tmp_path, 1, 7, arguments=arguments)
    counted = [pair for pair in make_pairs(7).to_list() if len(pair["prompt"].split()) % 2 == 0]
    assert 2 <= len(counted) <= 5
    assert_all_close(actual, accumulated(tmp_path, len(counted), 1, train_dataset=Dataset.from_list(counted)), 1e-12)


DISTRIBUTED = """
from test_trl_steps import distributed_run
distributed_run(Path(sys.argv[1]), per_device_train_batch_size=2, ddp_backend="gloo")
"""


def distributed_run(output_dir: Path, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The run that one and two processes must make alike: 3 micro-batches an epoch, two of them a step.

    Each process meets another number of pairs that do not count, and the evaluation set leaves one a pair short.
    """
    recorder = GradientRecorder()
    # TRL shares precomputed log-probs between processes through the cache beside the files of a data set.
    pairs = {split: load_from_disk(str(output_dir / split)) for split in ("train", "test")}
    trainer = make_trainer(
        output_dir,
        model=make_model(0).double(),
        ref_model=make_model(1).double(),
        train_dataset=pairs["train"],
        arguments={"callbacks": [recorder], "eval_dataset": pairs["test"], "data_collator": Unscored()},
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        precompute_ref_log_probs=True,
        per_device_eval_batch_size=2,
        **options,
    )
    trainer.train()
    trainer.evaluate()
    result = (recorder.steps[0], trainer.state.log_history)
    if trainer.is_world_process_zero():
        torch.save(result, output_dir / "result.pt")
    return result


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for run in ("one", "two"):
        make_pairs(12, seed=3).save_to_disk(tmp_path / run / "train")
        make_pairs(5, seed=2).save_to_disk(tmp_path / run / "test")
    run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path / "two")
    gradients, history = torch.load(tmp_path / "two" / "result.pt")
    expected_gradients, expected_history = distributed_run(tmp_path / "one", per_device_train_batch_size=4)
    assert_all_close(gradients, expected_gradients, 1e-7)  # the reference sums are stored in fp32
    metrics = (*METRICS, *STATISTICS)
    compared = {*metrics, *(f"eval_{metric}" for metric in metrics)}
    for actual, expected in zip(history, expected_history, strict=True):
        for key in expected.keys() & compared:
            assert actual[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
def test_evaluation_is_the_mean_over_all_pairs(tmp_path: Path, precompute: bool) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(5, seed=1)
    trainer = make_trainer(
        tmp_path,
        model=policy,
        ref_model=ref,
        arguments={"eval_dataset": {"held_out": pairs}},
        per_device_eval_batch_size=2,
        precompute_ref_log_probs=precompute,
    )
    metrics = trainer.evaluate()
    truth = plain_pairs(
        make_model(0).double(), make_model(1).double(), batch_of(trainer, trainer.eval_dataset["held_out"])
    )
    for metric in METRICS:
        assert metrics[f"eval_held_out_{metric}"] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric


def test_compute_metrics_gets_the_logits(tmp_path: Path) -> None:
    shapes = []
    trainer = make_trainer(
        tmp_path,
        arguments={
            "eval_dataset": make_pairs(3, seed=1),
            "compute_metrics": lambda result: shapes.append(result.predictions.shape) or {"seen": 1.0},
        },
        per_device_eval_batch_size=3,
    )
    assert trainer.evaluate()["eval_seen"] == 1.0
    batch = batch_of(trainer, trainer.eval_dataset)
    assert shapes == [(*batch["input_ids"].shape, 288)]


def resumable(output_dir: Path, **options: Any) -> Any:
    return make_trainer(
        output_dir,
        per_device_train_batch_size=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        optim="adamw_torch",
        train_sampling_strategy="random",
        **options,
    )


@pytest.mark.parametrize("rows", [{}, {"prefix_sharing": True}], ids=["padded", "shared"])
def test_a_resumed_run_continues_exactly(tmp_path: Path, rows: dict[str, Any]) -> None:
    whole = resumable(tmp_path, **rows)
    whole.train()
    resumed = resumable(tmp_path, model=make_model(5), **rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for actual, expected in zip(logs_of(resumed), logs_of(whole), strict=True):
        assert {**actual, "num_tokens": 0} == {**expected, "num_tokens": 0}  # TRL counts them from the resumption
    for name, value in trained_weights(whole).items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    card = (tmp_path / "README.md").read_text()
    assert "trained with DIL" in card
    assert "2503.05079" in card
    assert "xiao2025connection" in card


@pytest.mark.parametrize(
    "options",
    [{"logging_steps": 1}, {"logging_steps": 9, "save_strategy": "steps", "save_steps": 1}, {"logging_strategy": "no"}],
    ids=["log", "save", "end"],
)
def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path, options: dict[str, Any]) -> None:
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    trainer = make_trainer(tmp_path, model=model, per_device_train_batch_size=2, max_steps=2, **options)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is not finite"):
        trainer.train()
    assert trainer.state.global_step == (2 if "logging_strategy" in options else 1)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("saving", [{"save_strategy": "steps", "save_steps": 1}, {}], ids=["save", "end"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, saving: dict[str, Any]) -> None:
    class Spoil(TrainerCallback):
        """The loss of the step is finite, its gradient is not."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            next(model.parameters()).grad.fill_(torch.inf)

    trainer = make_trainer(tmp_path, arguments={"callbacks": [Spoil()]}, max_steps=1, **saving)
    with pytest.raises(FloatingPointError, match="the weights are not finite after step 1, whose loss was"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_is_logged_is_of_steps_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out_of_memory(monkeypatch, DILTrainer, rows=4)
    found = make_trainer(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True, max_steps=1)
    found.train()
    assert found._train_batch_size < 4
    plain = make_trainer(tmp_path, per_device_train_batch_size=found._train_batch_size, max_steps=1)
    plain.train()
    for metric in ("rewards/chosen", "logps/chosen", "entropy", "num_tokens"):
        assert logs_of(found)[0][metric] == logs_of(plain)[0][metric], metric


def test_a_compiled_model_keeps_its_fused_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        trainer = make_trainer(tmp_path, per_device_train_batch_size=7, max_steps=2, **options)
        trainer.train()
        return trained_weights(trainer)

    compiled = run(torch_compile=True, torch_compile_backend="eager", fused_head=True)
    assert_all_close(compiled, run(), RELATIVE)
    assert "from logits" not in caplog.text


def test_weights_in_4_bits_pass_gradients_on(tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would repack them for the reference, and cut the gradients."""
    pytest.importorskip("bitsandbytes")
    base = save_model(tmp_path, make_model(tie_word_embeddings=False, hidden_size=64, intermediate_size=128))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    recorder = GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        model=AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization),
        arguments={"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"]), "callbacks": [recorder]},
        max_steps=1,
    )
    trainer.train()
    gradients = {name: value for name, value in recorder.steps[0].items() if "lora_B" in name}
    assert len(gradients) == 2
    assert all(value.any() for value in gradients.values())
