"""Losses and weights that are not finite stop DILTrainer, which names the rows; log ratios that come near are warned
of."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer
from tiny_trainer import make_trainer, tokenized
from transformers import TrainerCallback

from dil_kernels import DILOutput
from dil_kernels.trainer import last_complete_checkpoint
from dil_kernels.training.checkpoints import where_to_resume
from dil_kernels.training.loss_watch import NonFinitePairs, safe_log_ratios


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
    plain = safe_log_ratios({"loss_type": "lsif"})
    slow = safe_log_ratios({"loss_type": "lsif", "beta": 0.1})
    assert slow[2] == pytest.approx(10 * plain[2], rel=0.1)  # a log ratio counts a tenth
    both = safe_log_ratios({"loss_type": "lsif", "link": "ratio", "beta": 1.0})
    assert both[1] == both[2] < plain[2]  # of two log ratios that are as far apart as each from 0


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
