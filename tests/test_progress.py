"""What a run shows while it goes on."""

from __future__ import annotations

from dil_kernels.training.held_out import BeforeAfter, HeldOutScores
from dil_kernels.training.progress import MetricText


def test_what_moves_is_seen_at_the_smallest_rates() -> None:
    text = MetricText()
    log = {"loss": -0.5, "grad_norm": 1.23456, "learning_rate": 1e-6, "rewards/margins": 0.0, "epoch": 0.1}
    assert text(log) == "loss=-0.500 rewards/margins=0 grad_norm=1.23 learning_rate=1e-06 epoch=0.10"
    log |= {"loss": -0.5000123, "rewards/margins": 1.23456e-5, "rewards/accuracies": 0.625, "epoch": 0.2}
    assert text(log) == (
        "loss=-0.500012 rewards/margins=1.23e-05 rewards/accuracies=0.625 grad_norm=1.23 learning_rate=1e-06 epoch=0.20"
    )
    assert text({"loss": 12.75}) == "loss=12.750"
    assert text({"loss": float("inf")}) == "loss=inf"
    # Of an evaluation, in comparison with the first evaluation.
    assert text({"eval_loss": -0.25, "eval_rewards/margins": 2e-7}, "eval_") == (
        "eval_loss=-0.250 eval_rewards/margins=2e-07"
    )
    assert text({"eval_loss": -0.2500002}, "eval_") == "eval_loss=-0.25000020"


def test_a_change_that_three_decimals_would_hide_is_shown() -> None:
    before = HeldOutScores([-1.0, -2.0], [-3.0, -4.0], per_token=True, in_pairs=True)
    after = HeldOutScores([-1.0 + 2e-5, -2.0 + 2e-5], [-3.0, -4.0], per_token=True, in_pairs=True)
    _, chosen, rejected, margin, _ = BeforeAfter(before, after).rows()
    assert (chosen[-1], rejected[-1], margin[-1]) == ("+2.0e-05", "+0.000", "+2.0e-05")
