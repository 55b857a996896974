"""Options, arguments and launches under which DILTrainer could not be right, and the defaults of its config."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer
from tiny_trainer import make_trainer, tokenized
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.config import OWN_FLAGS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"loss_type": "kl"}, "unknown loss_type 'kl'; available: lsif, ukl, bce, power, is, brier"),
        ({"scale": 2.0}, "scale=2.0 was given, but link='imitation' has no scale"),
        ({"link": "ratio", "alpha": 0.5}, "alpha=0.5 was given, but link='ratio' has no alpha"),
        ({"loss_type": "dpo", "beta": -1.0}, "beta must be a finite number > 0, got -1.0"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"loss_type": "dpo", "alpha": 0.5}, "alpha=0.5 was given, but loss_type='dpo' is not separable"),
        ({"backend": "cutlass"}, "unknown backend 'cutlass'; available: auto, triton, cpp, eager"),
        ({"truncation_mode": "middle"}, "unknown truncation_mode 'middle'; available: keep_end, keep_start"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 64, "max_prompt_length": 64}, "max_prompt_length must be from 1 to max_length - 1 = 63"),
        ({"max_prompt_length": 0}, "max_prompt_length must be from 1 to max_length - 1 = 1023"),
        (
            {"max_length": None, "max_prompt_length": 8},
            "max_prompt_length=8 was given, but max_length=None cuts nothing",
        ),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor=0.1 was given, which is of cross-entropy: losses of preference pairs that smooth "
            "labels have label_smoothing",
        ),
        (
            {"length_column_name": "words", "train_sampling_strategy": "group_by_length"},
            "length_column_name='words' was given, but the lengths of rows are counted here",
        ),
        (
            {"bf16_full_eval": True, "use_cpu": True},
            "bf16_full_eval=True was given, but an evaluation outside of training rounds",
        ),
        ({"fp16_full_eval": True}, "fp16_full_eval=True was given, but an evaluation outside of"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics=\['inputs'\] was given, but a batch has two"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}"):
        DILConfig(str(tmp_path), **options)


@pytest.mark.parametrize("name", ["average_log_prob", "fused_head", *OWN_FLAGS])
@pytest.mark.parametrize("value", [0, "no"])
def test_what_is_true_or_false_is_so(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be true or false, got {value!r}"):
        DILConfig(str(tmp_path), **{name: value})


def test_the_prompt_takes_half_of_the_length_unless_told(tmp_path: Path) -> None:
    assert DILConfig(str(tmp_path)).max_prompt_length == 512
    assert DILConfig(str(tmp_path), max_length=96).max_prompt_length == 48
    assert DILConfig(str(tmp_path), max_length=2048, max_prompt_length=1800).max_prompt_length == 1800


def test_every_option_says_what_it_is() -> None:
    inherited = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(DILConfig):
        if field != inherited.get(field.name) and field.name not in inherited:
            assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("build", "error", "problem"),
    [
        (
            lambda model: {"model": model, "ref_model": model},
            ValueError,
            "ref_model is the model that training changes",
        ),
        (lambda model: {"train_dataset": [1]}, TypeError, "preference pairs must come as a datasets.Dataset, got list"),
        (
            lambda model: {
                "train_dataset": datasets.Dataset.from_list([{"prompt_ids": [1], "completion_ids": [2], "label": 1}])
            },
            ValueError,
            "the train data set, column 'label': expected true or false, got int64",
        ),
        (
            lambda model: {
                "train_dataset": datasets.Dataset.from_list(
                    [{"prompt_ids": [1], "completion_ids": [2], "label": [True]}]
                )
            },
            ValueError,
            "the train data set, column 'label': expected true or false, got List",
        ),
        (
            lambda model: {"train_dataset": make_pairs(2).to_iterable_dataset()},
            TypeError,
            "the train data set is streamed",
        ),
    ],
)
def test_a_trainer_that_could_not_be_right_is_refused(tmp_path: Path, build: Any, error: Any, problem: str) -> None:
    with pytest.raises(error, match=problem):
        make_trainer(tmp_path, **build(make_model()))


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be a DILConfig, got TrainingArguments"):
        DILTrainer(make_model(), args=TrainingArguments(str(tmp_path)), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="processing_class must be the tokenizer"):
        DILTrainer(make_model(), args=DILConfig(str(tmp_path)))


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DILConfig, "n_gpu", 2)
    with pytest.raises(NotImplementedError, match="2 GPUs in one process"):
        make_trainer(tmp_path)


def test_processes_that_would_train_apart_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs without use_cpu: accelerate then starts no process group, and each process is the main one."""
    args = DILConfig(str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotImplementedError, match="2 processes were launched, but each would train alone"):
        DILTrainer(make_model(), args=args, train_dataset=make_pairs(2), processing_class=make_tokenizer())


def test_the_package_alone_does_not_import_transformers() -> None:
    code = "import sys, dil_kernels; assert not {'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def with_router(model: Any) -> Any:
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches or split_batches cuts batches apart"),
        ({"accelerator_config": {"split_batches": True}}, "dispatch_batches or split_batches cuts batches apart"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler=False: a run that is resumed"),
        ({"model": with_router(make_model())}, "DILTrainer adds no router_aux_loss"),
    ],
    ids=["dispatch", "split", "sampler", "router"],
)
def test_a_loss_that_would_be_another_one_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(NotImplementedError, match=problem):
        make_trainer(tmp_path, **options)


def test_a_router_loss_that_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 288}
    make_trainer(tmp_path, model=MixtralForCausalLM(MixtralConfig(**sizes, router_aux_loss_coef=0.0)))
    assert "router_aux_loss_coef" not in caplog.text
    make_trainer(tmp_path, model=MixtralForCausalLM(MixtralConfig(**sizes, router_aux_loss_coef=0.02)))
    assert (
        "MixtralForCausalLM can balance its experts by a loss of their router (router_aux_loss_coef=0.02)"
        in caplog.text
    )


def test_log_probs_of_the_data_that_are_not_used_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = make_pairs(7).add_column("ref_chosen_logps", [-1.0] * 7).add_column("ref_rejected_logps", [-2.0] * 7)
    said = (
        "the train data set has reference log-probs (ref_chosen_logps, ref_rejected_logps), which are not used: they "
        "would be with precompute_ref_log_probs=True"
    )
    for dataset in (given, tokenized(given)):
        caplog.clear()
        make_trainer(tmp_path, train_dataset=dataset, precompute_ref_log_probs=True)
        assert said not in caplog.messages
        make_trainer(tmp_path, train_dataset=dataset)
        assert caplog.messages.count(said) == 1


def test_logits_of_more_positions_than_the_batch_has_are_refused(tmp_path: Path) -> None:
    model = make_model(0)
    forward = model.forward

    def longer(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = torch.cat([output.logits, output.logits[:, -2:]], dim=1)
        return output

    trainer = make_trainer(tmp_path, model=model, fused_head=False, max_steps=1)
    model.forward = longer
    with pytest.raises(ValueError, match="labels must be"):
        trainer.train()


def test_the_loss_is_that_of_the_arguments_as_they_are(tmp_path: Path) -> None:
    pairs = make_pairs(4, seed=1)
    trainer = make_trainer(tmp_path, model=make_model(0), ref_model=make_model(1), eval_dataset=pairs, max_steps=1)
    before = trainer.evaluate()["eval_loss"]
    trainer.args.alpha = 0.5
    assert trainer.evaluate()["eval_loss"] != before
