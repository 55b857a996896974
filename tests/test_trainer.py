"""DILTrainer against plain PyTorch, exact accumulation and resumption, and what must stop it."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments
from two_processes import run_on_two_processes

from dil_kernels import DILOutput
from dil_kernels.data.tokenization import PreferenceCollator, tokenize_dataset
from dil_kernels.trainer import DILConfig, DILTrainer, last_complete_checkpoint
from dil_kernels.training.checkpoints import where_to_resume
from dil_kernels.training.loss_watch import LogRatioRange, NonFinitePairs, safe_log_ratios
from dil_kernels.training.metrics import METRICS, batch_metrics, pair_metrics

ROOT = Path(__file__).parents[1]
RELATIVE = 1e-5  # fp32 against fp64, of the largest entry: two layers, a few hundred terms a sum
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


def make_trainer(output_dir: Path, **options: Any) -> DILTrainer:
    arguments = {
        name: options.pop(name)
        for name in (
            "model",
            "ref_model",
            "train_dataset",
            "eval_dataset",
            "data_collator",
            "callbacks",
            "optimizers",
            "peft_config",
            "processing_class",
        )
        if name in options
    }
    config = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "ref_cache_dir": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 24,
    }
    args = DILConfig(str(output_dir), **{**config, **options})
    defaults = {"model": make_model(), "train_dataset": make_pairs(7), "processing_class": make_tokenizer()}
    return DILTrainer(args=args, **{**defaults, **arguments})


def tokenized(pairs: datasets.Dataset, max_length: int = 24) -> datasets.Dataset:
    return tokenize_dataset(
        pairs, make_tokenizer(), max_length=max_length, max_prompt_length=max_length // 2, truncation_mode="keep_end"
    )


def batch_of(pairs: datasets.Dataset, max_length: int = 24) -> dict[str, Tensor]:
    return PreferenceCollator(0)(tokenized(pairs, max_length).to_list())


PLAIN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsif": lambda u_w, u_l: -u_w.exp() + (2 * u_l).exp() / 2,
    "ukl": lambda u_w, u_l: -u_w + u_l.exp(),
    "bce": lambda u_w, u_l: softplus(-u_w) + softplus(u_l),
    "dpo": lambda u_w, u_l: softplus(-0.3 * (u_w - u_l)),
    "bce, alpha 0.5": lambda u_w, u_l: softplus(-u_w) + softplus(u_w) / 2 + softplus(u_l) / 2,
}
OPTIONS: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.3}, "bce, alpha 0.5": {"loss_type": "bce", "alpha": 0.5}}


def plain_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-prob of each scored token, 0 elsewhere, and the mask; fp64, the whole log_softmax."""
    batch = {
        name: value.to(next(model.parameters()).device)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * mask, mask


def plain_pairs(
    policy: torch.nn.Module, ref: torch.nn.Module, batch: dict[str, Tensor], name: str = "lsif", average: bool = True
) -> dict[str, Tensor]:
    """METRICS of every pair, [B] each."""
    logps, mask = plain_logps(policy, batch)
    with torch.no_grad():
        ref_logps, _ = plain_logps(ref, batch)
    u = (logps - ref_logps).sum(1)
    if average:
        u = u / mask.sum(1)
    (u_w, u_l), (chosen, rejected) = u.chunk(2), logps.sum(1).chunk(2)
    return {
        "loss": PLAIN_LOSSES[name](u_w, u_l),
        "rewards/chosen": u_w,
        "rewards/rejected": u_l,
        "rewards/margins": u_w - u_l,
        "rewards/accuracies": (u_w > u_l).double(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def plain_gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_gradients_close(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert actual.keys() == truth.keys()
    scale = max(gradient.abs().max().item() for gradient in truth.values())
    assert scale > 1e-3, "gradients that vanish prove nothing"
    for name, gradient in truth.items():
        error = (actual[name].double() - gradient).abs().max().item()
        assert error <= RELATIVE * scale, f"{name}: {error / scale:.2e} of the largest gradient"


class GradientRecorder(TrainerCallback):
    """The gradients of each optimizer step, before it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def trained_weights(trainer: DILTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_bitwise_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs by {(actual[name] - value).abs().max():.1e}"


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("name", PLAIN_LOSSES)
def test_a_step_is_that_of_plain_pytorch(tmp_path: Path, name: str, average: bool, device: str) -> None:
    policy, ref = make_model(0), make_model(0)
    with torch.no_grad():  # near the reference, so that exp(2 u) of a whole sequence stays finite
        for index, parameter in enumerate(policy.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    recorder = GradientRecorder()
    pairs = make_pairs(5, seed=3)
    options = {"loss_type": name, **OPTIONS.get(name, {})}
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        train_dataset=pairs,
        callbacks=[recorder],
        per_device_train_batch_size=5,
        max_steps=1,
        max_grad_norm=0.0,
        average_log_prob=average,
        use_cpu=device == "cpu",
        **options,
    )
    trainer.train()
    truth = plain_pairs(policy.double(), ref.double(), batch_of(pairs), name, average)
    loss = truth["loss"].mean()
    logged = trainer.state.log_history[0]
    for metric in METRICS:
        assert logged[metric] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE, abs=RELATIVE), metric
    recorded = {key: value.cpu() for key, value in recorder.steps[0].items()}
    assert_gradients_close(recorded, plain_gradients(loss, policy))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(7, 1), (3, 3), (2, 4), (1, 7)])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path, batch_size: int, accumulation: int) -> None:
    rows = tokenized(make_pairs(7)).to_list()
    rows[1]["rejected_ids"] = []  # left out of the mean
    rows[5]["chosen_ids"] = []
    policy, ref, recorder = make_model(0), make_model(1), GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=ref,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[recorder],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_grad_norm=0.0,
    )
    trainer.train()
    counted = [row for index, row in enumerate(rows) if index not in (1, 5)]
    truth = plain_pairs(policy.double(), copy.deepcopy(ref).double(), PreferenceCollator(0)(counted))
    loss = truth["loss"].mean()
    assert trainer.state.global_step == 1
    for metric in METRICS:
        assert trainer.state.log_history[0][metric] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=RELATIVE)
    assert_gradients_close(recorder.steps[0], plain_gradients(loss, policy))


def test_a_batch_in_which_no_pair_counts_changes_nothing(tmp_path: Path) -> None:
    rows = tokenized(make_pairs(2)).to_list()
    for row in rows:
        row["chosen_ids"] = []
    trainer = make_trainer(tmp_path, train_dataset=datasets.Dataset.from_list(rows), num_train_epochs=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert math.isnan(trainer.state.log_history[0]["rewards/margins"])
    assert_bitwise_equal(trained_weights(trainer), make_model().state_dict())


DISTRIBUTED = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from test_trainer import distributed_run
distributed_run(Path(sys.argv[1]), per_device_train_batch_size=2, ddp_backend="gloo")
"""


def distributed_run(output_dir: Path, **options: Any) -> DILTrainer:
    """The run that one and two processes must make alike: 3 micro-batches an epoch, two of them a step.

    Each process meets another number of pairs that do not count, and the evaluation set leaves one a pair short.
    """
    rows = tokenized(make_pairs(12)).to_list()
    for index in (0, 1, 4, 9):
        rows[index]["rejected_ids"] = []
    trainer = make_trainer(
        output_dir,
        ref_model=make_model(1),
        train_dataset=datasets.Dataset.from_list(rows),
        train_sampling_strategy="sequential",
        eval_dataset=make_pairs(5, seed=2),
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        optim="sgd",
        logging_steps=1,
        precompute_ref_log_probs=True,
        **options,
    )
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save((trainer.model.state_dict(), trainer.state.log_history), output_dir / "result.pt")
    return trainer


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path / "two")
    weights, history = torch.load(tmp_path / "two" / "result.pt")
    (tmp_path / "one").mkdir()
    one = distributed_run(tmp_path / "one", per_device_train_batch_size=4)
    for name, value in trained_weights(one).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for actual, expected in zip(history, one.state.log_history, strict=True):
        for key in expected.keys() & {"loss", "eval_loss", *METRICS, *(f"eval_{metric}" for metric in METRICS)}:
            assert actual[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


def test_training_logs_the_mean_over_all_pairs_since_the_last_log(tmp_path: Path) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(7)
    trainer = make_trainer(
        tmp_path,
        model=policy,
        ref_model=ref,
        train_dataset=pairs,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
        num_train_epochs=1,
        logging_steps=2,
    )
    trainer.train()
    truth = plain_pairs(policy.double(), ref.double(), batch_of(pairs))
    logs = [log for log in trainer.state.log_history if "rewards/margins" in log]
    for log, step, rows in zip(logs, (2, 4), (slice(0, 4), slice(4, 7)), strict=True):
        assert log["step"] == step
        for metric in set(METRICS) - {"loss"}:
            assert log[metric] == pytest.approx(truth[metric][rows].mean().item(), rel=RELATIVE), (step, metric)
    # The loss is that of the optimizer steps, whose last has one pair.
    steps = [truth["loss"][rows].mean().item() for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7))]
    assert [log["loss"] for log in logs] == pytest.approx([sum(steps[:2]) / 2, sum(steps[2:]) / 2], rel=RELATIVE)


@pytest.mark.parametrize("precompute", [False, True], ids=["frozen copy", "precomputed"])
def test_evaluation_is_the_mean_over_all_pairs(tmp_path: Path, precompute: bool) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(7, seed=9)
    trainer = make_trainer(
        tmp_path,
        model=policy,
        ref_model=copy.deepcopy(ref),
        eval_dataset={"seven": pairs, "two": pairs.select([2, 4])},
        precompute_ref_log_probs=precompute,
    )
    metrics = trainer.evaluate()
    policy.double(), ref.double()
    for name, part in (("seven", pairs), ("two", pairs.select([2, 4]))):  # batches of 3: the last has 1, or 2
        truth = plain_pairs(policy, ref, batch_of(part))
        for metric in METRICS:
            assert metrics[f"eval_{name}_{metric}"] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric
    assert {f"eval_seven_{metric}" for metric in METRICS} <= trainer.state.log_history[0].keys()


def test_mixed_precision_runs_the_reference_as_the_policy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True, eval_dataset=make_pairs(5, seed=2), max_steps=1)
    before = trainer.evaluate()
    assert before["eval_rewards/chosen"] == before["eval_rewards/rejected"] == 0.0
    full = make_trainer(tmp_path, eval_dataset=make_pairs(5, seed=2)).evaluate()
    assert before["eval_logps/chosen"] != full["eval_logps/chosen"], "the policy ran in full precision"
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] == trainer.state.log_history[0]["rewards/rejected"] == 0.0


