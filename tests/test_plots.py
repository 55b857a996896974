"""The training curves: what is drawn of pairs, of unpaired responses and of nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from dil_kernels.training.plots import drawn_panels, offset_and_exponent, offset_text, plot_training_curves

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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    return figures


def test_curves_hold_the_logged_points(tmp_path: Path, drawn: list[Figure]) -> None:
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


def test_the_ticks_of_a_run_that_barely_moves_can_be_read(tmp_path: Path, drawn: list[Figure]) -> None:
    logs = [{"step": step, "loss": -0.5 - 1e-6 * step, "rewards/margins": 1e-6 * step} for step in range(1, 9)]
    assert plot_training_curves(logs, tmp_path / "curves.png")
    said = {axes.get_title(loc="left"): _ascii(axes.yaxis.get_offset_text()) for axes in drawn[0].axes}
    assert re.fullmatch(r"-0\.5000\d* \+ ticks \$\\times\\,10\^\{-6\}\$", said["Loss"]), said
    assert said["Reward margin"] == r"ticks $\times\,10^{-6}$"
    (axes,) = (axes for axes in drawn[0].axes if axes.get_title(loc="left") == "Loss")
    offset = float(said["Loss"].split(" ")[0])
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):  # as is said
        assert offset + float(_ascii(label)) * 1e-6 == pytest.approx(place, abs=1e-10)


def _ascii(text: Text) -> str:
    return text.get_text().replace("\N{MINUS SIGN}", "-")


def test_ticks_that_are_the_values_need_no_words() -> None:
    assert offset_and_exponent([-0.2, 0.0, 0.2]) == (0.0, 0)
    assert offset_and_exponent([400.0, 401.0]) == (0.0, 0)
    assert offset_and_exponent([]) == (0.0, 0)
    assert offset_and_exponent([2e7, 4e7]) == (0.0, 7)
    assert offset_and_exponent([-123.456, -123.454]) == (-123.456, 0)
    assert offset_text(0.0, 0) == ""
    assert offset_text(123.5, 0) == "123.5 + ticks"
