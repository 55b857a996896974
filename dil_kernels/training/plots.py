"""Training curves as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHOSEN, REJECTED, NEUTRAL = "#1b7837", "#b2182b", "#2166ac"
Curves = tuple[tuple[str, str, str], ...]  # of each curve the metric, the name in the legend and the colour


def _sides(metric: str) -> Curves:
    return (f"{metric}/chosen", "chosen", CHOSEN), (f"{metric}/rejected", "rejected", REJECTED)


# Title, y label and curves; what was not logged is left out, as pairs have no loss of a side and sides no accuracy.
PANELS: tuple[tuple[str, str, Curves], ...] = (
    ("Loss", "mean", (("loss", "", NEUTRAL),)),
    ("Loss of a side", "mean over its responses", _sides("loss")),
    ("Reward accuracy", "share of pairs", (("rewards/accuracies", "", NEUTRAL),)),
    ("Reward margin", "log ratio, chosen - rejected", (("rewards/margins", "", NEUTRAL),)),
    ("Rewards", "log ratio", _sides("rewards")),
    ("Log-probability of a response", "sum over its tokens", _sides("logps")),
)
LIKE = 1000  # numbers that differ by less than this part of them are written as differences
LARGEST_EXPONENT = 3  # beyond which numbers are written with a power of ten
Logs = Sequence[Mapping[str, Any]]


def plot_training_curves(log_history: Logs, path: str | os.PathLike[str]) -> bool:
    """Draw loss, accuracy, margin, rewards and log-probs over the optimizer steps of a run.

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

    panels = drawn_panels(log_history)
    last_step = max(entry["step"] for entry in log_history)
    # Apart from pyplot, which would change the backend of the process.
    figure = Figure(figsize=(3.9 * -(-len(panels) // 2), 6.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    places = list(figure.subplots(2, -(-len(panels) // 2), squeeze=False).flat)
    for axes, (title, label, curves) in zip(places, panels, strict=False):
        for metric, name, color in curves:
            _draw_curve(axes, log_history, metric, name, color)
        _finish_panel(axes, title, label)
        axes.set_xlim(0, 1.02 * last_step)
        if title == "Reward accuracy":
            axes.set_ylim(-0.04, 1.04)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=150)
    return True


def drawn_panels(log_history: Logs) -> list[tuple[str, str, Curves]]:
    """Those of PANELS that have something to show."""
    return [panel for panel in PANELS if any(_series(log_history, metric)[0] for metric, _, _ in panel[2])]


def _draw_curve(axes: Axes, log_history: Logs, metric: str, name: str, color: str) -> None:
    steps, values = _series(log_history, metric)
    axes.plot(steps, values, color=color, linewidth=1.6, label=name or "training", marker="." if len(steps) < 3 else "")
    steps, values = _series(log_history, f"eval_{metric}")
    if steps:
        label = f"{name}, held out" if name else "held out"
        axes.plot(steps, values, color=color, linestyle="--", linewidth=1, marker="o", markersize=4, label=label)


def _series(log_history: Logs, metric: str) -> tuple[list[int], list[float]]:
    # A log without a response of one side has NaN for it, which would cut the curve.
    entries = [entry for entry in log_history if math.isfinite(entry.get(metric, math.nan))]
    return [entry["step"] for entry in entries], [entry[metric] for entry in entries]


def _finish_panel(axes: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import Formatter, MaxNLocator

    class OffsetFormatter(Formatter):
        """Short numbers at the ticks where values are small or hardly differ, and beside them how to read these."""

        offset, exponent = 0.0, 0

        def set_locs(self, locs: Any) -> None:
            self.offset, self.exponent = offset_and_exponent(list(locs))

        def __call__(self, x: float, pos: int | None = None) -> str:
            return self.fix_minus(f"{(x - self.offset) / 10**self.exponent:.6g}")

        def get_offset(self) -> str:
            return offset_text(self.offset, self.exponent)

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(OffsetFormatter())
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_lines()) > 1:
        axes.legend(framealpha=0.8, edgecolor="none", fontsize=8)


def offset_and_exponent(ticks: Sequence[float]) -> tuple[float, int]:
    """What to take off numbers, and by which power of ten to divide them then, so that they are short; mostly 0, 0."""
    spread, largest = max(ticks, default=0.0) - min(ticks, default=0.0), max(map(abs, ticks), default=0.0)
    offset = float(f"{min(ticks):.12g}") if 0 < spread < largest / LIKE else 0.0
    left = spread if offset else largest
    exponent = math.floor(math.log10(left)) if left > 0 else 0
    return offset, exponent if abs(exponent) > LARGEST_EXPONENT else 0


def offset_text(offset: float, exponent: int) -> str:
    """How values come from the numbers at the ticks: offset + tick x 10^exponent; empty where they are the values."""
    ticks = rf"ticks $\times\,10^{{{exponent}}}$" if exponent else "ticks"
    if offset:
        return f"{offset:.12g} + {ticks}".replace("-", "\N{MINUS SIGN}", 1 if offset < 0 else 0)
    return ticks if exponent else ""