def test_a_new_data_set_can_be_evaluated_and_predicted(tmp_path: Path) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(4, seed=9)
    trainer = make_trainer(tmp_path, model=policy, ref_model=ref)
    evaluated, predicted = trainer.evaluate(pairs), trainer.predict(pairs).metrics
    truth = plain_pairs(policy.double(), ref.double(), batch_of(pairs))["loss"].mean().item()
    assert evaluated["eval_loss"] == pytest.approx(truth, rel=RELATIVE)
    assert predicted["test_loss"] == pytest.approx(truth, rel=RELATIVE)


@pytest.mark.parametrize("own_reference", [False, True], ids=["initial policy", "reference model"])
def test_precomputed_references_train_as_a_frozen_copy(tmp_path: Path, own_reference: bool) -> None:
    ref = make_model(1)
    runs = []
    for precompute in (False, True):
        trainer = make_trainer(
            tmp_path,
            ref_model=copy.deepcopy(ref) if own_reference else None,
            eval_dataset=make_pairs(5, seed=4),
            precompute_ref_log_probs=precompute,
            num_train_epochs=2,
            optim="sgd",
        )
        trainer.train()
        runs.append((trainer, trainer.evaluate()))
    (kept, kept_metrics), (gone, gone_metrics) = runs
    assert gone.ref_model is None
    assert gone.train_dataset.features["ref_chosen_logps"].dtype == "float32"
    for split, dataset in (("train", make_pairs(7)), ("eval", make_pairs(5, seed=4))):
        logps, _ = plain_logps((ref if own_reference else make_model()).double(), batch_of(dataset))
        columns = getattr(gone, f"{split}_dataset")
        sums = torch.tensor([*columns["ref_chosen_logps"], *columns["ref_rejected_logps"]])
        torch.testing.assert_close(sums.double(), logps.sum(1), rtol=RELATIVE, atol=0)
    for metric in METRICS:
        assert gone_metrics[f"eval_{metric}"] == pytest.approx(kept_metrics[f"eval_{metric}"], rel=1e-4, abs=1e-5)
    for name, value in trained_weights(kept).items():
        torch.testing.assert_close(trained_weights(gone)[name], value, rtol=1e-4, atol=1e-5)


