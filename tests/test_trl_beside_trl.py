"""DILTrainer on TRL's DPOTrainer beside TRL's own losses, statistics, router loss and truncation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from plain_training import assert_all_close
from tiny_model import make_model, make_pairs
from tiny_trainer import trained_weights
from transformers import MixtralConfig, MixtralForCausalLM
from trl_runs import STATISTICS, accumulated, batch_of, logs_of, make_trainer, trl

from dil_kernels.training.metrics import METRICS

SAME_AS_TRL = {
    "dpo is sigmoid": ({"loss_type": "dpo", "beta": 0.2}, {"loss_type": "sigmoid", "beta": 0.2}),
    "bce is bco_pair": ({"loss_type": "bce"}, {"loss_type": "bco_pair", "beta": 1.0}),
    "bce with alpha=1/2 is nca_pair": ({"loss_type": "bce", "alpha": 0.5}, {"loss_type": "nca_pair", "beta": 1.0}),
    "bce is bco_pair at any beta": ({"loss_type": "bce", "beta": 0.3}, {"loss_type": "bco_pair", "beta": 0.3}),
    "bce with alpha=1/2 is nca_pair at any beta": (
        {"loss_type": "bce", "alpha": 0.5, "beta": 0.3},
        {"loss_type": "nca_pair", "beta": 0.3},
    ),
    "bce by the ratio is twice sigmoid": (
        {"loss_type": "bce", "link": "ratio", "scale": 2.0, "beta": 0.2},
        {"loss_type": "sigmoid", "beta": 0.2},
    ),
}
# What has the name that it has in TRL.
NAMESAKES: dict[str, dict[str, Any]] = {
    "hinge": {},
    "ipo": {"average_log_prob": True},
    "exo_pair": {"label_smoothing": 0.05},
    "robust": {"label_smoothing": 0.1},
    "sppo_hard": {"learning_rate": 1e-4},
    "apo_zero": {},
    "apo_down": {},
}
SAME_AS_TRL["robust without a wrong label is sigmoid"] = ({"loss_type": "robust", "beta": 0.2}, {"beta": 0.2})
for name, settings in NAMESAKES.items():
    of_trl = {"loss_type": name, "beta": 0.2} | settings
    SAME_AS_TRL[name] = (of_trl, {key: value for key, value in of_trl.items() if key != "average_log_prob"})
# f-DPO: TRL's f-divergences of its sigmoid loss.
F_DIVERGENCES = {
    "reverse_kl": {"loss_type": "ukl"},
    "forward_kl": {"loss_type": "is", "learning_rate": 1e-3},  # its gradient grows as exp(-u)
    "js_divergence": {"loss_type": "bce"},
    "alpha_divergence": {"loss_type": "power", "power": -0.5},
}
for name, settings in F_DIVERGENCES.items():
    shared = {"beta": 0.2} | {key: value for key, value in settings.items() if key == "learning_rate"}
    of_trl = shared | {"f_divergence_type": name, "f_alpha_divergence_coef": 1.0 + settings.get("power", 0.0)}
    SAME_AS_TRL[f"{settings['loss_type']} by f_dpo is {name}"] = (settings | shared | {"link": "f_dpo"}, of_trl)


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize(("ours", "theirs"), SAME_AS_TRL.values(), ids=SAME_AS_TRL)
def test_a_loss_is_that_of_trl_step_by_step(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], precompute: bool
) -> None:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "train_dataset": make_pairs(20),  # every micro-batch is full, where TRL's mean of means is the mean
        "precompute_ref_log_probs": precompute,
    }
    initial = make_model(0).state_dict()
    mine = make_trainer(tmp_path / "dil", **{"average_log_prob": False, **ours}, **options)
    mine.train()
    own = make_trainer(tmp_path / "trl", trl.DPOTrainer, trl.DPOConfig, **theirs, **options)
    own.train()
    assert_all_close(
        {name: value - initial[name] for name, value in trained_weights(mine).items()},
        {name: value - initial[name] for name, value in trained_weights(own).items()},
        1e-3,  # what two fp32 runs may differ by after five steps
    )
    for actual, expected in zip(logs_of(mine), logs_of(own), strict=True):
        for metric in METRICS:
            if not (metric.startswith("rewards") and mine.args.average_log_prob):  # TRL logs those of sums
                assert actual[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-4), metric


def test_the_statistics_are_those_of_trl(tmp_path: Path) -> None:
    """With one micro-batch a step, where TRL's mean of means is the mean."""

    def run(**options: Any) -> Any:
        trainer = make_trainer(
            tmp_path,
            arguments={"eval_dataset": make_pairs(4, seed=1)},
            per_device_train_batch_size=3,
            per_device_eval_batch_size=4,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        trainer.train()
        return [log for log in trainer.state.log_history if "train_runtime" not in log]

    ours = run(loss_type="dpo", average_log_prob=False)
    theirs = run(trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig)
    for actual, expected in zip(ours, theirs, strict=True):
        prefix = "" if "loss" in actual else "eval_"
        for metric in (*METRICS, *STATISTICS):
            assert actual[prefix + metric] == pytest.approx(expected[prefix + metric], rel=1e-4, abs=1e-5), metric
        assert expected.keys() <= actual.keys()


@pytest.mark.parametrize("logging", [{"logging_steps": 2}, {"logging_strategy": "no"}], ids=["steps", "no"])
def test_what_came_after_the_last_log_is_in_the_final_one(tmp_path: Path, logging: dict[str, Any]) -> None:
    def final(**options: Any) -> dict[str, float]:
        trainer = make_trainer(tmp_path, per_device_train_batch_size=2, max_steps=3, **logging, **options)
        trainer.train()
        return trainer.state.log_history[-1]

    ours = final(loss_type="dpo", average_log_prob=False)
    theirs = final(trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig)
    assert ours.keys() == theirs.keys()
    # Of several batches TRL has the mean of their means, which differs where these are over tokens.
    means_of_means = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    compared = (
        {*METRICS, *STATISTICS, "train_loss"} - {"loss"} - (means_of_means if "logging_steps" not in logging else set())
    )
    for metric in compared:
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-5), metric


