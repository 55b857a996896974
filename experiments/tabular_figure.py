"""Figure of the tabular-consistency experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figures import colour_of, finish_panel, marker_of, new_figure, save
from experiments.tabular_problem import FROM_REFERENCE, FROM_REJECTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
DISTANCE = r"total variation to $\pi_{chosen}$"
FROM_REFERENCE_TITLE = r"$y_l$ drawn from $\pi_{ref}$"


def draw(summary: Rows, sampled: Rows, path: Path) -> None:
    """Three panels: optima with y_l from pi_ref, optima over alpha with rejected samples, error over sample size."""
    figure = new_figure(13.5, 4.4)
    optima, mixing, sampling = figure.subplots(1, 3)
    _draw_optima(optima, [row for row in summary if row["setup"] == FROM_REFERENCE])
    finish_panel(optima, FROM_REFERENCE_TITLE, rf"{DISTANCE}; $< 10^{{-12}}$: rounding", "")
    _draw_mixing(mixing, [row for row in summary if row["setup"] == FROM_REJECTED and row["route"] == "one-stage"])
    finish_panel(
        mixing,
        r"$y_l$ rejected, $\pi_{ref}$ = (chosen + rejected)/2",
        r"$\alpha$, share of chosen in the reference term",
        DISTANCE,
    )
    _draw_sampling(sampling, [row for row in sampled if row["setup"] == FROM_REFERENCE])
    finish_panel(
        sampling, f"{FROM_REFERENCE_TITLE}, finite samples", r"samples of $y_w$ and of $y_l$ a prompt", DISTANCE
    )
    for axes in (mixing, sampling):
        axes.legend(frameon=False, fontsize=8, ncols=2)
    save(figure, path)


def _draw_optima(axes: Axes, rows: Rows) -> None:
    names = list(dict.fromkeys((row["loss"], row["beta"]) for row in rows))
    for row in rows:
        two_stage = row["route"] == "two-stage"
        axes.plot(
            max(row["tv_mean"], 1e-17),
            names.index((row["loss"], row["beta"])) + (0.16 if two_stage else -0.16),
            marker=marker_of(row["loss"]),
            markersize=7,
            color=colour_of(row["loss"]),
            markerfacecolor="white" if two_stage else None,
        )
    axes.set_xscale("log")
    axes.set_xlim(3e-18, 3)
    axes.set_yticks(range(len(names)), [rf"{loss}, $\beta$ = {beta:g}" if beta else loss for loss, beta in names])
    axes.invert_yaxis()
    for label, fill in (("policy fitted directly", "0.3"), (r"two-stage: fit $r$, then $\pi_{ref}\, r$", "white")):
        axes.plot([], [], "o", color="0.3", markerfacecolor=fill, label=label)
    axes.legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(0.55, 0.42))


def _draw_mixing(axes: Axes, rows: Rows) -> None:
    for name in dict.fromkeys(row["loss"] for row in rows if row["alpha"] != ""):
        curve = [row for row in rows if row["loss"] == name]
        _curve(axes, curve, "alpha", name)
    for row in rows:
        if row["beta"] == 1.0:
            axes.axhline(
                row["tv_mean"], color=colour_of(row["loss"]), linestyle=":", label=rf"{row['loss']}, $\beta$ = 1"
            )
    axes.set_ylim(bottom=-0.01)


def _draw_sampling(axes: Axes, rows: Rows) -> None:
    for name in dict.fromkeys(row["loss"] for row in rows):
        curve = [row for row in rows if row["loss"] == name]
        _curve(axes, curve, "samples", rf"{name}, $\beta$ = 1" if curve[0]["beta"] else name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.tick_params(which="minor", labelsize=8)


def _curve(axes: Axes, rows: Rows, x: str, label: str) -> None:
    """A line through the means, with a band of one standard deviation over the seeds."""
    loss = rows[0]["loss"]
    xs = [row[x] for row in rows]
    means = [row["tv_mean"] for row in rows]
    axes.plot(xs, means, color=colour_of(loss), marker=marker_of(loss), markersize=5, linewidth=1.5, label=label)
    axes.fill_between(
        xs,
        [max(row["tv_mean"] - row["tv_sd"], 0.0) for row in rows],
        [row["tv_mean"] + row["tv_sd"] for row in rows],
        color=colour_of(loss),
        alpha=0.15,
        linewidth=0,
    )
