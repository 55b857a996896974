"""Training with batches filled by tokens: the loss is that of all pairs of a step, whatever each micro-batch holds."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from plain_training import RELATIVE, GradientRecorder, assert_all_close, plain_gradients, plain_pairs
from tiny_model import make_model, make_pairs, make_responses, save_model, write_lines
from tiny_trainer import (
    assert_bitwise_equal,
    assert_trained_as,
    make_trainer,
    resumable_run,
    save_result,
    tokenized,
    trained_weights,
)
from two_processes import run_on_two_processes

from dil_kernels.cli.programs import main
from dil_kernels.data.batches import Batch
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.metrics import METRICS
from dil_kernels.training.start import CannotStartError
from dil_kernels.training.token_loader import loader_of

pytestmark = pytest.mark.usefixtures("datasets_cache")

MAX_TOKENS = 90
joined_rows = pytest.mark.parametrize("option", ["padding_free", "prefix_sharing"])


def pairs_that_share(count: int, seed: int = 0) -> datasets.Dataset:
    """Every third pair has the prompt of the one before it."""
    rows = make_pairs(count, seed).to_list()
    for index in range(1, count, 3):
        rows[index]["prompt"] = rows[index - 1]["prompt"]
    return datasets.Dataset.from_list(rows)


def batches_of(trainer: DILTrainer, epoch: int = 0) -> list[dict[str, Any]]:
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    batches = [*loader]
    assert len(batches) == len(loader)
    return batches


@pytest.mark.parametrize("option", [{}, {"padding_free": True}, {"prefix_sharing": True}], ids=[*map(str, range(3))])
def test_batches_are_on_the_device(tmp_path: Path, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that references are precomputed on among them; a device without memory stands for a GPU."""
    trainer = make_trainer(tmp_path, train_dataset=pairs_that_share(5), **option)
    monkeypatch.setattr(type(trainer.accelerator), "device", torch.device("meta"))
    (batch,) = loader_of(trainer, trainer.train_dataset, [[0, 1, 2]])
    layout = Batch.of(batch).layout
    tensors = [x for x in layout.model_inputs().values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 2
    assert {x.device.type for x in tensors} == {"meta"}


@joined_rows
def test_loaders_fill_batches_and_every_epoch_has_each_row_once(tmp_path: Path, option: str) -> None:
    options = {"train_dataset": pairs_that_share(23), "max_tokens_per_batch": MAX_TOKENS, option: True}
    trainer = make_trainer(tmp_path, num_train_epochs=3, **options)
    epochs = [batches_of(trainer, epoch) for epoch in (0, 1, 0)]
    for batches in epochs:
        assert all(batch["input_ids"].shape[1] <= MAX_TOKENS for batch in batches)
        assert len({len(batch["rows"]) for batch in batches}) > 1
        assert sorted(itertools.chain(*(batch["rows"].tolist() for batch in batches))) == [*range(1, 24)]
    rows = [[batch["rows"].tolist() for batch in batches] for batches in epochs]
    assert rows[0] == rows[2] != rows[1]
    other_seed = make_trainer(tmp_path, data_seed=5, **options)
    assert [batch["rows"].tolist() for batch in batches_of(other_seed)] != rows[0]


TRAINING: dict[str, dict[str, Any]] = {
    "frozen copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed by rows": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "workers": {"dataloader_num_workers": 2},
}


@joined_rows
@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
def test_a_step_of_uneven_micro_batches_is_that_of_plain_pytorch(
    tmp_path: Path, option: str, options: dict[str, Any]
) -> None:
    policy, ref, recorder = make_model(0), make_model(1), GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        train_dataset=pairs_that_share(13),
        eval_dataset=pairs_that_share(11, seed=4),
        callbacks=[recorder],
        max_tokens_per_batch=MAX_TOKENS,
        gradient_accumulation_steps=50,
        num_train_epochs=1,
        max_grad_norm=0.0,
        **{option: True, **options},
    )
    sizes = [len(batch["rows"]) for batch in batches_of(trainer)]
    assert len({*sizes}) > 1
    before = trainer.evaluate()
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 1
    truth = plain_pairs(policy.double(), ref.double(), PreferenceCollator(0)(trainer.train_dataset.to_list()))
    for metric in METRICS:
        scale = RELATIVE * truth[metric].abs().mean().item()
        expected = truth[metric].mean().item()
        assert trainer.state.log_history[0][metric] == pytest.approx(expected, rel=0, abs=scale), metric
    assert_all_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy))
    evaluated = plain_pairs(policy, ref, PreferenceCollator(0)(trainer.eval_dataset.to_list()))
    for metric in METRICS:
        scale = RELATIVE * evaluated[metric].abs().mean().item()
        assert before[f"eval_{metric}"] == pytest.approx(evaluated[metric].mean().item(), rel=0, abs=scale), metric


