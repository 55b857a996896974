"""Tables of results as CSV files, and where they are kept."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
# Options that change nothing that is learned, but by rounding.
HOW = ("runs_dir", "output", "only", "jobs", "no_checkpoints", "run", "trl_micro_batch")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that share their columns; floats with six significant digits, so that rounding is not a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what was seen in a run as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(record) + "\n")
    unfinished.replace(path)


def describe_options(options: argparse.Namespace) -> dict[str, str]:
    """Options of a command line for a record: files by their names, wherever they were; not how and where it runs."""
    given = {name: value for name, value in vars(options).items() if value is not None and name not in HOW}
    return {name: value.name if isinstance(value, Path) else str(value) for name, value in given.items()}


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
