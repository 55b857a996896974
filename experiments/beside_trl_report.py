"""Table and figure of the experiment beside TRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import BLUE, GREEN, VERMILLION, finish_panel, new_figure, save
from experiments.tables import write_csv

COLOURS = {"dil lsif": BLUE, "dil dpo": GREEN, "trl dpo": VERMILLION}
PANELS = (
    ("margin", "Held-out margin", "log ratio a token, chosen - rejected"),
    ("accuracy", "Held-out accuracy", "share of pairs"),
    ("chosen_logp", "Chosen responses", "log-prob a token, nats"),
    ("rejected_logp", "Rejected responses", "log-prob a token, nats"),
)


def write_report(records: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Write summary.csv, curves.csv, curves.png and environment.txt, and print the summary."""
    rows = [summary(record) for record in records]
    write_csv(output / "summary.csv", rows)
    curves = [{"arm": record["arm"], **entry} for record in records for entry in record["held_out"]]
    write_csv(output / "curves.csv", curves)
    (output / "environment.txt").write_text(records[0]["environment"].rstrip() + "\n")
    figure = new_figure(10, 6.4)
    for axes, (metric, title, label) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for record in records:
            steps = [entry["step"] for entry in record["held_out"]]
            values = [entry[metric] for entry in record["held_out"]]
            axes.plot(steps, values, color=COLOURS[record["arm"]], label=record["arm"], marker="o", markersize=3)
        finish_panel(axes, title, "optimizer step", label)
    figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, output / "curves.png")
    for row in rows:
        cells = (f"{name}={value:.4g}" for name, value in row.items() if name != "arm")
        print(f"{row['arm']:<10}{'  '.join(cells)}")


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What one arm came to at the largest held-out margin, and what a step cost."""
    best = max(record["held_out"], key=lambda entry: entry["margin"])
    start = record["held_out"][0]
    return {
        "arm": record["arm"],
        "steps": record["steps"],
        "best_step": best["step"],
        "margin": best["margin"],
        "accuracy": best["accuracy"],
        "chosen_logp_change": best["chosen_logp"] - start["chosen_logp"],
        "rejected_logp_change": best["rejected_logp"] - start["rejected_logp"],
        "seconds_per_step": record["seconds_per_step"],
        "tokens_per_second": record["tokens_per_second"],
        "peak_gb": record["peak_bytes"] / 1e9,
    }
