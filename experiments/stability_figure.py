"""Figure of the stability experiment: heat maps of the share of diverged runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from experiments.figures import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("lsif", "ukl", "bce", "dpo, beta 1", "dpo, beta 0.1")  # the table has every loss
COLOURS, PERCENT = "Blues", Normalize(0, 100)
Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, path: Path) -> None:
    """A column a loss, a row for each reduction and bound; learning rate over length inside."""
    losses = [name for name in SHOWN if any(row["loss"] == name for row in rows)]
    arms = list(dict.fromkeys((row["reduction"], row["bound"]) for row in rows))
    figure = new_figure(2.3 + 2.6 * len(losses), 0.9 + 1.5 * len(arms))
    grid = figure.subplots(len(arms), len(losses), squeeze=False, sharex=True, sharey=True)
    for axes_row, (reduction, bound) in zip(grid, arms, strict=True):
        for axes, loss_type in zip(axes_row, losses, strict=True):
            _heat_map(
                axes, [r for r in rows if (r["loss"], r["reduction"], r["bound"]) == (loss_type, reduction, bound)]
            )
        name = "no bound" if bound == "none" else bound
        axes_row[0].set_ylabel(f"{reduction} of log ratios\n{name}\n\ntokens", fontsize=8)
    for axes, loss_type in zip(grid[0], losses, strict=True):
        axes.set_title(loss_type, fontsize=10.5, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("learning rate (Adam)", fontsize=9)
    bar = figure.colorbar(ScalarMappable(PERCENT, COLOURS), ax=grid, shrink=0.5, pad=0.02)
    bar.set_label("diverged runs, %", fontsize=9)
    save(figure, path)


def _heat_map(axes: Axes, rows: Rows) -> None:
    if not rows:
        axes.text(
            0.5, 0.5, "DPO takes no alpha", transform=axes.transAxes, ha="center", va="center", fontsize=8, color="0.4"
        )
        return
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
    shares = [[0.0] * len(rates) for _ in lengths]
    for row in rows:
        shares[lengths.index(row["tokens"])][rates.index(row["learning_rate"])] = (
            100.0 * (row["non_finite"] + row["unlearned"]) / row["runs"]
        )
    axes.imshow(shares, cmap=COLOURS, norm=PERCENT, aspect="auto", origin="lower")
    for i, line in enumerate(shares):
        for j, share in enumerate(line):
            if share:
                axes.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=7, color="w" if share > 55 else "k")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    axes.tick_params(labelsize=7)