def test_precomputed_references_refuse_a_data_set_that_came_later(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="give every evaluation set to the constructor"):
        trainer.evaluate(make_pairs(2))


RESUMED = {
    "frozen copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "dropout": {"disable_dropout": False},
}


def resumable_run(output_dir: Path, **options: Any) -> DILTrainer:
    """6 steps over two epochs of uneven batches, a checkpoint every 2."""
    return make_trainer(
        output_dir,
        model=make_model(attention_dropout=0.3),
        train_dataset=make_pairs(7),
        max_steps=6,
        lr_scheduler_type="cosine",
        **{"save_strategy": "steps", "save_steps": 2, **options},
    )


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
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads({threads})
from transformers import Trainer, TrainerCallback
from test_trainer import resumable_run

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
    script.write_text(KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), threads=torch.get_num_threads()))
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


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        ("at the next log", {"logging_steps": 3}),
        ("before the next checkpoint", {"logging_steps": 100, "save_strategy": "steps", "save_steps": 3}),
        ("at the end", {"logging_strategy": "no"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_non_finite_loss_stops_training_and_names_the_rows(
    tmp_path: Path, stop: str, options: dict[str, Any]
) -> None:
    pairs = make_pairs(8).to_list()
    pairs[3]["chosen"] += " ~"  # rows 4 and 6 (from 1): steps 2 and 3
    pairs[5]["prompt"] += "~ "
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[make_tokenizer().convert_tokens_to_ids("~")] = torch.nan
    trainer = make_trainer(
        tmp_path,
        model=model,
        train_dataset=datasets.Dataset.from_list(pairs),
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        **options,
    )
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    length = len(trainer.train_dataset[3]["chosen_ids"])
    message = str(stopped.value)
    assert message.startswith(
        f"the loss of step 2 is not finite on row 4, log ratio chosen nan ({length} tokens), reje"
    )
    assert message.endswith("no checkpoint had been written before it")
    assert trainer.state.global_step == (4 if stop == "at the end" else 3)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_last_good_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    rows = tokenized(make_pairs(8)).map(
        lambda row: {"ref_chosen_logps": -40.0, "ref_rejected_logps": -9e5 if row["row"] == 7 else -40.0}
    )
    trainer = make_trainer(
        tmp_path,
        train_dataset=rows,
        precompute_ref_log_probs=True,
        eval_dataset=make_pairs(3),
        train_sampling_strategy="sequential",
        logging_steps=100,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    with pytest.raises(FloatingPointError, match=r"on row 7, .*; the last good checkpoint is .*checkpoint-3$"):
        trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert "checkpoint-3" in kept
    assert "checkpoint-4" not in kept
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_checkpoint_of_a_later_step_is_not_the_last_good_one(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert where_to_resume(tmp_path, step=6).endswith("checkpoint-4")
    assert where_to_resume(tmp_path, step=2) == "no checkpoint had been written before it"


def test_weights_that_an_overflowing_gradient_spoils_are_not_saved(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                next(model.parameters()).grad.fill_(math.inf)

    options = {"callbacks": [Spoil()], "max_grad_norm": 0.0, "max_steps": 2, "logging_steps": 5}
    for saving in ({"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "no"}):
        with pytest.raises(FloatingPointError, match="the weights are not finite after step 2, whose loss was"):
            make_trainer(tmp_path, **options, **saving).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def output_of(losses: list[float], chosen: list[float] | None = None, rejected: list[float] | None = None) -> DILOutput:
    values = torch.tensor(losses)
    u_w, u_l = (torch.zeros(len(losses)) if u is None else torch.tensor(u) for u in (chosen, rejected))
    lengths = torch.full((len(losses),), 4, dtype=torch.int32)
    return DILOutput(values.sum(), values, u_w, u_l, u_w, u_l, lengths, 2 * lengths, lengths[:2])


def test_non_finite_rows_of_a_step_are_all_named(tmp_path: Path) -> None:
    found = NonFinitePairs(torch.device("cpu"))
    found.add(output_of([1.0, 2.0]), torch.tensor([9, 8]), step=1)
    ratios = [50.0, 1.0, math.nan], [-1.5, 1.0, 60.25]
    found.add(output_of([math.inf, 2.0, math.nan], *ratios), torch.tensor([70, 3, 12]), step=4)
    found.add(output_of([math.nan] * 3), torch.tensor([1, 2, 4]), step=5)
    found.add(output_of([-math.inf], [90.0], [2.0]), torch.tensor([5]), step=4)
    with pytest.raises(FloatingPointError) as stopped:
        found.check(lambda tensor: tensor, tmp_path)
    assert (
        "the loss of step 4 is not finite on row 5, log ratio chosen 90 (4 tokens), rejected 2 (8 tokens); "
        "row 12, log ratio chosen nan (4 tokens), rejected 60.25 (8 tokens); "
        "row 70, log ratio chosen 50 (4 tokens), rejected -1.5 (8 tokens) (rows of"
    ) in str(stopped.value)
    assert str(stopped.value).endswith("no checkpoint had been written before it")
    unnamed = NonFinitePairs(torch.device("cpu"))
    unnamed.add(output_of([math.nan]), None, step=2)
    with pytest.raises(FloatingPointError, match="step 2 is not finite on row unknown, log ratio chosen 0"):
        unnamed.check(lambda tensor: tensor, tmp_path)


def test_large_log_ratios_are_those_whose_gradient_squared_overflows() -> None:
    largest = torch.finfo(torch.float32).max
    for loss_type, coefficients in {
        "lsif": (lambda u: math.exp(u), None, lambda u: math.exp(2 * u), None),
        "ukl": (None, None, math.exp, None),
        "is": (None, math.exp, None, None),
        "bce": (None,) * 4,
    }.items():
        for limit, coefficient in zip(safe_log_ratios({"loss_type": loss_type}), coefficients, strict=True):
            if coefficient is None:
                assert limit == math.inf
            else:
                assert coefficient(limit - 0.02) ** 2 < largest < coefficient(limit + 0.02) ** 2
    assert safe_log_ratios({"loss_type": "lsif", "max_log_ratio": 20.0}) == [math.inf] * 4


@pytest.mark.parametrize(
    ("average", "problem"),
    [
        (True, r"a rejected log ratio reached \S+ per token, beyond 5: .*; lower learning_rate, or bound"),
        (False, r"a rejected log ratio reached \S+, beyond 29.58: .*, or set average_log_prob=True, or bound"),
    ],
    ids=["average", "sum"],
)
def test_large_log_ratios_are_warned_of_once(tmp_path: Path, average: bool, problem: str, caplog: Any) -> None:
    rows = make_trainer(tmp_path, train_dataset=make_pairs(8), precompute_ref_log_probs=True).train_dataset
    shift = (lambda row: 6 * len(row["rejected_ids"])) if average else (lambda row: 30)
    rows = rows.map(lambda row: {"ref_rejected_logps": row["ref_rejected_logps"] - shift(row)})
    options = {"precompute_ref_log_probs": True, "learning_rate": 0.0, "loss_type": "lsif" if average else "power"}
    trainer = make_trainer(tmp_path, train_dataset=rows, average_log_prob=average, **options)
    trainer.train()
    (warning,) = (record.message for record in caplog.records if "log ratio reached" in record.message)
    assert re.search(problem, warning)


def test_large_log_ratios_after_the_last_log_are_warned_of(tmp_path: Path, caplog: Any) -> None:
    options = {"precompute_ref_log_probs": True, "learning_rate": 0.0, "loss_type": "bce", "logging_steps": 100}
    rows = make_trainer(tmp_path, train_dataset=make_pairs(8), **options).train_dataset
    rows = rows.map(lambda row: {"ref_rejected_logps": row["ref_rejected_logps"] - 6 * len(row["rejected_ids"])})
    make_trainer(tmp_path, train_dataset=rows, **options).train()
    assert len([record for record in caplog.records if "log ratio reached" in record.message]) == 1


def test_pairs_may_have_a_column_called_label(tmp_path: Path) -> None:
    pairs = make_pairs(4).add_column("label", [1] * 4)
    trainer = make_trainer(tmp_path, train_dataset=pairs, loss_type="dpo")
    assert trainer.train_dataset["chosen_ids"][:] == tokenized(make_pairs(4))["chosen_ids"][:]


class NoHostRead(TorchDispatchMode):
    """Fails where a value of a tensor would be read by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read by the host"
        assert func is not torch.ops.aten.nonzero.default, "a shape depends on the values of a tensor"
        return func(*args, **(kwargs or {}))


def test_counting_and_metrics_of_a_micro_batch_never_wait_for_the_device(tmp_path: Path) -> None:
    values = torch.randn(6, 3)
    lengths = (torch.tensor([1, 0, 2]), torch.tensor([1, 3, 4]))
    output = DILOutput(values[0, 0], *values[:5], *lengths, torch.tensor([2, 2]))
    trainer = make_trainer(tmp_path)
    found = NonFinitePairs(torch.device("cpu"))
    largest = LogRatioRange({"loss_type": "lsif"}, False, torch.device("cpu"))
    batches = iter([batch_of(make_pairs(3))] * 2)
    with NoHostRead():
        sums = pair_metrics(output).sum(0)
        batch_metrics(output, unpaired=True)
        found.add(output, torch.tensor([1, 2, 3]), step=1)
        largest.add(output)
        _, counts = trainer.get_batch_samples(batches, 2, torch.device("cpu"))
    assert sums[-1] == 2
    assert counts.tolist() == [6, 6]


@pytest.mark.parametrize("disable", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_off_unless_asked_for(tmp_path: Path, family: str, disable: bool) -> None:
    model: Any = make_model(attention_dropout=0.5)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    trainer = make_trainer(tmp_path, model=model, disable_dropout=disable)
    model.train()
    batch = trainer._prepare_inputs(batch_of(make_pairs(2)))
    first, second = (trainer.compute_loss(model, batch) for _ in range(2))
    assert (first == second) == disable


def test_length_grouping_has_its_lengths(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length", max_steps=1)
    longest = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset
    ]
    assert trainer.train_dataset["length"][:] == longest
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"loss_type": "kl"}, "unknown loss_type 'kl'; available: lsif, ukl, bce, power, is, brier, dpo"),
        ({"beta": 0.1}, "beta=0.1 was given, but loss_type='lsif' has no beta"),
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
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 was given, but no DIL loss has one"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}"):
        DILConfig(str(tmp_path), **options)


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
        ({"model": with_router(make_model())}, "DILTrainer adds no router_aux_loss"),
    ],
    ids=["dispatch", "split", "router"],
)
def test_a_loss_that_would_be_another_one_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(NotImplementedError, match=problem):
        make_trainer(tmp_path, **options)
