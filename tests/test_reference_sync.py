"""A reference that follows the policy; batches padded to a multiple; how the reference is precomputed; offloading."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_lora import lora_config
from tiny_model import make_model, make_pairs
from tiny_trainer import make_trainer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.trainer import DILConfig
from dil_kernels.training.offloading import OffloadedActivations
from dil_kernels.training.reference_sync import REFERENCE_NAME, ReferenceSync
from dil_kernels.training.start import CannotStartError


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone().double() for name, value in model.named_parameters()}


class Recorder(TrainerCallback):
    """Weights of policy and reference after every step, when they have been mixed."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append((weights_of(self.trainer.model), weights_of(self.trainer.ref_model)))


def test_the_reference_becomes_a_mix_every_so_many_steps(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=2, max_steps=5
    )
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    reference = weights_of(trainer.ref_model)
    trainer.train()
    for step, (policy, found) in enumerate(recorder.steps, start=1):
        if step % 2 == 0:
            reference = {name: 0.25 * policy[name] + 0.75 * value for name, value in reference.items()}
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=f"step {step}, {name}")
        assert any((policy[name] - value).abs().max() > 1e-3 for name, value in found.items())
    assert len(recorder.steps) == 5


def test_with_a_reference_that_is_the_policy_every_log_ratio_is_0(tmp_path: Path) -> None:
    options = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, "max_steps": 4}
    trainer = make_trainer(tmp_path, sync_ref_model=True, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([-0.5] * 4, abs=1e-6)
    still = make_trainer(tmp_path, max_steps=4)
    still.train()
    assert abs([entry["loss"] for entry in still.state.log_history if "loss" in entry][-1] + 0.5) > 1e-3


def test_a_run_with_such_a_reference_is_resumed_with_it(tmp_path: Path) -> None:
    options = {
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_trainer(tmp_path, **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for first, second in ((whole.model, resumed.model), (whole.ref_model, resumed.ref_model)):
        expected, found = weights_of(first), weights_of(second)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    (checkpoint / REFERENCE_NAME).unlink()
    with pytest.raises(CannotStartError, match="has no reference that follows the policy"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(checkpoint))


def test_the_best_policy_gets_the_reference_that_it_had(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    steps = {"max_steps": 6, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "ref_model_sync_steps": 1}
    options = {"learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    pairs = {"train_dataset": make_pairs(6), "eval_dataset": make_pairs(5, seed=9)}
    sampling = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, sync_ref_model=True, **best, **steps, **options, **pairs, **sampling)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step != 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[trainer.state.best_global_step], abs=1e-6)


def test_references_that_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"sync_ref_model=True .* the model is trained by adapters"):
        make_trainer(tmp_path, sync_ref_model=True, peft_config=lora_config())
    with pytest.raises(ValueError, match=r"parameter .* is \(48, 32\) in model and \(40, 32\) in ref_model"):
        make_trainer(tmp_path, sync_ref_model=True, ref_model=make_model(intermediate_size=40))


def test_a_reference_in_parts_cannot_follow() -> None:
    policy: Any = make_model()
    policy._is_distributed_loading_by_transformers = True
    accelerator = SimpleNamespace(is_fsdp2=False, state=SimpleNamespace())
    with pytest.raises(NotImplementedError, match="or a model that was loaded in parts"):
        ReferenceSync(policy, make_model(), accelerator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sync_ref_model": True, "precompute_ref_log_probs": True},
            "precompute_ref_log_probs=True keeps no",
        ),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha=0.5 was given, but sync_ref_model=False"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps=5 was given, but sync_ref_model=False"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha must be above 0 and at most 1"),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size=4 was given, but precompute_ref_log_probs=False"),
        ({"padding_free": True, "pad_to_multiple_of": 8}, "padding_free=True pads nothing"),
        ({"activation_offloading": True}, "activation_offloading=True was given, but activations are on the cpu"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DILConfig(str(tmp_path), use_cpu=True, **options)


def test_the_defaults_are_those_of_trl(tmp_path: Path) -> None:
    config = DILConfig(str(tmp_path), use_cpu=True, sync_ref_model=True)
    assert (config.ref_model_mixup_alpha, config.ref_model_sync_steps) == (0.6, 512)


def test_padding_to_a_multiple_changes_nothing_but_the_shape(tmp_path: Path) -> None:
    shapes: list[int] = []
    losses, remainders = [], []

    class Watched(PreferenceCollator):
        def __call__(self, pairs: Any) -> dict[str, Any]:
            batch = super().__call__(pairs)
            shapes.append(batch["input_ids"].shape[1])
            return batch

    for multiple in (None, 16):
        options = {"max_steps": 3, "train_sampling_strategy": "sequential", "optim": "sgd"}  # Adam magnifies rounding
        trainer = make_trainer(tmp_path, pad_to_multiple_of=multiple, **options)
        collator = trainer.data_collator
        trainer.data_collator = Watched(collator.pad_token_id, collator.pad_to_multiple_of)
        trainer.train()
        remainders.append({length % 16 for length in shapes})
        shapes.clear()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert remainders[0] - {0}
    assert remainders[1] == {0}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(ValueError, match="pad_to_multiple_of=16 was given, but data_collator pads"):
        make_trainer(tmp_path, pad_to_multiple_of=16, data_collator=PreferenceCollator(0))


def test_padding_beyond_the_positions_of_a_model_is_named(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=16, n_layer=1, n_head=2, n_positions=20))
    options = {"model": model, "max_length": 18, "train_dataset": make_pairs(8)}
    make_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=r"padded to 32 \(pad_to_multiple_of=32\), but model has only 20 positions"):
        make_trainer(tmp_path, pad_to_multiple_of=32, **options)


def test_the_reference_is_precomputed_in_batches_of_their_own_size(tmp_path: Path, monkeypatch) -> None:
    sizes = []
    collate = PreferenceCollator.__call__

    def watched(self: PreferenceCollator, pairs: Any) -> dict[str, Any]:
        sizes.append(len(pairs))
        return collate(self, pairs)

    monkeypatch.setattr(PreferenceCollator, "__call__", watched)
    options = {"train_dataset": make_pairs(7), "precompute_ref_log_probs": True}
    trainer = make_trainer(tmp_path, precompute_ref_batch_size=5, **options)
    assert sizes == [5, 2]
    alike = make_trainer(tmp_path, **options)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert trainer.train_dataset[name][:] == pytest.approx(alike.train_dataset[name][:], rel=1e-5)


def test_offloaded_activations_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    other = copy.deepcopy(model)
    inputs = torch.randn(16, 32)
    moved: list[int] = []

    class Watched(OffloadedActivations):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, device_type="cpu")
            pack = self.pack_hook

            def watched(tensor: Tensor) -> Any:
                packed = pack(tensor)
                if isinstance(packed, tuple):
                    assert packed[1].data_ptr() != tensor.data_ptr()
                    moved.append(tensor.nbytes)
                return packed

            self.pack_hook = watched

    (model(inputs) ** 3).sum().backward()
    with Watched(other):
        loss = (other(inputs) ** 3).sum()
    loss.backward()
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)
    # Inputs of the two layers, of GELU and LayerNorm: none of the weights of 8 KiB, nothing below 1 KiB.
    assert sorted(moved) == [16 * 32 * 4, *[16 * 64 * 4] * 3]