@joined_rows
def test_unpaired_responses_fill_batches_too(tmp_path: Path, option: str) -> None:
    """A step of all of them, in one batch and in several."""
    options = {"train_dataset": make_responses(9), "loss_type": "ukl", "optim": "sgd", "num_train_epochs": 1}
    options |= {"ref_model": make_model(1), "gradient_accumulation_steps": 50, option: True}
    runs = []
    for filled in ({"per_device_train_batch_size": 9}, {"max_tokens_per_batch": 40}):
        trainer = make_trainer(tmp_path, model=make_model(), **copy.deepcopy(options), **filled)
        trainer.train()
        runs.append(trainer)
    assert len({len(batch["is_chosen"]) for batch in batches_of(runs[1])}) > 1
    for name, value in trained_weights(runs[0]).items():
        torch.testing.assert_close(trained_weights(runs[1])[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert runs[1].state.log_history[0]["loss"] == pytest.approx(runs[0].state.log_history[0]["loss"], rel=1e-4)


def test_steps_are_those_of_the_batches(tmp_path: Path) -> None:
    options = {"train_dataset": pairs_that_share(23), "prefix_sharing": True, "max_tokens_per_batch": MAX_TOKENS}
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, num_train_epochs=3, **options)
    batches = len(trainer.get_train_dataloader())
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == 3 * -(-batches // 2)
    assert trainer.state.log_history[-1]["epoch"] == 3.0
    counted = make_trainer(tmp_path, max_steps=batches + 2, **options)
    output = counted.train()
    assert counted.state.global_step == batches + 2
    assert counted.state.epoch == pytest.approx(1 + 2 / len(counted.get_train_dataloader()))
    rows = output.metrics["train_samples_per_second"] * output.metrics["train_runtime"]
    assert rows == pytest.approx((batches + 2) * 23 / batches, rel=0.05)


@joined_rows
def test_predictions_are_in_the_order_of_the_data(tmp_path: Path, option: str) -> None:
    held_out = pairs_that_share(23, seed=4)
    by_rows = make_trainer(tmp_path, ref_model=make_model(1), eval_dataset=held_out, **{option: True})
    trainer = make_trainer(
        tmp_path, ref_model=make_model(1), eval_dataset=held_out, max_tokens_per_batch=MAX_TOKENS, **{option: True}
    )
    seen: list[Any] = []
    trainer.compute_metrics = lambda found: seen.append(found) or {"margin": 1.0}
    loader = trainer.get_eval_dataloader()
    assert [*itertools.chain(*(batch["rows"].tolist() for batch in loader))] != [*range(1, 24)]
    output = trainer.predict(trainer.eval_dataset)
    expected = by_rows.predict(by_rows.eval_dataset).predictions
    metrics = {**output.metrics, **trainer.evaluate(), **trainer.evaluate({"x": held_out})}
    for found in (output, *seen):
        np.testing.assert_allclose(found.predictions, expected, rtol=1e-4, atol=1e-4)
        assert found.label_ids.tolist() == [*range(1, 24)]
    assert len(seen) == 3
    for prefix in ("test", "eval", "eval_x"):
        assert metrics[f"{prefix}_margin"] == 1.0
        steps = metrics[f"{prefix}_steps_per_second"] * metrics[f"{prefix}_runtime"]
        assert steps == pytest.approx(len(loader), rel=0.05)
        assert metrics[f"{prefix}_samples_per_second"] * metrics[f"{prefix}_runtime"] == pytest.approx(23, rel=0.05)


RESUMED: dict[str, dict[str, Any]] = {
    "padding_free": {"padding_free": True},
    "prefix_sharing": {"prefix_sharing": True},
    "accumulation": {"prefix_sharing": True, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 50},
    "precomputed": {"padding_free": True, "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_run_that_is_resumed_within_an_epoch_continues_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    """In the second epoch, whose batches are others."""
    options = {"max_tokens_per_batch": 80, **options, "disable_dropout": False}
    whole = resumable_run(tmp_path / "whole", **options)
    steps = -(-len(whole.get_train_dataloader()) // options.get("gradient_accumulation_steps", 1))
    assert steps == 3
    whole.train()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    resumed = resumable_run(tmp_path, **options, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(trained_weights(resumed), trained_weights(whole))
    for actual, expected in zip(resumed.state.log_history[4:6], whole.state.log_history[4:6], strict=True):
        assert actual["loss"] == expected["loss"]


def test_what_fills_batches_otherwise_does_not_go_on(tmp_path: Path) -> None:
    options = {"max_tokens_per_batch": 110, "padding_free": True}
    resumable_run(tmp_path, **options).train()
    for changes, message in (
        ({"max_tokens_per_batch": 120}, "max_tokens_per_batch=110, now 120"),
        ({"prefix_sharing": True}, "prefix_sharing=False, now True"),
        ({"gradient_accumulation_steps": 2}, "global batch: 1, now 2"),
    ):
        with pytest.raises(CannotStartError, match=message):
            resumable_run(tmp_path, **{**options, **changes}).train(resume_from_checkpoint=True)
    resumed = resumable_run(tmp_path, **options, per_device_train_batch_size=1)  # which is not looked at
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6


DISTRIBUTED = """
from test_max_tokens import distributed_run
distributed_run(Path(sys.argv[1]), ddp_backend="gloo", OPTION=True)
"""


UNPAIRED = """
from test_max_tokens import unpaired_run
unpaired_run(Path(sys.argv[1]), ddp_backend="gloo", OPTION=True)
"""


def unpaired_run(output_dir: Path, **options: Any) -> DILTrainer:
    """The same with responses that are not in pairs, and evaluated."""
    options = {"loss_type": "ukl", "num_train_epochs": 2, "optim": "sgd", "max_tokens_per_batch": 60, **options}
    data = {"train_dataset": make_responses(12), "eval_dataset": make_responses(7, seed=1)}
    trainer = make_trainer(output_dir, ref_model=make_model(1), **data, **options)
    trainer.train()
    trainer.evaluate()
    assert len(trainer.get_train_dataloader()) == (2 if trainer.args.world_size == 2 else 3)
    save_result(trainer)
    return trainer


@joined_rows
def test_so_do_they_with_unpaired_responses(tmp_path: Path, option: str) -> None:
    run_on_two_processes(UNPAIRED.replace("OPTION", option), tmp_path, tmp_path)
    (tmp_path / "one").mkdir()
    one = unpaired_run(tmp_path / "one", **{option: True}, gradient_accumulation_steps=2)
    sides = {f"{metric}/{side}" for metric in ("rewards", "logps") for side in ("chosen", "rejected")}
    assert_trained_as(tmp_path, one, {"loss", "eval_loss", *(f"eval_{name}" for name in sides)})


def distributed_run(output_dir: Path, **options: Any) -> DILTrainer:
    """Two steps an epoch, the second one of a single batch; in two processes one of them has none then."""
    rows = tokenized(pairs_that_share(12)).to_list()
    rows[3]["rejected_ids"] = []
    trainer = make_trainer(
        output_dir,
        ref_model=make_model(1),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=pairs_that_share(9, seed=2),
        **{"num_train_epochs": 2, "optim": "sgd", "precompute_ref_log_probs": True, **options},
        max_tokens_per_batch=98 if options.get("prefix_sharing") else 125,
    )
    trainer.train()
    trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.label_ids.tolist() == [*range(1, 10)]
    trainer.state.log_history[-1]["predicted"] = predicted.predictions.tolist()
    trainer.state.log_history[-1]["batches"] = len(trainer.get_train_dataloader())
    save_result(trainer)
    return trainer


@joined_rows
def test_two_processes_of_which_one_has_a_batch_less_train_as_one(tmp_path: Path, option: str) -> None:
    run_on_two_processes(DISTRIBUTED.replace("OPTION", option), tmp_path, tmp_path)
    (tmp_path / "one").mkdir()
    one = distributed_run(tmp_path / "one", **{option: True}, gradient_accumulation_steps=2)
    assert_trained_as(tmp_path, one)
    _, history = torch.load(tmp_path / "result.pt")
    assert one.state.log_history[-1]["batches"] == 3
    assert history[-1]["batches"] == 2
    np.testing.assert_allclose(history[-1]["predicted"], one.state.log_history[-1]["predicted"], rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "padded": ({"padding_free": False}, "rows are padded: give padding_free=True or prefix_sharing=True, too"),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, "group_by_length chooses the rows of a batch"),
    "dropped": ({"dataloader_drop_last": True}, "dataloader_drop_last=True goes by the number of rows in a batch"),
    "found": ({"auto_find_batch_size": True}, "auto_find_batch_size=True goes by the number of rows in a batch"),
    "metrics by batch": ({"batch_eval_metrics": True}, "batch_eval_metrics=True goes by the number of rows"),
    "inputs": ({"include_for_metrics": ["loss"]}, r"include_for_metrics=\['loss'\] goes by the number of rows"),
    "in parts": ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False goes by the number of rows"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_go_by_rows_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"max_tokens_per_batch=64 was given, but {message}"):
        DILConfig(str(tmp_path), max_tokens_per_batch=64, use_cpu=True, **{"padding_free": True, **options})


def test_rows_that_no_batch_has_room_for_are_refused_at_construction(tmp_path: Path) -> None:
    options = {"padding_free": True, "max_tokens_per_batch": 30}
    with pytest.raises(ValueError, match="the train data set has 3 rows of more than max_tokens_per_batch=30 tokens"):
        make_trainer(tmp_path, **options)
    short = make_pairs(40).filter(lambda row: len(" ".join(row.values()).split()) < 10)
    with pytest.raises(ValueError, match=r"the eval_b data set has .*max_tokens_per_batch=30 .*the longest is row "):
        make_trainer(tmp_path, train_dataset=short, eval_dataset={"a": short, "b": make_pairs(7)}, **options)
    trainer = make_trainer(tmp_path, train_dataset=short, **options)
    with pytest.raises(ValueError, match="the eval data set has "):
        trainer.evaluate(make_pairs(7))
    transformed = tokenized(short).with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match=r"the train data set are transformed when they are read \(set_transform\)"):
        make_trainer(tmp_path, train_dataset=transformed, **options)
    with pytest.raises(ValueError, match="max_tokens_per_batch must be at least 1, got 0"):
        DILConfig(str(tmp_path), padding_free=True, max_tokens_per_batch=0)


def test_dil_train_fills_batches(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    file = write_lines(tmp_path / "pairs.jsonl", *make_pairs(9).to_list())
    arguments = ["--model", str(model), "--train-file", str(file), "--output-dir", str(tmp_path / "out"), "--use-cpu"]
    arguments += ["--prefix-sharing", "--max-length", "24", "--num-train-epochs", "1"]
    assert main([*arguments, "--max-tokens-per-batch", "10"]) == 2
    assert main([*arguments, "--max-tokens-per-batch", str(MAX_TOKENS)]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{MAX_TOKENS} tokens at most = {MAX_TOKENS} x 1 accumulated x 1 process" in card
