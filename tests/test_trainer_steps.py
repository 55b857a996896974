"""A step of DILTrainer against plain PyTorch: accumulated, on two processes, in mixed precision, with a precomputed
reference."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from plain_training import (
    OPTIONS,
    RELATIVE,
    GradientRecorder,
    assert_all_close,
    plain_gradients,
    plain_logps,
    plain_pairs,
)
from tiny_model import make_model, make_pairs
from tiny_trainer import (
    assert_bitwise_equal,
    assert_trained_as,
    batch_of,
    distributed_run,
    make_trainer,
    tokenized,
    trained_weights,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)
from two_processes import run_on_two_processes

from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.training.metrics import METRICS
from dil_kernels.training.set_up import disable_noise

ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("name", ["lsif", "ukl", "bce", "dpo", "bce, alpha 0.5", "dpo, nll", "robust", "sppo_hard"])
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
    relative = 2 * RELATIVE  # a loss may square the ratio
    for metric in METRICS:
        assert logged[metric] == pytest.approx(truth[metric].mean().item(), rel=relative, abs=relative), metric
    recorded = {key: value.cpu() for key, value in recorder.steps[0].items()}
    assert_all_close(recorded, plain_gradients(loss, policy))


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
    assert_all_close(recorder.steps[0], plain_gradients(loss, policy))


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
from tiny_trainer import distributed_run
distributed_run(Path(sys.argv[1]), per_device_train_batch_size=2, ddp_backend="gloo")
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path / "two")
    (tmp_path / "one").mkdir()
    one = distributed_run(tmp_path / "one", per_device_train_batch_size=4)
    assert_trained_as(tmp_path / "two", one)


def test_mixed_precision_runs_the_reference_as_the_policy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True, eval_dataset=make_pairs(5, seed=2), max_steps=1)
    before = trainer.evaluate()
    assert before["eval_rewards/chosen"] == before["eval_rewards/rejected"] == 0.0
    full = make_trainer(tmp_path, eval_dataset=make_pairs(5, seed=2)).evaluate()
    assert before["eval_logps/chosen"] != full["eval_logps/chosen"], "the policy ran in full precision"
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] == trainer.state.log_history[0]["rewards/rejected"] == 0.0


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


def test_pairs_may_have_a_column_called_label(tmp_path: Path) -> None:
    pairs = make_pairs(4).add_column("label", [1] * 4)
    trainer = make_trainer(tmp_path, train_dataset=pairs, loss_type="dpo")
    assert trainer.train_dataset["chosen_ids"][:] == tokenized(make_pairs(4))["chosen_ids"][:]


def make_mixture(family: str) -> Any:
    """One whose routers have noise of their own in training."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = AutoConfig.for_model(family, vocab_size=288, hidden_size=16, intermediate_size=24, **sizes)
    config.router_jitter_noise = 0.3
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("disable", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_dropout_is_off_unless_asked_for(tmp_path: Path, family: str, disable: bool) -> None:
    model: Any = make_model(attention_dropout=0.5)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    if family == "falcon":  # which looks its rates up in the config whenever it runs
        config = FalconConfig(vocab_size=288, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        config.hidden_dropout = config.attention_dropout = 0.5
        model = FalconForCausalLM(config)
    if family == "mixtral":
        model = make_mixture(family)
    trainer = make_trainer(tmp_path, model=model, disable_dropout=disable)
    model.train()
    batch = trainer._prepare_inputs(batch_of(make_pairs(2)))
    first, second = (trainer.compute_loss(model, batch) for _ in range(2))
    assert (first == second) == disable
    if family == "llama":
        assert model.config.attention_dropout == 0.5  # which its modules have read: what is saved keeps it


@pytest.mark.parametrize("noisy", [True, False])
def test_noise_that_is_no_dropout_is_said(tmp_path: Path, noisy: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()

    def add_noise(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + noisy * module.training * torch.rand_like(output)

    model.model.norm.register_forward_hook(add_noise)
    state = torch.get_rng_state()
    disable_noise(model, tell=True)
    assert torch.equal(torch.get_rng_state(), state)
    warned = [message for message in caplog.messages if "training mode" in message]
    assert len(warned) == noisy
    if noisy:
        assert warned[0].startswith("LlamaForCausalLM computes other logits in training mode than in evaluation mode")


def test_routers_that_draw_experts_are_left_as_they_are_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Phi-3.5-MoE's noise is part of what it computes in evaluation, too."""
    torch.manual_seed(0)
    model, ids = make_mixture("phimoe").eval(), torch.arange(20).unsqueeze(0)
    before = model(input_ids=ids).logits
    disable_noise(model, tell=True)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [message for message in caplog.messages if message.startswith("PhimoeForCausalLM computes other logits in")]


def test_length_grouping_has_its_lengths(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length", max_steps=1)
    longest = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset
    ]
    assert trainer.train_dataset["length"][:] == longest
    trainer.train()
    assert trainer.state.global_step == 1


def test_parts_that_were_tokenised_apart_train_as_the_whole(tmp_path: Path) -> None:
    """As docs/training.md has it for more pairs than one machine should read."""
    pairs = make_pairs(12)
    for number in range(3):
        tokenized(pairs.select(range(4 * number, 4 * number + 4))).save_to_disk(tmp_path / "tokens" / f"00{number}")
    parts = [datasets.load_from_disk(part) for part in sorted((tmp_path / "tokens").iterdir())]
    joined = datasets.concatenate_datasets(parts)
    assert len(joined.cache_files) == 3, "mapped from the disk"
    weights = []
    for data in (joined, tokenized(pairs)):
        trainer = make_trainer(tmp_path / "run", train_dataset=data, precompute_ref_log_probs=True, max_steps=3)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_bitwise_equal(*weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precomputed", [False, True], ids=["model", "precomputed"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"padding_free": True}, {"prefix_sharing": True}, {"prefix_sharing": True, "max_tokens_per_batch": 64}],
    ids=lambda layout: ", ".join(layout) or "padded",
)
def test_training_on_a_gpu_is_that_of_a_cpu(tmp_path: Path, layout: dict[str, Any], precomputed: bool) -> None:
    """Three steps, and an evaluation in the middle."""
    logged = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(
            tmp_path / device,
            model=make_model(0),
            train_dataset=make_pairs(12, seed=3),
            eval_dataset=make_pairs(5, seed=4),
            eval_strategy="steps",
            eval_steps=2,
            max_steps=3,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            precompute_ref_log_probs=precomputed,
            use_cpu=device == "cpu",
            **layout,
        )
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry])
    for on_cpu, on_gpu in zip(*logged, strict=True):
        for name in ({"loss", "eval_loss"} | set(METRICS)) & on_cpu.keys():
            assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-3, abs=1e-4), name
