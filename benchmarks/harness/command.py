"""The command line that all benchmarks share, and the loop over the cases."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from harness import report
from harness.ceilings import Ceilings
from harness.family import OURS, Case, Family
from harness.machine import REPOSITORY, Machine, describe_machine
from harness.records import FAILED, WRONG, Record, read_csv, still_valid, write_csv
from harness.runner import Run, run_case
from harness.timing import Budget

QUICK_BUDGET = Budget(seconds=0.0, min_rounds=2, max_rounds=2)
BUDGETS = {
    "cpu": Budget(seconds=1.5, min_rounds=3, max_rounds=12),
    "cuda": Budget(seconds=2.0, min_rounds=10, max_rounds=100),
}
SHORT_ROUNDS = 3  # of a run that --seconds makes shorter
BAD_RESULT, NOT_FINISHED = 1, 3  # exit codes; argparse exits with 2


def parse_arguments(family: Family, argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The options, with the cases to run as `grid` and the providers as `chosen`; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a grid small enough for a test; its timings mean nothing")
    parser.add_argument("--cases", metavar="PART,...", help="only cases whose name has one of these parts")
    parser.add_argument("--providers", metavar="NAME,...", help=f"only these, of: {', '.join(family.providers)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: as PyTorch chooses)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the cases of an earlier run of the same code, versions and machine, and run the others",
    )
    parser.add_argument(
        "--minutes", type=float, help=f"start no case after so long; with cases left the exit code is {NOT_FINISHED}"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="time each pass of a case for so long, all its providers together (default: "
        + ", ".join(f"{b.seconds:g} on {name}" for name, b in BUDGETS.items())
        + f"), at least {SHORT_ROUNDS} rounds",
    )
    parser.add_argument("--redraw", action="store_true", help="run nothing: draw the pictures from the CSV again")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for {family.name}.csv and its pictures (default: benchmarks/results/DEVICE for the full grid "
        "with every provider, runs/bench/DEVICE for a part of it)",
    )
    arguments = parser.parse_args(argv)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes}")
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds must be above 0, got {arguments.seconds}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    grid = family.grids["quick" if arguments.quick else arguments.device]
    arguments.grid = [case for case in grid if _wanted(case, arguments.cases)]
    if not arguments.grid:
        parser.error(
            f"--cases {arguments.cases}: no case has that in its name; there are {', '.join(c.name for c in grid)}"
        )
    names = list(family.providers) if arguments.providers is None else arguments.providers.split(",")
    unknown = [name for name in names if name not in family.providers]
    if unknown:
        parser.error(f"--providers {','.join(unknown)}: unknown; there are {', '.join(family.providers)}")
    arguments.chosen = [family.providers[name] for name in names]
    return arguments


def _wanted(case: Case, parts: str | None) -> bool:
    return parts is None or any(part in case.name for part in parts.split(","))


def _output_folder(arguments: argparse.Namespace, machine: Machine) -> Path:
    if arguments.output is not None:
        return Path(arguments.output)
    partial = arguments.quick or arguments.cases is not None or arguments.providers is not None
    return REPOSITORY / ("runs/bench" if partial else "benchmarks/results") / machine.slug


def _measure(family: Family, arguments: argparse.Namespace, machine: Machine, csv: Path) -> tuple[list[Record], int]:
    """Run the cases, printing each as it ends and writing the file; the records, and how many cases are left."""
    device = torch.device(arguments.device)
    earlier = read_csv(csv) if arguments.resume and csv.exists() else []
    kept = {c.name: still_valid(earlier, family, c, arguments.chosen, device, machine) for c in arguments.grid}
    budget = QUICK_BUDGET if arguments.quick else BUDGETS[device.type]
    if arguments.seconds is not None:
        budget = Budget(arguments.seconds, min(SHORT_ROUNDS, budget.min_rounds), budget.max_rounds)
    ceilings = Ceilings(device, arguments.quick)
    run = Run(family, arguments.chosen, device, machine, ceilings, budget)
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    done: dict[str, list[Record]] = {name: records for name, records in kept.items() if records}
    if done:
        print(f"kept from {csv}: {len(done)} of {len(arguments.grid)} cases")
    shown_unavailable = False
    for case in arguments.grid:
        if case.name in done:
            continue
        if deadline is not None and time.monotonic() > deadline:
            break
        done[case.name] = run_case(run, case)
        if not shown_unavailable:
            print(report.unavailable(done[case.name]))
            shown_unavailable = True
        write_csv(csv, _in_order(arguments.grid, done))
        print(report.case_table(family, done[case.name]), flush=True)
    return _in_order(arguments.grid, done), len(arguments.grid) - len(done)


def _in_order(grid: Sequence[Case], done: dict[str, list[Record]]) -> list[Record]:
    return [record for case in grid for record in done.get(case.name, [])]


def main(family: Family, argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run a benchmark with the arguments of a command line (default: this process's) and return the exit code.

    1 if ours is wrong or fails; 3 if --minutes left cases; else 0.
    """
    arguments = parse_arguments(family, argv, description)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    machine = describe_machine(torch.device(arguments.device))
    folder = _output_folder(arguments, machine)
    csv = folder / f"{family.name}.csv"
    if arguments.redraw:
        return _draw(family, read_csv(csv), folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(report.heading(family, machine), end="\n\n")
    print(report.legend(family, arguments.device), flush=True)
    records, left = _measure(family, arguments, machine, csv)
    print("", report.summary(records), f"written: {csv}", sep="\n")
    _draw(family, records, folder)
    if left:
        print(f"not finished: {left} cases left after {arguments.minutes:g} minutes; run again with --resume")
    bad = [r for r in records if r.provider.startswith(OURS) and r.status in (WRONG, FAILED)]
    return BAD_RESULT if bad else NOT_FINISHED if left else 0


def _draw(family: Family, records: Sequence[Record], folder: Path) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return 0
    from harness.plot import write_plots

    for path in write_plots(folder, family, records):
        print(f"written: {path}")
    return 0
