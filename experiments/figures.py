"""The look that the figures share: one colour, marker and line a loss, told apart also by colour-blind readers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette; its yellow, too pale for lines on white, is left out.
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, GREY, BLACK = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#7F7F7F",
    "#000000",
)
COLOURS = {"lsif": BLUE, "ukl": SKY, "bce": GREEN, "power": ORANGE, "is": PURPLE, "brier": GREY, "dpo": VERMILLION}
MARKERS = {"lsif": "o", "ukl": "s", "bce": "^", "power": "D", "is": "v", "brier": "P", "dpo": "X"}


def colour_of(loss_type: str) -> str:
    """The colour of a loss; black for one that has none of its own."""
    return COLOURS.get(loss_type, BLACK)


def marker_of(loss_type: str) -> str:
    """The marker of a loss."""
    return MARKERS.get(loss_type, "*")


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, apart from pyplot, which would change the backend of the process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def finish_panel(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels, light grid, no box."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, without the version of matplotlib, so that the same picture is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
