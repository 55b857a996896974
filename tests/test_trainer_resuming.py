"""A run of DILTrainer that was stopped, or killed, goes on as if it had not been."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from tiny_lora import trained_lora
from tiny_model import make_model, make_pairs, make_responses
from tiny_trainer import assert_bitwise_equal, make_trainer, resumable_run, run_out_of_memory, trained_weights
from two_processes import IMPORTS, run_on_two_processes

from dil_kernels.trainer import DILTrainer, last_complete_checkpoint
from dil_kernels.training.metrics import METRICS
from dil_kernels.training.start import CannotStartError

RESUMED = {
    "frozen copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "dropout": {"disable_dropout": False},
    "by length, within an epoch": {"train_sampling_strategy": "group_by_length"},
    "by length, in a later epoch": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_continues_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = resumable_run(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = resumable_run(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(trained_weights(resumed), trained_weights(whole))
    names = ("loss", "grad_norm", "learning_rate", *METRICS)
    for actual, expected in zip(resumed.state.log_history[:6], whole.state.log_history[:6], strict=True):
        assert {name: actual[name] for name in names} == {name: expected[name] for name in names}


BY_LENGTH = """
from tiny_model import make_pairs
from tiny_trainer import assert_bitwise_equal, make_trainer, trained_weights

def run(name):
    options = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 5}
    return make_trainer(Path(sys.argv[1], name), train_dataset=make_pairs(12), max_steps=6, **options)

