"""The pictures, from the records: bars beside the floor, curves over a size, peak memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness.family import OURS, Family
from harness.records import OK, Record

OUR_COLOURS = ("#1b6ca8", "#5fa8d8")
COLOURS = ("#c0392b", "#e59866", "#7d8a97", "#3f9c6b", "#8fc9a5", "#b59f3b", "#8e6bb0", "#c3aedb", "#a0522d", "#d8a7b1")
MARKERS = "osD^vP*X<>hp"
FLOOR = {"color": "#111111", "linewidth": 1.1, "linestyle": (0, (4, 2))}
CASES_WITH_BARS = 6  # the first ones of a grid
CUT = 8  # bars of times end at so many times the shortest, so that the fast ones can be told apart
MIN_CURVE_POINTS = 3
CURVE_VALUES = {"share_of_floor": "floor / median (1 = at the floor)", "p50_ms": "milliseconds, median"}
LEAST_SHOWN = 0.001  # a microsecond, a kilobyte
TICK_RATIO = 1.12
AXIS_NAMES = {
    "vocab": "vocabulary V",
    "rows": "rows",
    "pairs": "pairs B",
    "tokens": "tokens T",
    "hidden_size": "hidden size D",
    "scored_percent": "scored share, %",
}

Value = Callable[[Record], "float | None"]


def write_plots(folder: Path, family: Family, records: Sequence[Record]) -> list[Path]:
    """Write NAME.png (time), NAME-memory.png and NAME-curves.png where it has something to show; their paths."""
    timed = [r for r in records if r.status == OK]
    if not timed:
        return []
    colours = _colours(timed)
    figures = {
        "": _bars(family, timed, colours, "milliseconds, median", lambda r: r.p50_ms, lambda r: r.floor_ms),
        "-memory": _bars(family, timed, colours, "peak MB held by tensors beside the inputs", _peak_mb, lambda r: None),
        "-curves": _curves(family, timed, colours),
    }
    paths = []
    for suffix, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{family.name}{suffix}.png")
            figure.savefig(paths[-1])
    return paths


def _peak_mb(record: Record) -> float | None:
    return None if record.peak_bytes is None else record.peak_bytes / 1e6


def _colours(records: Sequence[Record]) -> dict[str, str]:
    """Ours in blues, the others in the order of the providers."""
    names = list(dict.fromkeys(r.provider for r in records))
    ours = [name for name in names if name.startswith(OURS)]
    others = [name for name in names if not name.startswith(OURS)]
    return {name: OUR_COLOURS[i % len(OUR_COLOURS)] for i, name in enumerate(ours)} | {
        name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)
    }


def _headline(family: Family, record: Record, what: str) -> str:
    machine = record.machine
    driver = f", driver {machine.driver}" if machine.driver else f", {machine.cpu_threads} CPU threads"
    return (
        f"{family.title}: {what}\n{machine.device}{driver}, torch {machine.torch}, commit {machine.commit}, "
        f"{machine.date[:10]}"
    )


def _bars(
    family: Family, records: Sequence[Record], colours: dict[str, str], unit: str, value: Value, floor: Value
) -> Figure:
    """A row a case, a column a pass, a bar a provider."""
    cases = list(dict.fromkeys(r.case for r in records))[:CASES_WITH_BARS]
    shown = [[[r for r in records if (r.case, r.pass_name) == (c, p.name)] for p in family.passes] for c in cases]
    heights = [max(len(panel) for panel in row) for row in shown]
    figure = Figure(figsize=(12, 1.5 + sum(0.22 * n + 0.5 for n in heights)), layout="constrained", dpi=130)
    grid = figure.subplots(
        len(cases), len(family.passes), squeeze=False, height_ratios=[0.22 * n + 0.3 for n in heights]
    )
    for axes_row, panels in zip(grid, shown, strict=True):
        for axes, panel, timed in zip(axes_row, panels, family.passes, strict=True):
            _bar_panel(axes, panel, colours, value, floor)
            if panel:
                axes.set_title(f"{timed.name}: {panel[0].title}", fontsize=8, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel(unit, fontsize=9)
    if floor(records[0]) is not None:
        line = Line2D(
            [], [], label="floor: what cannot be avoided, at the machine's measured rate;  \u00bb bar cut", **FLOOR
        )
        figure.legend(handles=[line], loc="outside lower right", fontsize=9, frameon=False)
    figure.suptitle(_headline(family, records[0], unit), fontsize=10.5, x=0.01, ha="left")
    return figure


def _bar_panel(axes: Axes, records: Sequence[Record], colours: dict[str, str], value: Value, floor: Value) -> None:
    drawn = [r for r in records if value(r) is not None]
    values = [value(r) or 0.0 for r in drawn]
    limit = floor(drawn[0]) if drawn else None
    cut = max(values, default=1.0) if limit is None else CUT * min(values)
    widths = [min(v, cut) for v in values]
    bars = axes.barh(range(len(drawn)), widths, height=0.74, color=[colours[r.provider] for r in drawn])
    labels = [_short(v) if v <= cut else f"{_short(v)} \u00bb" for v in values]
    axes.bar_label(bars, labels=labels, fontsize=8, padding=3)
    axes.set_yticks(range(len(drawn)), [r.label for r in drawn], fontsize=8)
    axes.invert_yaxis()
    if limit is not None:
        axes.axvline(limit, **FLOOR)
    axes.set_xlim(0, 1.13 * max([*widths, limit or 0.0], default=1.0) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(axis="x", labelsize=8, length=2)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}" if number >= LEAST_SHOWN else f"<{LEAST_SHOWN}"


def _curves(family: Family, records: Sequence[Record], colours: dict[str, str]) -> Figure | None:
    """A row a size that the grid varies alone, a column a pass: share of the floor, or time, of each provider."""
    chosen = {x: group for x in family.curves if (group := _longest_curve(family, records, x))}
    if not chosen:
        return None
    words = CURVE_VALUES[family.curve_value]
    figure = Figure(figsize=(12, 1.2 + 3.4 * len(chosen)), layout="constrained", dpi=130)
    grid = figure.subplots(len(chosen), len(family.passes), squeeze=False)
    for axes_row, (x, group) in zip(grid, chosen.items(), strict=True):
        for axes, timed in zip(axes_row, family.passes, strict=True):
            panel = [r for r in group if r.pass_name == timed.name]
            _curve_panel(axes, panel, x, family.curve_value, colours)
            axes.set_title(f"{timed.name}: {family.curves[x].format(**group[0].columns)}", fontsize=9, loc="left")
        axes_row[0].set_ylabel(words, fontsize=9)
    labels = {r.provider: r.label for r in records}
    lines = [
        Line2D([], [], color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5, label=labels[name])
        for i, (name, colour) in enumerate(colours.items())
    ]
    lines.append(Line2D([], [], label="floor", **FLOOR))
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5), fontsize=9, frameon=False)
    figure.suptitle(_headline(family, records[0], words), fontsize=10.5, x=0.01, ha="left")
    return figure


def _longest_curve(family: Family, records: Sequence[Record], x: str) -> list[Record]:
    """The records whose cases differ in x alone, of the most values of x; none if those are too few for a curve."""
    groups: dict[object, list[Record]] = defaultdict(list)
    for record in records:
        groups[family.curves[x].format(**record.columns)].append(record)
    longest = max(groups.values(), key=lambda group: len({r.columns[x] for r in group}))
    return longest if len({r.columns[x] for r in longest}) >= MIN_CURVE_POINTS else []


def _ticks(values: Sequence[int]) -> list[int]:
    """Those that can be labelled without touching each other on a logarithmic axis."""
    kept: list[int] = []
    for value in values:
        if not kept or value >= TICK_RATIO * kept[-1]:
            kept.append(value)
    return kept


def _curve_panel(axes: Axes, records: Sequence[Record], x: str, y: str, colours: dict[str, str]) -> None:
    for i, (name, colour) in enumerate(colours.items()):
        points = sorted((r.columns[x], getattr(r, y)) for r in records if r.provider == name)
        if points:
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.4
            )
    ticks = _ticks(sorted({int(r.columns[x]) for r in records}))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.tick_params(axis="x", labelsize=8, rotation=30)
    axes.tick_params(axis="y", labelsize=8)
    if y == "share_of_floor":
        axes.axhline(1.0, **FLOOR)
        axes.set_ylim(bottom=0)
    else:
        floors = sorted({r.columns[x]: r.floor_ms for r in records}.items())
        axes.plot(*zip(*floors, strict=True), **FLOOR)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(AXIS_NAMES.get(x, x), fontsize=9)
