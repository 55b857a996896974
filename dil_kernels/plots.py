"""Training curves as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHOSEN, REJECTED, NEUTRAL = "#1b7837", "#b2182b", "#2166ac"
# Title, y label, and of each curve the metric, the name in the legend and the colour.
PANELS = (
    ("Loss", "mean over pairs", (("loss", "", NEUTRAL),)),
    ("Reward margin", "log ratio, chosen - rejected", (("rewards/margins", "", NEUTRAL),)),
    ("Reward accuracy", "share of pairs", (("rewards/accuracies", "", NEUTRAL),)),
    (
        "Log-probability of a response",
        "sum over its tokens",
        (("logps/chosen", "chosen", CHOSEN), ("logps/rejected", "rejected", REJECTED)),
    ),
)
Logs = Sequence[Mapping[str, Any]]


def plot_training_curves(log_history: Logs, path: str | os.PathLike[str]) -> bool:
    """Draw loss, margin, accuracy and log-probs over the optimizer steps of a run.

    Args:
        log_history: what `transformers.Trainer` logged: mappings with "step" and the metrics of `DILTrainer`, those of
            evaluations with the prefix "eval_".
        path: of the PNG.

    Returns:
        Whether anything was drawn; without a logged training step, no file is written.
    """
    if not any("loss" in entry for entry in log_history):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Apart from pyplot, which would change the backend of the process.
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, label, curves) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for metric, name, color in curves:
            _draw_curve(axes, log_history, metric, name, color)
        _finish_panel(axes, title, label)
        if title == "Reward accuracy":
            axes.set_ylim(-0.04, 1.04)
    figure.savefig(path, dpi=150)
    return True


def _draw_curve(axes: Axes, log_history: Logs, metric: str, name: str, color: str) -> None:
    steps, values = _series(log_history, metric)
    axes.plot(steps, values, color=color, linewidth=1.6, label=name or "training", marker="." if len(steps) < 3 else "")
    steps, values = _series(log_history, f"eval_{metric}")
    if steps:
        label = f"{name}, held out" if name else "held out"
        axes.plot(steps, values, color=color, linestyle="--", linewidth=1, marker="o", markersize=4, label=label)


def _series(log_history: Logs, metric: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log_history if metric in entry]
    return [entry["step"] for entry in entries], [entry[metric] for entry in entries]


def _finish_panel(axes: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8)