whole = run("whole")
whole.train()
resumed = run("resumed")
resumed.train(resume_from_checkpoint=str(Path(sys.argv[1], "whole", "checkpoint-5")))
assert_bitwise_equal(trained_weights(resumed), trained_weights(whole))
"""


def test_two_processes_resume_within_a_later_epoch_by_length(tmp_path: Path) -> None:
    run_on_two_processes(BY_LENGTH, tmp_path, tmp_path)


def given_reference(pairs: datasets.Dataset, chosen: float) -> datasets.Dataset:
    values = [chosen] * len(pairs)
    return pairs.add_column("ref_chosen_logps", values).add_column("ref_rejected_logps", values)


def lora(**options: Any) -> Any:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def precomputed_lora(value: bool) -> dict[str, Any]:
    """Of a trained adapter, which is the reference."""
    model = trained_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1 + value)
    return {"model": model, "precompute_ref_log_probs": True}


def frozen_embeddings(value: bool, **config: Any) -> Any:
    """A model whose other weights go by the value."""
    model = make_model(value, **config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(make_model(**config).get_input_embeddings().weight)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


CHANGED = {
    "weights of the reference": precomputed_lora,
    "weights of the reference, partly frozen": lambda value: {
        "model": frozen_embeddings(value, tie_word_embeddings=False),
        "precompute_ref_log_probs": True,
    },
    "weights of the reference, given": lambda value: {"ref_model": frozen_embeddings(value)},
    "rope_parameters of the model": lambda value: {
        "model": make_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0 if value else 10000.0})
    },
    "rms_norm_eps of the reference": lambda value: {"ref_model": make_model(1, rms_norm_eps=0.1 if value else 1e-6)},
    "dtypes of the model": lambda value: {"model": make_model().to(torch.bfloat16 if value else torch.float32)},
    "micro-batch": lambda value: {
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 1 + value,
        "gradient_accumulation_steps": 2 - value,
    },
    "reference log-probs of the data, or none": lambda value: {
        "train_dataset": make_pairs(7) if value else given_reference(make_pairs(7), -10.0),
        "precompute_ref_log_probs": True,
    },
    "reference log-probs of the data, not used": lambda value: {
        "train_dataset": given_reference(make_pairs(7), -10.0),
        "precompute_ref_log_probs": value,
    },
    "labels": lambda value: {
        "train_dataset": make_responses(7).map(lambda row: {"label": row["label"] == value}),
    },
    "reference log-probs of the data": lambda value: {
        "train_dataset": given_reference(make_pairs(7), -10.0 - value),
        "precompute_ref_log_probs": True,
    },
    "alpha_pattern of adapter default": lambda value: {"peft_config": lora(alpha_pattern={"q_proj": 8 + value})},
    "bias of adapter default": lambda value: {"peft_config": lora(bias="lora_only" if value else "none")},
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_changes_what_is_learned_is_not_resumed(tmp_path: Path, what: str) -> None:
    def run(value: bool) -> DILTrainer:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        return make_trainer(tmp_path, **saving, **CHANGED[what](value))

    run(False).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(CannotStartError, match=rf"was trained with (.+; )?{what.split(',')[0]}(=|: ).+, now "):
        run(True).train(resume_from_checkpoint=True)
    run(False).train(resume_from_checkpoint=True)


def test_how_often_a_resumed_run_logs_and_evaluates_is_as_it_is_asked(tmp_path: Path) -> None:
    resumable_run(tmp_path).train()
    asked: dict[str, Any] = {"logging_steps": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    resumed = resumable_run(tmp_path, **asked, eval_dataset=make_pairs(3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    new = resumed.state.log_history[2:]
    assert [entry["step"] for entry in new if "loss" in entry] == [4, 6]
    assert [entry["step"] for entry in new if "eval_loss" in entry] == [3, 4, 5, 6]
    assert (tmp_path / "checkpoint-5").is_dir()


def test_a_batch_that_was_found_is_the_one_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out_of_memory(monkeypatch, DILTrainer, rows=4)

    def run(rows: int, find: bool) -> DILTrainer:
        options: dict[str, Any] = {"per_device_train_batch_size": rows, "auto_find_batch_size": find}
        return make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, **options)

    found = run(4, find=True)
    found.train()
    weights = trained_weights(found)
    first, rows = str(tmp_path / "checkpoint-1"), found._train_batch_size
    assert rows < 4
    for resumed in (run(4, find=True), run(rows, find=False)):
        resumed.train(resume_from_checkpoint=first)
        assert_bitwise_equal(trained_weights(resumed), weights)
    with pytest.raises(CannotStartError, match=f"was trained with global batch: {rows}, now 4"):
        run(4, find=False).train(resume_from_checkpoint=first)


def test_what_is_logged_is_of_steps_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out_of_memory(monkeypatch, DILTrainer, rows=4)
    options: dict[str, Any] = {"auto_find_batch_size": True, "train_sampling_strategy": "sequential", "max_steps": 1}
    options["train_dataset"] = make_pairs(8)
    found = make_trainer(tmp_path, per_device_train_batch_size=4, **options)
    found.train()
    assert found._train_batch_size < 4
    plain = make_trainer(tmp_path, per_device_train_batch_size=found._train_batch_size, **options)
    plain.train()
    assert found.state.log_history[0]["logps/chosen"] == plain.state.log_history[0]["logps/chosen"]


@pytest.mark.parametrize("precompute", [False, True], ids=["frozen copy", "precomputed"])
def test_resuming_keeps_the_original_reference(tmp_path: Path, precompute: bool) -> None:
    initial = make_model(attention_dropout=0.3).state_dict()
    first = resumable_run(tmp_path, precompute_ref_log_probs=precompute, max_grad_norm=0.0)
    first.train()
    assert any(not torch.equal(value, initial[name]) for name, value in trained_weights(first).items())
    resumed = resumable_run(tmp_path, precompute_ref_log_probs=precompute, max_grad_norm=0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    if precompute:
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            assert resumed.train_dataset[column][:] == first.train_dataset[column][:]
    else:
        assert_bitwise_equal(resumed.ref_model.state_dict(), initial)
        assert not any(parameter.requires_grad for parameter in resumed.ref_model.parameters())


KILLED = """
import os, signal
from transformers import Trainer, TrainerCallback
from tiny_trainer import resumable_run

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

class KillAfterStep5(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            die()

trainer = resumable_run(Path(sys.argv[1]))
if sys.argv[2] == "between checkpoints":
    trainer.add_callback(KillAfterStep5)
else:
    save = trainer._save_rng_state  # the model and the optimizer are written, the trainer state is not
    trainer._save_rng_state = lambda folder: die() if trainer.state.global_step == 6 else save(folder)
trainer.train()
"""


@pytest.mark.parametrize("moment", ["between checkpoints", "within a checkpoint"])
def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path, moment: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(f"{IMPORTS}torch.set_num_threads({torch.get_num_threads()})\n{KILLED}")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), moment], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert (tmp_path / "killed" / "checkpoint-6").exists() == (moment == "within a checkpoint")
    assert last_complete_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    resumed = resumable_run(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    whole = resumable_run(tmp_path / "whole")
    whole.train()
    assert_bitwise_equal(trained_weights(resumed), trained_weights(whole))
    assert [log["step"] for log in resumed.state.log_history] == [log["step"] for log in whole.state.log_history]
    for actual, expected in zip(resumed.state.log_history[:6], whole.state.log_history[:6], strict=True):
        assert actual["loss"] == expected["loss"]


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "epo')
    with pytest.raises(FileNotFoundError, match="no complete checkpoint to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
