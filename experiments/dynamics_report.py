"""Tables and figure of the training-dynamics experiment, from the records of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.dynamics_runs import ARMS, Arm, Settings, choose_learning_rate
from experiments.figures import colour_of, finish_panel, marker_of, new_figure, save
from experiments.tables import mean_and_sd, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]
METRICS = (
    "chosen_logp",
    "rejected_logp",
    "chosen_logratio",
    "rejected_logratio",
    "margin",
    "reward_accuracy",
    "likelihood_accuracy",
)
PANELS = (
    ("Chosen responses", "change of log-prob, nats a token", "chosen_logratio"),
    ("Rejected responses", "change of log-prob, nats a token", "rejected_logratio"),
    ("Margin", "chosen - rejected, nats a token", "margin"),
    ("Accuracy", "pairs with the chosen one likelier, %", "likelihood_accuracy"),
)


def write_report(runs_dir: Path, output: Path, settings: Settings) -> None:
    """Write what the finished runs in a folder show.

    Raises:
        ValueError: no run that is reported has finished.
    """
    records = [json.loads(path.read_text()) for path in sorted(runs_dir.glob("*_seed_*.json"))]
    order = [arm.name for arm in ARMS]
    records.sort(key=lambda record: (order.index(record["arm"]), record["learning_rate"], record["seed"]))
    tuning = [record for record in records if record["tuning"]]
    rates = {arm.name: _chosen_rate(tuning, arm, settings) for arm in ARMS}
    # Others are left from another grid.
    runs = [record for record in records if not record["tuning"] and record["learning_rate"] == rates[record["arm"]]]
    if not runs:
        raise ValueError(f"{runs_dir} holds no finished run")
    write_csv(output / "training_dynamics.csv", [row for record in runs for row in _curve_rows(record)])
    write_csv(output / "training_dynamics_tuning.csv", [_tuning_row(record) for record in tuning])
    write_csv(output / "training_dynamics_summary.csv", summarise(runs))
    _draw(runs, tuning, output / "training_dynamics.png")


def _chosen_rate(tuning: Records, arm: Arm, settings: Settings) -> float | None:
    grid = [r for r in tuning if r["arm"] == arm.name and r["learning_rate"] in settings.learning_rates]
    return choose_learning_rate(grid) if grid else None


def _curve_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = {name: record[name] for name in ("arm", "learning_rate", "seed")}
    points = [{name: point[name] for name in ("step", *METRICS)} for point in record["held_out"]]
    points[0]["reward_accuracy"] = ""  # every margin is 0 before training
    return [columns | point for point in points]


def _tuning_row(record: Mapping[str, Any]) -> dict[str, Any]:
    columns = ("arm", "learning_rate", "seed", "initial_gradient_norm", "seconds")
    return {name: record[name] for name in columns} | {f"validation_{m}": record["validation"][m] for m in METRICS}


def summarise(runs: Records) -> list[dict[str, Any]]:
    """Each loss at its last step: mean and standard deviation over seeds of every metric on the held-out pairs."""
    rows = []
    for name in dict.fromkeys(record["arm"] for record in runs):
        group = [record for record in runs if record["arm"] == name]
        row = {"arm": name, "learning_rate": group[0]["learning_rate"], "seeds": len(group)}
        row["step"] = group[0]["held_out"][-1]["step"]
        for metric in METRICS:
            mean, sd = mean_and_sd([record["held_out"][-1][metric] for record in group])
            row |= {metric: mean, f"{metric}_sd": sd}
        rows.append(row)
    return rows


def _draw(runs: Records, tuning: Records, path: Path) -> None:
    """Curves over steps with their range over seeds; chosen log-prob over margin, and over learning rate."""
    from matplotlib.ticker import ScalarFormatter

    figure = new_figure(13.5, 7.4)
    *panels, plane, over_rates = figure.subplots(2, 3).flat
    arms = [arm for arm in ARMS if any(record["arm"] == arm.name for record in runs)]
    for axes, (title, label, metric) in zip(panels, PANELS, strict=True):
        for arm in arms:
            _draw_curve(axes, arm, runs, metric)
        finish_panel(axes, title, "optimizer step", label)
    for arm in arms:
        margin, _, _ = _over_seeds(runs, arm, "margin")
        chosen, low, high = _over_seeds(runs, arm, "chosen_logratio")
        plane.plot(margin, chosen, **_style(arm))
        plane.fill_between(margin, low, high, color=colour_of(arm.loss_type), alpha=0.12, linewidth=0)
        trials = [record for record in tuning if record["arm"] == arm.name]
        over_rates.plot(
            [record["learning_rate"] for record in trials],
            [record["validation"]["chosen_logratio"] for record in trials],
            **_style(arm),
        )
    over_rates.set_xscale("log")
    over_rates.set_yscale("symlog", linthresh=0.5, base=2)
    over_rates.yaxis.set_major_formatter(ScalarFormatter())
    steps = len(tuning[0]["train_loss"])
    finish_panel(over_rates, f"Chosen responses after {steps} steps, validation", "learning rate (AdamW)", PANELS[0][1])
    finish_panel(plane, "Chosen log-prob at the same margin", "margin, nats a token", PANELS[0][1])
    for axes in (panels[0], plane, over_rates):
        axes.axhline(0.0, color="0.4", linewidth=0.8)
    handles, labels = plane.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save(figure, path)


def _draw_curve(axes: Axes, arm: Arm, runs: Records, metric: str) -> None:
    scale = 100.0 if metric.endswith("accuracy") else 1.0
    steps, _, _ = _over_seeds(runs, arm, "step")
    mean, low, high = ([scale * value for value in values] for values in _over_seeds(runs, arm, metric))
    axes.plot(steps, mean, **_style(arm))
    axes.fill_between(steps, low, high, color=colour_of(arm.loss_type), alpha=0.12, linewidth=0)


def _over_seeds(runs: Records, arm: Arm, metric: str) -> tuple[list[float], list[float], list[float]]:
    """Mean, least and greatest over seeds of a metric, at each evaluation."""
    curves = [[point[metric] for point in record["held_out"]] for record in runs if record["arm"] == arm.name]
    points = list(zip(*curves, strict=True))
    return [sum(p) / len(p) for p in points], [min(p) for p in points], [max(p) for p in points]


def _style(arm: Arm) -> dict[str, Any]:
    plain = arm.alpha == 0.0 and arm.average_log_prob
    return {
        "label": arm.name,
        "color": colour_of(arm.loss_type),
        "marker": marker_of(arm.loss_type),
        "markersize": 5,
        "markerfacecolor": None if plain else "white",
        "linestyle": "-" if plain else "--",
        "linewidth": 1.6,
    }
