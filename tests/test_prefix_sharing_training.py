"""Training with each prompt computed once against padded batches and the fp64 oracle, and what the trainer refuses."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import RELATIVE, GradientRecorder, assert_all_close, plain_gradients, plain_pairs
from tiny_model import make_model, make_pairs, make_responses
from tiny_trainer import (
    make_trainer,
    tokenized,
    trained_weights,
)
from torch import Tensor

from dil_kernels.data.batches import Batch
from dil_kernels.data.collators import PreferenceCollator, SharedPrefixCollator
from dil_kernels.models.packed_attention import UnsupportedPackingError
from dil_kernels.trainer import DILConfig
from dil_kernels.training.metrics import METRICS

pytestmark = pytest.mark.usefixtures("datasets_cache")

ROUNDING = 1e-6  # fp64 models whose norms and rotary embeddings are in fp32, of the largest entry
REFERENCES = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -30.0}


def test_a_batch_is_the_padded_one_with_each_prompt_once() -> None:
    pairs = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "row": 4, "ref_chosen_logps": -1.5},
        {"prompt_ids": [5], "chosen_ids": [], "rejected_ids": [6], "row": 9, "ref_chosen_logps": -2.5},
    ]
    batch = SharedPrefixCollator()(pairs)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 6, 8, 9, 5, 6]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, -100, 8, 9, -100, 6]]
    assert batch["num_scored"] == 4
    assert batch["rows"].tolist() == [4, 9]
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -2.5]
    shared, padded = Batch.of(batch), Batch.of(PreferenceCollator(0)(pairs))
    assert shared.has_scored_token().tolist() == padded.has_scored_token().tolist()
    assert shared.scored_counts().tolist() == padded.scored_counts().tolist()
    assert shared.sums(shared.labels[1:] != -100).tolist() == [1.0, 0.0, 2.0, 1.0]


def make_rows(draw: Any, rng: random.Random, unpaired: bool, precomputed: bool) -> list[dict[str, Any]]:
    """Of one to three prompts; some responses stand twice, some are empty."""
    prompts, ids = (
        [[rng.randrange(2, 288) for _ in range(draw(st.integers(1, high)))] for _ in range(3)] for high in (9, 12)
    )
    ids.append([])
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        prompt, first, second = rng.choice(prompts), rng.choice(ids), rng.choice(ids)
        if unpaired:
            reference = {"ref_logps": -20.0} if precomputed else {}
            rows.append({"prompt_ids": prompt, "completion_ids": first, "label": draw(st.booleans()), **reference})
        else:
            reference = REFERENCES if precomputed else {}
            rows.append({"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second, **reference})
    return rows


KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "pairs": ({}, False),
    "pairs, precomputed": ({"precompute_ref_log_probs": True}, False),
    "unpaired": ({"loss_type": "ukl"}, True),
    "unpaired, precomputed": ({"loss_type": "bce", "precompute_ref_log_probs": True}, True),
    "dpo, from logits": ({"loss_type": "dpo", "average_log_prob": False, "fused_head": False}, False),
    "eager backend": ({"backend": "eager", "alpha": 0.5, "max_log_ratio": 2.0}, False),
    "LoRA": ({"peft_config": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_padded_batch(tmp_path: Path, kind: str) -> None:
    options, unpaired = KINDS[kind]
    if "peft_config" in options:
        peft = pytest.importorskip("peft")
        options = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **options["peft_config"])}
    else:
        options = {**options, "ref_model": make_model(1).double()}
    trainers = []
    for sharing in (False, True):
        torch.manual_seed(0)
        own = {name: copy.deepcopy(value) for name, value in options.items()}
        trainers.append(make_trainer(tmp_path, model=make_model(0).double(), prefix_sharing=sharing, **own))

    @settings(max_examples=12)
    @given(data=st.data(), seed=st.integers(0, 2**16))
    def check(data: Any, seed: int) -> None:
        compare(make_rows(data.draw, random.Random(seed), unpaired, "precompute_ref_log_probs" in options))

    def compare(rows: list[dict[str, Any]]) -> None:
        results = []
        for trainer in trainers:
            trainer.model.zero_grad()
            loss, output = trainer.compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=True)
            loss.backward()
            trained = {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}
            gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in trained.items()}
            results.append(({"loss": loss.detach(), **output._asdict()}, gradients))
        (padded, padded_gradients), (shared, shared_gradients) = results
        assert len(shared_gradients) > 4
        for name, value in padded.items():
            torch.testing.assert_close(
                shared[name], value, rtol=ROUNDING, atol=ROUNDING, msg=lambda text, n=name: f"{n}: {text}"
            )
        scale = max(1.0, *(gradient.abs().max().item() for gradient in padded_gradients.values()))
        for name, gradient in padded_gradients.items():
            assert (shared_gradients[name] - gradient).abs().max() <= ROUNDING * scale, name

    check()
    references = {"ref_logps": -20.0, **REFERENCES}
    nothing = {"completion_ids": [], "label": True} if unpaired else {"chosen_ids": [], "rejected_ids": []}
    compare([{"prompt_ids": [5], **nothing, **references}])


TRAINING = {
    "frozen copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "from logits": {"fused_head": False},
    "prompts cut by max_length": {"max_length": 12, "max_prompt_length": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def pairs_that_share(count: int, seed: int = 0) -> datasets.Dataset:
    """Every third pair has the prompt of the one before it."""
    rows = make_pairs(count, seed).to_list()
    for index in range(1, count, 3):
        rows[index]["prompt"] = rows[index - 1]["prompt"]
    return datasets.Dataset.from_list(rows)


def assert_mean(actual: float, values: Tensor) -> None:
    """The error counts in parts of the values, whose mean may be near 0."""
    assert actual == pytest.approx(values.mean().item(), rel=0, abs=RELATIVE * values.abs().mean().item())


@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
def test_a_step_is_that_of_plain_pytorch(tmp_path: Path, options: dict[str, Any]) -> None:
    policy, ref, pairs, recorder = make_model(0), make_model(1), pairs_that_share(7), GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        train_dataset=pairs,
        eval_dataset=pairs_that_share(5, seed=4),
        callbacks=[recorder],
        prefix_sharing=True,
        max_steps=1,
        max_grad_norm=0.0,
        **{"per_device_train_batch_size": 7, **options},
    )
    before = trainer.evaluate()
    trainer.train()
    padded = PreferenceCollator(0)(trainer.train_dataset.to_list())
    truth = plain_pairs(policy.double(), ref.double(), padded)
    for metric in METRICS:
        assert_mean(trainer.state.log_history[0][metric], truth[metric])
    assert_all_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy))
    evaluated = plain_pairs(policy, ref, PreferenceCollator(0)(trainer.eval_dataset.to_list()))
    for metric in METRICS:
        assert_mean(before[f"eval_{metric}"], evaluated[metric])


def test_training_on_unpaired_responses_is_that_of_padded_batches(tmp_path: Path) -> None:
    rows = make_responses(9).to_list()
    for index in (1, 2, 5):
        rows[index]["prompt"] = rows[index - 1]["prompt"]
    runs = []
    for sharing in (False, True):
        trainer = make_trainer(
            tmp_path,
            train_dataset=datasets.Dataset.from_list(rows),
            prefix_sharing=sharing,
            per_device_train_batch_size=5,
            max_steps=4,
            optim="sgd",
            loss_type="ukl",
        )
        trainer.train()
        runs.append((trained_weights(trainer), trainer.state.log_history[:4]))
    (padded, padded_log), (shared, shared_log) = runs
    for name, value in padded.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for expected, actual in zip(padded_log, shared_log, strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert actual["rewards/margins"] == pytest.approx(expected["rewards/margins"], rel=1e-4, abs=1e-5, nan_ok=True)


def test_what_cannot_share_prefixes_is_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedPackingError, match="prefix_sharing=True was given, but LlamaForCausalLM attends with"
    ):
        make_trainer(tmp_path, model=make_model(attn_implementation="eager"), prefix_sharing=True)
    with pytest.raises(ValueError, match="prefix_sharing=True makes the rows of batches itself; give no data_collator"):
        make_trainer(tmp_path, prefix_sharing=True, data_collator=PreferenceCollator(0))
    with pytest.raises(ValueError, match="pad_to_multiple_of=8 was given, but prefix_sharing=True pads nothing"):
        DILConfig(str(tmp_path), prefix_sharing=True, pad_to_multiple_of=8, use_cpu=True)
    with pytest.raises(ValueError, match="with prefix_sharing=True its noise goes by the length of the joined row"):
        DILConfig(str(tmp_path), prefix_sharing=True, neftune_noise_alpha=5.0, use_cpu=True)


def test_the_row_is_as_short_as_the_prompts_are_shared(tmp_path: Path) -> None:
    rows = tokenized(pairs_that_share(7)).to_list()
    lengths = [[len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in rows]
    prompts = {tuple(row["prompt_ids"]) for row in rows}
    assert len(prompts) == 5
    batch = SharedPrefixCollator()(rows)
    expected = sum(len(prompt) - 1 for prompt in prompts) + sum(
        2 + chosen + rejected for _, chosen, rejected in lengths
    )
    assert batch["input_ids"].shape == (1, expected)
