"""DILTrainer on TRL's DPOTrainer with padding_free and prefix_sharing: it trains and evaluates as on padded rows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import RELATIVE, assert_all_close
from tiny_model import make_model, make_pairs
from tiny_trainer import trained_weights
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from trl_runs import EXACT, STATISTICS, Unscored, logs_of, make_trainer, peft, trl
from two_processes import run_on_two_processes

from dil_kernels.integrations.trl import DILConfig
from dil_kernels.models.packed_attention import UnsupportedPackingError
from dil_kernels.training.metrics import METRICS

OPTIONS = ("padding_free", "prefix_sharing")
RUNS: dict[str, dict[str, Any]] = {
    "average": {},
    "sum, precomputed": {"average_log_prob": False, "loss_type": "bce", "precompute_ref_log_probs": True},
    "lora": {"peft_config": {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}},
    "beginnings": {"max_length": 12, "truncation_mode": "keep_start"},
    "ends": {"max_length": 9, "truncation_mode": "keep_end"},
    "recomputed": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "logits": {"fused_head": False, "loss_type": "dpo", "beta": 0.3},
    "unscored": {"data_collator": Unscored},
}


def train(output_dir: Path, **options: Any) -> Any:
    """Accumulation with a last micro-batch that is not full, then an evaluation likewise; all in fp64."""
    arguments: dict[str, Any] = {"eval_dataset": make_pairs(5, seed=1)}
    if "peft_config" in options:
        arguments["peft_config"] = peft.LoraConfig(**options.pop("peft_config"))
    if "data_collator" in options:
        arguments["data_collator"] = options.pop("data_collator")()
    trainer = make_trainer(
        output_dir,
        model=make_model(0).double(),
        ref_model=None if "peft_config" in arguments else make_model(1).double(),
        arguments=arguments,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        **options,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", RUNS)
def test_training_and_evaluation_are_those_of_padded_rows(
    tmp_path: Path, name: str, option: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Adapters and stored sums are fp32, and so are norms, to which shared prompts come in other sums.
    exact = 1e-6 if name in ("lora", "sum, precomputed") or option == "prefix_sharing" else EXACT
    padded, joined = train(tmp_path, **RUNS[name]), train(tmp_path, **RUNS[name], **{option: True})
    metrics = {*METRICS, *STATISTICS} - ({"num_tokens"} if option == "prefix_sharing" else set())
    compared = {"grad_norm", "train_loss", *metrics, *(f"eval_{metric}" for metric in metrics)}
    for actual, expected in zip(joined.state.log_history, padded.state.log_history, strict=True):
        assert actual.keys() == expected.keys()
        for key in expected.keys() & compared:
            assert actual[key] == pytest.approx(expected[key], rel=1e-5, abs=exact), key
    assert_all_close(trained_weights(joined), trained_weights(padded), exact)
    assert "temporarily unavailable" not in caplog.text


@pytest.mark.parametrize("option", OPTIONS)
def test_a_batch_is_one_row_of_what_it_takes(tmp_path: Path, option: str) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=7, max_steps=1, **{option: True})
    shapes = []
    for model in (trainer.model, trainer.ref_model):
        model.model.register_forward_pre_hook(
            lambda body, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    trainer.train()
    tokens = 0
    for row in trainer.train_dataset:
        prompt, responses = len(row["prompt_ids"]), len(row["chosen_ids"]) + len(row["rejected_ids"])
        tokens += (prompt + 1 if option == "prefix_sharing" else 2 * prompt) + responses
    assert shapes == [(1, tokens)] * 2
    assert logs_of(trainer)[0]["num_tokens"] == tokens


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_that_are_asked_for_are_those_of_padded_rows(tmp_path: Path, option: str) -> None:
    seen: list[Any] = []

    def compute_metrics(result: Any) -> dict[str, float]:
        seen.append(result)
        return {"seen": 1.0}

    held_out = make_pairs(3, seed=1)
    arguments = {"eval_dataset": held_out, "compute_metrics": compute_metrics}
    for options in ({option: True}, {}):
        trainer = make_trainer(tmp_path, arguments=arguments, per_device_eval_batch_size=3, **options)
        assert trainer.evaluate()["eval_seen"] == 1.0
        seen.append(trainer.predict(trainer.eval_dataset))  # which asks for the metrics, too
    joined, padded = seen[2], seen[5]
    torch.testing.assert_close(torch.from_numpy(joined.predictions), torch.from_numpy(padded.predictions))
    assert seen[0].predictions.shape == seen[3].predictions.shape == padded.predictions.shape
    assert (joined.label_ids == padded.label_ids).all()


@pytest.mark.parametrize("option", OPTIONS)
def test_tokens_that_a_collator_leaves_out_are_not_scored(tmp_path: Path, option: str) -> None:
    class EveryOther(Unscored):
        def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = self.collate(examples)
            batch["completion_mask"][:, ::2] = 0
            return batch

    runs = [
        make_trainer(tmp_path, arguments={"data_collator": EveryOther()}, max_steps=2, **options)
        for options in ({}, {option: True})
    ]
    for trainer in runs:
        trainer.train()
    padded, joined = runs
    rows = joined.train_dataset.to_list()
    scored = EveryOther()(rows)["completion_mask"][:, 1:]
    assert joined.data_collator(rows)["num_scored"] == padded.data_collator(rows)["num_scored"] == scored.sum()
    assert_all_close(trained_weights(joined), trained_weights(padded), RELATIVE)


@pytest.mark.parametrize("option", OPTIONS)
def test_streams_and_loaders_in_other_processes_have_joined_rows(tmp_path: Path, option: str) -> None:
    weights = []
    for options in ({}, {"train_dataset": make_pairs(7).to_iterable_dataset(), "dataloader_num_workers": 1}):
        trainer = make_trainer(tmp_path, per_device_train_batch_size=2, max_steps=3, **options, **{option: True})
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_all_close(weights[1], weights[0], EXACT)


def mixture() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, router_aux_loss_coef=0.5))


def test_the_router_of_a_mixture_is_balanced_over_the_tokens_of_a_row(tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"padding_free": True}):
        model = mixture()
        trainer = make_trainer(tmp_path, model=model, ref_model=copy.deepcopy(model), max_steps=2, **options)
        if not trainer._has_router:
            pytest.skip("needs TRL 1.8 or later")
        trainer.train()
        runs.append(trainer)
    padded, joined = runs
    assert logs_of(padded)[0]["aux_loss"] > 0.1
    assert_all_close(trained_weights(joined), trained_weights(padded), RELATIVE)
    with pytest.raises(NotImplementedError, match="the router's loss would count the tokens of a shared prompt once"):
        make_trainer(tmp_path, model=mixture(), ref_model=mixture(), prefix_sharing=True)


def test_what_goes_by_padded_rows_is_refused(tmp_path: Path) -> None:
    for option in OPTIONS:
        with pytest.raises(ValueError, match=f"pad_to_multiple_of=8 was given, but {option}=True pads nothing"):
            DILConfig(str(tmp_path), bf16=False, use_cpu=True, pad_to_multiple_of=8, **{option: True})
        with pytest.raises(UnsupportedPackingError, match=f"^{option}=True was given, but LlamaForCausalLM .*'eager'"):
            make_trainer(tmp_path, model=make_model(attn_implementation="eager"), **{option: True})

    class WithImages(Unscored):
        def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {**self.collate(examples), "pixel_values": torch.zeros(2, 3)}

    trainer = make_trainer(tmp_path, arguments={"data_collator": WithImages()}, padding_free=True, max_steps=1)
    with pytest.raises(NotImplementedError, match="padding_free=True was given, but batches have pixel_values"):
        trainer.train()


def test_the_collator_has_what_that_of_trl_has(tmp_path: Path) -> None:
    for options in ({}, {"prefix_sharing": True}):
        trainer = make_trainer(tmp_path, max_length=20, **options)
        collator = trainer.data_collator
        assert (collator.pad_token_id, collator.max_length, collator.truncation_mode) == (0, 20, "keep_start")
        collator.max_length = 10
        rows = trainer.train_dataset.to_list()
        for each in (collator, copy.deepcopy(collator), pickle.loads(pickle.dumps(collator))):
            batch = each(rows)
            shape = batch["input_ids"].shape
            assert shape[1] == 10 if not options else max(batch["stretch_lengths"]) < 10
        with pytest.raises(AttributeError, match="no_such"):
            collator.no_such  # noqa: B018


def test_a_launcher_that_made_a_dpo_config_can_share_prefixes(tmp_path: Path) -> None:
    theirs = trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True, padding_free=True)
    config = DILConfig.from_dpo_config(theirs, prefix_sharing=True)
    assert config.padding_free
    assert config.prefix_sharing
    assert not DILConfig.from_dpo_config(theirs).prefix_sharing


STREAMED = """
import datasets, sys
from trl_runs import make_trainer
from tiny_model import make_pairs
stream, pairs = make_pairs(5).to_iterable_dataset(), make_pairs(5)
options = {"ddp_backend": "gloo", "max_steps": 1}
problem = "evaluation on a stream in 2 processes: its batches would be cut apart, or rows counted twice"
def refusal(call):
    try:
        call()
    except NotImplementedError as error:
        assert str(error).startswith(problem), error
        return
    raise AssertionError("not refused")
for data in (stream, {"a": pairs, "b": stream}):
    refusal(lambda: make_trainer(Path(sys.argv[1]), arguments={"eval_dataset": data}, **options))
trainer = make_trainer(Path(sys.argv[1]), arguments={"eval_dataset": pairs}, **options)
prepared = trainer.eval_dataset.to_iterable_dataset()
refusal(lambda: trainer.evaluate(prepared))
refusal(lambda: trainer.predict(prepared))
assert trainer.evaluate()["eval_loss"] != 0
"""


def test_streams_are_not_evaluated_on_by_several_processes(tmp_path: Path) -> None:
    """accelerate would cut batches apart, or fill the last ones up with the first rows, which would count twice."""
    run_on_two_processes(STREAMED, tmp_path, tmp_path)
    losses = [
        make_trainer(tmp_path, arguments={"eval_dataset": data}).evaluate()["eval_loss"]
        for data in (make_pairs(5), make_pairs(5).to_iterable_dataset())
    ]
    assert losses[0] == losses[1]
