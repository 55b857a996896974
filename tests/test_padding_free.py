"""Training on batches without padding against padded ones and the fp64 oracle, and what the trainer must refuse."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import RELATIVE, GradientRecorder, assert_all_close, plain_gradients, plain_pairs
from tiny_model import make_model, make_pairs, make_responses, make_tokenizer
from tiny_trainer import (
    assert_bitwise_equal,
    assert_trained_as,
    distributed_run,
    make_trainer,
    resumable_run,
    tokenized,
    trained_weights,
)
from two_processes import run_on_two_processes

from dil_kernels.data.batches import Batch
from dil_kernels.data.collators import PackedCollator, PreferenceCollator
from dil_kernels.models.packed_attention import (
    UnsupportedPackingError,
)
from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.held_out import score_held_out
from dil_kernels.training.metrics import METRICS

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_a_packed_batch_is_the_padded_one_without_padding() -> None:
    pairs = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "row": 4, "ref_chosen_logps": -1.5},
        {"prompt_ids": [5], "chosen_ids": [], "rejected_ids": [6], "row": 9, "ref_chosen_logps": -2.5},
    ]
    batch = PackedCollator()(pairs)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 5, 6, 8, 9, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, -100, -100, 8, 9, -100, 6]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 8, 10]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert (batch["max_seqlen"], batch["num_scored"]) == (4, 4)
    assert batch["rows"].tolist() == [4, 9]
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -2.5]
    assert "attention_mask" not in batch  # whoever runs a packed row as a padded one must fail
    padded = Batch.of(PreferenceCollator(0)(pairs))
    assert Batch.of(batch).has_scored_token().tolist() == padded.has_scored_token().tolist()
    assert Batch.of(batch).has_scored_token().tolist() == [True, False, True, True]
    values = torch.arange(1.0, 10.0)  # of the labels 2 to 10
    assert Batch.of(batch).sums(values).tolist() == [1.0 + 2 + 3, 4.0, 5.0 + 6 + 7 + 8, 9.0]


def test_a_response_without_a_prompt_has_no_first_label() -> None:
    batch = PackedCollator()([{"prompt_ids": [], "completion_ids": [7, 8], "label": True}] * 2)
    assert batch["labels"].tolist() == [[-100, 8, -100, 8]]
    assert batch["is_chosen"].tolist() == [True, True]


def in_pairs(draw: Any, rng: random.Random, precomputed: bool) -> dict[str, Any]:
    ids = {name: [rng.randrange(2, 288) for _ in range(draw(st.integers(low, 12)))] for name, low in SIDES.items()}
    return {**ids, **(REFERENCES if precomputed else {})}


def unpaired(draw: Any, rng: random.Random, precomputed: bool) -> dict[str, Any]:
    prompt, completion = ([rng.randrange(2, 288) for _ in range(draw(st.integers(low, 12)))] for low in (2, 0))
    reference = {"ref_logps": -20.0} if precomputed else {}
    return {"prompt_ids": prompt, "completion_ids": completion, "label": draw(st.booleans()), **reference}


SIDES = {"prompt_ids": 2, "chosen_ids": 0, "rejected_ids": 0}
REFERENCES = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -30.0}
KINDS = {
    "pairs": ({}, in_pairs, False),
    "pairs, precomputed": ({"precompute_ref_log_probs": True}, in_pairs, True),
    "unpaired": ({"loss_type": "ukl"}, unpaired, False),
    "unpaired, precomputed": ({"loss_type": "bce", "precompute_ref_log_probs": True}, unpaired, True),
    "dpo, from logits": ({"loss_type": "dpo", "average_log_prob": False, "fused_head": False}, in_pairs, False),
    "eager, interleaved lengths": ({"backend": "eager", "alpha": 0.5, "max_log_ratio": 2.0}, in_pairs, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_padded_batch(tmp_path: Path, kind: str) -> None:
    options, make_row, precomputed = KINDS[kind]
    policy, ref = make_model(0).double(), make_model(1).double()
    trainers = [
        make_trainer(tmp_path, model=copy.deepcopy(policy), ref_model=copy.deepcopy(ref), padding_free=free, **options)
        for free in (False, True)
    ]

    @settings(max_examples=10)
    @given(data=st.data(), count=st.integers(1, 4), seed=st.integers(0, 2**16))
    def check(data: Any, count: int, seed: int) -> None:
        rng = random.Random(seed)
        rows = [make_row(data.draw, rng, precomputed) for _ in range(count)]
        results = []
        for trainer in trainers:
            trainer.model.zero_grad()
            loss, output = trainer.compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=True)
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
            results.append(({"loss": loss.detach(), **output._asdict()}, gradients))
        (padded, padded_gradients), (packed, packed_gradients) = results
        for name, value in padded.items():
            torch.testing.assert_close(
                packed[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )
        for name, gradient in padded_gradients.items():
            scale = max(1.0, gradient.abs().max().item())
            assert (packed_gradients[name] - gradient).abs().max() <= 1e-9 * scale, name

    check()


TRAINING = {
    "frozen copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "from logits": {"fused_head": False},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
def test_a_step_is_that_of_plain_pytorch(tmp_path: Path, options: dict[str, Any]) -> None:
    policy, ref, pairs, recorder = make_model(0), make_model(1), make_pairs(7), GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        train_dataset=pairs,
        eval_dataset=make_pairs(5, seed=4),
        callbacks=[recorder],
        padding_free=True,
        max_steps=1,
        max_grad_norm=0.0,
        include_num_input_tokens_seen="all",
        **{"per_device_train_batch_size": 7, **options},
    )
    before = trainer.evaluate()
    trainer.train()
    padded = PreferenceCollator(0)(tokenized(pairs).to_list())
    truth = plain_pairs(policy.double(), ref.double(), padded)
    for metric in METRICS:
        assert trainer.state.log_history[0][metric] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric
    assert_all_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy))
    assert trainer.state.num_input_tokens_seen == padded["attention_mask"].sum()
    evaluated = plain_pairs(policy, ref, PreferenceCollator(0)(tokenized(make_pairs(5, seed=4)).to_list()))
    for metric in METRICS:
        assert before[f"eval_{metric}"] == pytest.approx(evaluated[metric].mean().item(), rel=RELATIVE), metric


def test_training_on_unpaired_responses_is_that_of_padded_batches(tmp_path: Path) -> None:
    weights = []
    for free in (False, True):
        trainer = make_trainer(
            tmp_path, train_dataset=make_responses(9), padding_free=free, max_steps=4, optim="sgd", loss_type="ukl"
        )
        trainer.train()
        weights.append((trained_weights(trainer), trainer.state.log_history))
    for name, value in weights[0][0].items():
        torch.testing.assert_close(weights[1][0][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for padded, packed in zip(weights[0][1][:4], weights[1][1][:4], strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-4, abs=1e-6)
        assert packed["rewards/margins"] == pytest.approx(padded["rewards/margins"], rel=1e-4, abs=1e-5, nan_ok=True)


joined_rows = pytest.mark.parametrize("option", ["padding_free", "prefix_sharing"])


@joined_rows
def test_mixed_precision_is_as_near_as_bf16_allows(tmp_path: Path, option: str) -> None:
    losses = []
    for joined in (False, True):
        trainer = make_trainer(tmp_path, ref_model=make_model(1), **{option: joined}, bf16=True, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@joined_rows
def test_a_resumed_run_continues_exactly(tmp_path: Path, option: str) -> None:
    whole = resumable_run(tmp_path / "whole", **{option: True})
    whole.train()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    resumed = resumable_run(tmp_path, **{option: True}, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(trained_weights(resumed), trained_weights(whole))


DISTRIBUTED = """
from tiny_trainer import distributed_run
distributed_run(Path(sys.argv[1]), per_device_train_batch_size=2, ddp_backend="gloo", OPTION=True)
"""


@joined_rows
def test_two_processes_train_as_one_with_padding(tmp_path: Path, option: str) -> None:
    run_on_two_processes(DISTRIBUTED.replace("OPTION", option), tmp_path, tmp_path)
    (tmp_path / "one").mkdir()
    one = distributed_run(tmp_path / "one", per_device_train_batch_size=4)
    assert_trained_as(tmp_path, one)


@joined_rows
def test_scores_before_and_after_are_those_of_padded_batches(tmp_path: Path, option: str) -> None:
    scores = [
        score_held_out(make_trainer(tmp_path, eval_dataset=make_pairs(5), **{option: joined}))
        for joined in (False, True)
    ]
    assert len(scores[0].chosen) == len(scores[0].rejected) == 5
    assert scores[1].chosen == pytest.approx(scores[0].chosen, rel=RELATIVE, abs=0)
    assert scores[1].rejected == pytest.approx(scores[0].rejected, rel=RELATIVE, abs=0)


def test_what_cannot_be_packed_is_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPackingError, match="padding_free=True was given, but LlamaForCausalLM attends with"):
        make_trainer(tmp_path, model=make_model(attn_implementation="eager"), padding_free=True)
    with pytest.raises(ValueError, match="padding_free=True makes the rows of batches itself; give no data_collator"):
        DILTrainer(
            make_model(),
            args=DILConfig(str(tmp_path), padding_free=True, use_cpu=True, report_to=[]),
            processing_class=make_tokenizer(),
            data_collator=PreferenceCollator(0),
        )


def test_a_padded_batch_names_no_boundaries() -> None:
    batch = PreferenceCollator(0)(tokenized(make_pairs(2)).to_list())
    assert Batch.of(batch).layout.model_inputs().keys() == {"input_ids", "attention_mask", "use_cache"}