def test_what_accumulation_is_compared_with_in_the_readme(tmp_path: Path) -> None:
    """TRL weighs the pair of a micro-batch of one as much as the two of another together."""
    options = {"trainer_class": trl.DPOTrainer, "config_class": trl.DPOConfig, "learning_rate": 1.0}
    full, split = accumulated(tmp_path, 7, 1, **options), accumulated(tmp_path, 2, 4, **options)
    assert max((full[name] - split[name]).abs().max() for name in full) > 1e-3


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.12"), reason="needs TRL 1.12 for the coefficient of the model"
)
def test_the_router_of_a_mixture_is_balanced_as_by_trl(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        config = MixtralConfig(
            vocab_size=288,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
        trainer = make_trainer(
            tmp_path,
            model=model,
            ref_model=copy.deepcopy(model),
            train_dataset=make_pairs(8),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            learning_rate=0.1,
            **options,
        )
        trainer.train()
        return trainer

    ours = run(loss_type="dpo", beta=0.1, average_log_prob=False)
    theirs = run(trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig)
    for actual, expected in zip(logs_of(ours), logs_of(theirs), strict=True):
        for metric in ("loss", "aux_loss", "rewards/margins", "logps/chosen"):
            assert actual[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-4), metric
    assert logs_of(ours)[0]["loss"] > 1.0  # log 2 and the router's half


def test_conversations_and_truncation_are_those_of_trl(tmp_path: Path) -> None:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content.strip()}]

    pairs = Dataset.from_list(
        [
            {
                "prompt": message("user", pair["prompt"]),
                "chosen": message("assistant", pair["chosen"]),
                "rejected": message("assistant", pair["rejected"]),
            }
            for pair in make_pairs(6)
        ]
    )
    options = {"train_dataset": pairs, "max_length": 14, "per_device_train_batch_size": 6, "max_steps": 2}
    ours = make_trainer(tmp_path / "dil", loss_type="bce", average_log_prob=False, **options)
    ours.train()
    theirs = make_trainer(tmp_path / "trl", trl.DPOTrainer, trl.DPOConfig, loss_type="bco_pair", beta=1.0, **options)
    theirs.train()
    assert batch_of(ours)["input_ids"].shape[1] == 14
    for actual, expected in zip(logs_of(ours), logs_of(theirs), strict=True):
        assert actual["logps/rejected"] == pytest.approx(expected["logps/rejected"], rel=1e-4)
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
