"""What DILTrainer on TRL's DPOTrainer takes as the reference: a model, an adapter's base, stored log-probs, a mix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from plain_training import RELATIVE, GradientRecorder, assert_all_close, plain_gradients
from tiny_model import make_model, make_pairs, make_responses, write_lines
from tiny_trainer import trained_weights
from trl_runs import batch_of, logs_of, make_trainer, peft, plain_pairs, trl

from dil_kernels.integrations import trl_adapters
from dil_kernels.integrations.trl import DILConfig, DILTrainer
from dil_kernels.training.adapters import parameters_of
from dil_kernels.training.metrics import METRICS


def test_lora_takes_the_model_without_the_adapter_as_reference(tmp_path: Path) -> None:
    base, recorder = make_model(0).double(), GradientRecorder()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(base),
        arguments={"peft_config": lora, "callbacks": [recorder]},
        per_device_train_batch_size=7,
        max_steps=2,
    )
    policy = peft.get_peft_model(copy.deepcopy(base), lora)
    policy.load_state_dict(trainer.model.state_dict())
    trainer.train()
    truth = plain_pairs(policy, base, batch_of(trainer))
    for metric in set(METRICS) - {"loss"}:
        assert logs_of(trainer)[0][metric] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric
    gradients = plain_gradients(truth["loss"].mean(), policy)
    assert all("lora_" in name for name in gradients)
    assert_all_close(recorder.steps[0], gradients, RELATIVE)  # peft keeps adapters in fp32


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path: Path, precompute: bool) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(0), lora)
    trainer = make_trainer(
        tmp_path, model=model, per_device_train_batch_size=7, max_steps=2, precompute_ref_log_probs=precompute
    )
    trainer.train()
    first, second = logs_of(trainer)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert first["loss"] == pytest.approx(-0.5, abs=1e-6)
    assert second["rewards/margins"] > 1e-4


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize(
    "noise", [{"neftune_noise_alpha": 5.0}, {"disable_dropout": False}], ids=["neftune", "dropout"]
)
def test_noise_of_training_is_none_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: dict[str, Any], precompute: bool
) -> None:
    scored, seen = DILTrainer._score_reference, []

    def score(trainer: Any, *given: Any) -> torch.Tensor:
        seen.append(scored(trainer, *given))
        return seen[-1]

    monkeypatch.setattr(DILTrainer, "_score_reference", score)
    base = make_model(0, attention_dropout=0.3)
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(base),
        arguments={"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"])},
        per_device_train_batch_size=7,
        max_steps=1,
        precompute_ref_log_probs=precompute,
        **noise,
    )
    batch = batch_of(trainer)
    trainer.train()
    assert trainer.model.training
    base = base.double().eval()
    truth = plain_pairs(base, base, batch)
    expected = (truth["logps/chosen"] + truth["logps/rejected"]).sum().item()
    assert float(sum(logps.double().sum() for logps in seen)) == pytest.approx(expected, rel=RELATIVE)


Q, EMBEDDINGS = ["q_proj", "down_proj"], ["q_proj", "embed_tokens"]
IN_SELF = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
ADAPTERS: dict[str, Any] = {
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=EMBEDDINGS),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=Q, trainable_token_indices=[10, 11, 12, 60]),
    "whole head": lambda: peft.LoraConfig(r=4, target_modules=Q, modules_to_save=["lm_head"]),
    "PiSSA": lambda: peft.LoraConfig(r=4, target_modules=Q, init_lora_weights="pissa"),
    "layers twice": lambda: peft.LoraConfig(r=4, target_modules=Q, layer_replication=[[0, 2], [1, 2]]),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=Q, use_dora=True),
    "IA3": lambda: peft.IA3Config(**IN_SELF),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=Q),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}


def trained_adapter(name: str, adapter: str = "default", **options: Any) -> Any:
    torch.manual_seed(1)
    base = make_model(0, tie_word_embeddings=False, **options)
    model = peft.get_peft_model(base, ADAPTERS[name](), adapter_name=adapter)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_trained_adapter_of_any_kind_is_its_own_reference(tmp_path: Path, name: str) -> None:
    model = trained_adapter(name)
    config, ids = copy.deepcopy(model.peft_config["default"]), torch.tensor([[10, 11, 12, 13]])
    before, count = model.eval()(input_ids=ids).logits, len(parameters_of(model, "default"))
    trainer = make_trainer(tmp_path, model=model, per_device_train_batch_size=7, max_steps=2)
    assert torch.equal(model.eval()(input_ids=ids).logits, before)
    assert len(parameters_of(model, "default")) == count
    assert model.peft_config["default"] == config
    inputs = trainer._prepare_inputs(batch_of(trainer))
    reference = trainer.compute_ref_log_probs(trainer.model, inputs)
    trainer.train()
    first, second = logs_of(trainer)
    assert first["loss"] == pytest.approx(-0.5, abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert abs(second["loss"] + 0.5) > 1e-6
    for one, other in zip(reference, trainer.compute_ref_log_probs(trainer.model, inputs), strict=True):
        assert torch.equal(one, other)


WITH_BIASES = {"r": 4, "target_modules": ["q_proj"], "bias": "all"}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: {"model": trained_adapter("DoRA", "mine")}, r"TRL takes the adapter 'default' .* but \['mine'\] is"),
        (lambda: {"model": peft.get_peft_model(make_model(0), peft.LoraConfig(**WITH_BIASES))}, "has bias='all', of"),
        (
            lambda: {
                "model": make_model(0, attention_bias=True),
                "arguments": {"peft_config": peft.LoraConfig(**WITH_BIASES)},
            },
            "training changes weights beside the adapter, with which the reference moves",
        ),
        (
            lambda: {"arguments": {"peft_config": peft.LoraConfig(r=4, init_lora_weights="olora", target_modules=Q)}},
            "init_lora_weights='olora' moves a part of the weights into the adapter",
        ),
    ],
    ids=["another name", "biases", "new, biases", "OLoRA"],
)
def test_an_adapter_without_a_reference_is_refused(tmp_path: Path, make: Any, problem: str) -> None:
    with pytest.raises(NotImplementedError, match=problem):
        make_trainer(tmp_path, **make())


def test_a_copy_that_is_another_adapter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_adapters, "copy_adapter", lambda *_: None)
    with pytest.raises(NotImplementedError, match="the copy that TRL took of the adapter of model, a IA3, computes"):
        make_trainer(tmp_path, model=trained_adapter("IA3"))


def test_an_adapter_that_trl_does_not_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_adapter("DoRA")
    monkeypatch.setattr(trl.DPOTrainer, "__init__", lambda *_args, **_options: None)
    with pytest.raises(NotImplementedError, match="TRL took no copy of the adapter of model for the reference: give"):
        make_trainer(tmp_path, model=model)


def test_prompt_tuning_scores_the_real_tokens(tmp_path: Path) -> None:
    """Virtual tokens precede the prompt, so the model returns more logits than there are labels."""
    base, recorder = make_model(0).double(), GradientRecorder()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    arguments = {"peft_config": config, "callbacks": [recorder]}
    trainer = make_trainer(
        tmp_path, model=copy.deepcopy(base), arguments=arguments, per_device_train_batch_size=7, max_steps=1
    )
    policy = peft.get_peft_model(copy.deepcopy(base), config)
    policy.load_state_dict(trainer.model.state_dict())
    trainer.train()
    truth = plain_pairs(policy, base, batch_of(trainer))
    assert_all_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy))


def test_precomputed_references_train_as_live_ones(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        models = {"model": make_model(0).double(), "ref_model": make_model(1).double()}
        trainer = make_trainer(tmp_path, **models, per_device_train_batch_size=3, max_steps=3, **options)
        trainer.train()
        return trainer

    live, stored = run(), run(precompute_ref_log_probs=True)
    batch = batch_of(live)
    truth = plain_pairs(make_model(1).double(), make_model(1).double(), batch)
    for response in ("chosen", "rejected"):  # sums, which is what TRL caches
        sums = torch.tensor(stored.train_dataset[f"ref_{response}_logps"])
        torch.testing.assert_close(sums, truth[f"logps/{response}"].float(), rtol=1e-6, atol=0)
    assert_all_close(trained_weights(stored), trained_weights(live), 1e-6)  # the stored sums are fp32


LD_DPO = {"loss_type": "sigmoid", "ld_alpha": 0.5}


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("changed", ["max_length", "config", "trl", "dtype"])
def test_stored_references_are_of_this_run(tmp_path: Path, changed: str, truncation_mode: str) -> None:
    """TRL finds them by the rows as they were before truncation, and by the weights."""
    pairs = write_lines(tmp_path / "pairs.jsonl", *make_pairs(6))

    def run(name: str, **options: Any) -> list[dict[str, Any]]:
        data = datasets.load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(tmp_path / "cache"))
        models = {each: make_model(0) for each in ("model", "ref_model")}
        if name == "second" and changed == "config":
            for model in models.values():
                model.config.rope_parameters["rope_theta"] = 10.0
                model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        options = {"truncation_mode": truncation_mode, "precompute_ref_log_probs": True, "max_steps": 1, **options}
        trainer = make_trainer(tmp_path / name, train_dataset=data, **models, **options)
        trainer.train()
        return logs_of(trainer)

    others = {
        "max_length": {"max_length": 6},
        "trl": {"trainer_class": trl.DPOTrainer, "config_class": trl.DPOConfig, **LD_DPO},
        "dtype": {"bf16": True},
        "config": {},
    }
    run("first", **{"max_length": 24, **others[changed]})
    (log,) = run("second", max_length=24)
    assert log["rewards/chosen"] == pytest.approx(0.0, abs=1e-6), "the policy is the reference"
    assert log["rewards/rejected"] == pytest.approx(0.0, abs=1e-6)


def test_reference_log_probs_of_the_data_are_taken(tmp_path: Path) -> None:
    pairs = make_pairs(7).add_column("ref_chosen_logps", [-1.0] * 7)
    with pytest.raises(ValueError, match="the data set has ref_chosen_logps, but no ref_rejected_logps"):
        make_trainer(tmp_path, train_dataset=pairs, precompute_ref_log_probs=True)
    pairs = pairs.add_column("ref_rejected_logps", [-2.0] * 7)
    trainer = make_trainer(
        tmp_path, train_dataset=pairs, precompute_ref_log_probs=True, max_steps=1, average_log_prob=False
    )
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["rewards/chosen"] == pytest.approx(log["logps/chosen"] + 1.0)
    assert log["rewards/rejected"] == pytest.approx(log["logps/rejected"] + 2.0)


def test_unpaired_responses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_dataset has unpaired responses .*DILTrainer"):
        make_trainer(tmp_path, train_dataset=make_responses(7))
    with pytest.raises(ValueError, match="train_dataset has unpaired responses"):
        DILTrainer(
            make_model(), make_model(1), DILConfig(str(tmp_path), use_cpu=True, bf16=False), None, make_responses(7)
        )
    with pytest.raises(ValueError, match="eval_dataset has unpaired responses"):
        make_trainer(tmp_path, arguments={"eval_dataset": {"all": make_responses(7)}})


def test_a_reference_that_follows_the_policy(tmp_path: Path) -> None:
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer(tmp_path, per_device_train_batch_size=7, max_steps=3, **options)
    trainer.train()
    rewards = [log["rewards/chosen"] for log in logs_of(trainer)]
    assert rewards[1] > 0.1
    assert rewards[2] == pytest.approx(0.0, abs=1e-6), "the reference became the policy after the second step"
