"""The training curves: what is drawn of pairs, of unpaired responses and of nothing."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from dil_kernels.training.plots import drawn_panels, plot_training_curves

PAIRS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
SIDES = (
    "loss",
    "loss/chosen",
    "loss/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
)


def history(metrics: tuple[str, ...], prefix: str = "") -> list[dict[str, float]]:
    return [{"step": step, **{f"{prefix}{name}": 0.1 * step for name in metrics}} for step in (1, 2, 3)]


def test_panels_are_those_of_what_was_logged() -> None:
    titles = [title for title, _, _ in drawn_panels(history(PAIRS))]
    assert titles == ["Loss", "Reward accuracy", "Reward margin", "Rewards", "Log-probability of a response"]
    titles = [title for title, _, _ in drawn_panels(history(SIDES))]
    assert titles == ["Loss", "Loss of a side", "Reward margin", "Rewards", "Log-probability of a response"]


def test_curves_hold_the_logged_points(tmp_path: Path, monkeypatch) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), savefig(self, *args, **kw)))
    logs = [*history(SIDES), *history(SIDES, "eval_"), {"step": 3, "train_loss": 1.0}]
    logs[1]["loss/rejected"] = math.nan  # a log without a rejected response
    assert plot_training_curves(logs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    panel = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}["Loss of a side"]
    lines = {line.get_label(): [list(line.get_xdata()), list(line.get_ydata())] for line in panel.get_lines()}
    assert lines["rejected"] == [[1, 3], [0.1, 3 * 0.1]]
    assert lines["chosen, held out"] == [[1, 2, 3], [0.1, 0.2, 3 * 0.1]]
    assert len({axes.get_xlim() for axes in drawn[0].axes}) == 1


def test_nothing_logged_draws_nothing(tmp_path: Path) -> None:
    assert not plot_training_curves([{"step": 1, "train_loss": 1.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
