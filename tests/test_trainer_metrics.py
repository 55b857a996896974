"""What DILTrainer logs while it trains and evaluates: means over all pairs, without waiting for the device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import RELATIVE, plain_pairs
from tiny_model import make_model, make_pairs
from tiny_trainer import batch_of, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from dil_kernels import DILOutput
from dil_kernels.training.loss_watch import LogRatioRange, NonFinitePairs
from dil_kernels.training.metrics import METRICS, PREDICTIONS, batch_metrics, pair_metrics


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


@pytest.mark.parametrize(
    ("logging", "rows"),
    [({"logging_steps": 3}, slice(6, 7)), ({"logging_strategy": "no"}, slice(7))],
    ids=["steps", "no"],
)
def test_what_came_after_the_last_log_is_in_the_final_one(tmp_path: Path, logging: dict[str, Any], rows: slice) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(7)
    options = {"train_sampling_strategy": "sequential", "learning_rate": 0.0, "num_train_epochs": 1, **logging}
    trainer = make_trainer(tmp_path, model=policy, ref_model=ref, train_dataset=pairs, **options)
    output = trainer.train()
    truth = plain_pairs(policy.double(), ref.double(), batch_of(pairs))
    final = trainer.state.log_history[-1]
    for metric in set(METRICS) - {"loss"}:
        assert final[metric] == pytest.approx(truth[metric][rows].mean().item(), rel=RELATIVE), metric
        assert output.metrics[metric] == final[metric]
    whole = make_trainer(tmp_path, train_dataset=pairs, num_train_epochs=1, logging_steps=2)
    whole.train()
    assert "rewards/margins" not in whole.state.log_history[-1]


def test_metrics_of_the_user_see_every_pair(tmp_path: Path) -> None:
    pairs, seen = make_pairs(7, seed=9), []

    def compute_metrics(result: Any) -> dict[str, float]:
        seen.append(result)
        return {"margin": float((result.predictions[:, 0] - result.predictions[:, 1]).mean())}

    trainer = make_trainer(tmp_path, eval_dataset=pairs, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_margin"] == pytest.approx(metrics["eval_logps/chosen"] - metrics["eval_logps/rejected"])
    assert seen[0].predictions.shape == (7, len(PREDICTIONS))
    assert seen[0].label_ids.tolist() == [*range(1, 8)]


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


def test_a_new_data_set_can_be_evaluated_and_predicted(tmp_path: Path) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(4, seed=9)
    trainer = make_trainer(tmp_path, model=policy, ref_model=ref)
    evaluated, predicted = trainer.evaluate(pairs), trainer.predict(pairs).metrics
    truth = plain_pairs(policy.double(), ref.double(), batch_of(pairs))["loss"].mean().item()
    assert evaluated["eval_loss"] == pytest.approx(truth, rel=RELATIVE)
    assert predicted["test_loss"] == pytest.approx(truth, rel=RELATIVE)


def test_precomputed_references_refuse_a_data_set_that_came_later(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="give every evaluation set to the constructor"):
        trainer.evaluate(make_pairs(2))


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
        sums = pair_metrics(output, 0.1).sum(0)
        batch_metrics(output, unpaired=True, beta=0.1)
        found.add(output, torch.tensor([1, 2, 3]), step=1)
        largest.add(output)
        _, counts = trainer.get_batch_samples(batches, 2, torch.device("cpu"))
    assert sums[-1] == 2
    assert counts.tolist() == [6, 6]
