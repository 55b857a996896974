"""The picture: one small chart a case and pass, a bar for each provider, the byte floor as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from harness.cases import DTYPE_NAMES, PASSES, Case
from harness.machine import Machine
from harness.providers import PROVIDERS
from harness.runner import Result

COLOURS = ("#1b6ca8", "#c0392b", "#e59866", "#7d8a97", "#8e6bb0", "#3f9c6b", "#b59f3b")
FLOOR_COLOUR = "#111111"


def write_plot(path: Path, results: Sequence[Result], machine: Machine) -> None:
    """Write a PNG; providers that were never timed do not appear."""
    timed = [r for r in results if r.time is not None]
    cases = list(dict.fromkeys(r.case for r in timed))
    names = list(dict.fromkeys(r.entry.provider.name for r in timed))
    colours = {name: COLOURS[_colour_index(name, names) % len(COLOURS)] for name in names}
    figure = Figure(figsize=(1.2 + 1.75 * max(len(cases), 3), 6.4), layout="constrained", dpi=150)
    grid = figure.subplots(len(PASSES), len(cases), squeeze=False)
    for row, timed_pass in zip(grid, PASSES, strict=True):
        for axes, case in zip(row, cases, strict=True):
            _chart(axes, [r for r in timed if r.case == case and r.timed is timed_pass], colours)
        row[0].set_ylabel(f"{timed_pass.name}\nmilliseconds, median", fontsize=9)
    for axes, case in zip(grid[0], cases, strict=True):
        axes.set_title(_case_title(case), fontsize=8.5)
    labels = {r.entry.provider.name: r.entry.label for r in timed}
    _legend(figure, {labels[name]: colours[name] for name in names})
    figure.suptitle(
        f"Per-sequence log-probs from logits, {machine.device}, {machine.threads} CPU threads, torch {machine.torch}, "
        f"commit {machine.commit}, {machine.date[:10]}",
        fontsize=10,
    )
    figure.savefig(path)


def _colour_index(name: str, names: Sequence[str]) -> int:
    known = list(PROVIDERS)
    return known.index(name) if name in known else len(known) + names.index(name)


def _case_title(case: Case) -> str:
    return (
        f"{case.sequences} x {case.tokens} tokens\nvocabulary {case.vocab}\n"
        f"{DTYPE_NAMES[case.dtype]}, {case.scored_percent}% scored"
    )


def _chart(axes: Axes, results: Sequence[Result], colours: dict[str, str]) -> None:
    heights = [r.time.p50 for r in results if r.time is not None]
    bars = axes.bar(range(len(results)), heights, width=0.78, color=[colours[r.entry.provider.name] for r in results])
    axes.bar_label(bars, labels=[f"{height:.3g}" for height in heights], fontsize=7, padding=1)
    if results:
        axes.axhline(results[0].floor_ms, color=FLOOR_COLOUR, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_xticks([])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    handles: list[Patch | Line2D] = [Patch(color=colour, label=label) for label, colour in colours.items()]
    floor = Line2D(
        [], [], color=FLOOR_COLOUR, linewidth=1.1, linestyle=(0, (4, 2)), label="floor: counted bytes at copy bandwidth"
    )
    figure.legend(
        handles=[*handles, floor], loc="outside lower center", ncols=len(handles) + 1, fontsize=8.5, frameon=False
    )
