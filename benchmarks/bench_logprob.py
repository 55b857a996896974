"""Time per-sequence log-probs from logits, forward and forward+backward, beside the other ways to compute them.

    python benchmarks/bench_logprob.py                   # the full grid of this machine's device
    python benchmarks/bench_logprob.py --quick           # seconds; to see that it works
    python benchmarks/bench_logprob.py --cases bf16 --providers dil_kernels,authors

Every provider is first checked against an fp64 oracle on the inputs that are timed; one that is wrong is reported and
not timed. Exits with 1 if dil_kernels is wrong or fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from harness import report
from harness.cases import QUICK_GRID, Case, default_grid
from harness.machine import Copy, describe_machine
from harness.providers import OURS, PROVIDERS, Provider
from harness.runner import FAILED, WRONG, Result, run_case
from harness.timing import Budget

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK_BUDGET = Budget(seconds=0.0, min_rounds=2, max_rounds=2)
BUDGETS = {
    "cpu": Budget(seconds=2.5, min_rounds=3, max_rounds=12),
    "cuda": Budget(seconds=2.0, min_rounds=10, max_rounds=100),
}


def parse_arguments(argv: Sequence[str] | None, providers: dict[str, Provider]) -> argparse.Namespace:
    """The options, with the cases to run as `grid` and the providers as `chosen`; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a grid small enough for a test; its timings mean nothing")
    parser.add_argument("--cases", metavar="PART,...", help="only cases whose name has one of these parts")
    parser.add_argument("--providers", metavar="NAME,...", help=f"only these, of: {', '.join(providers)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: as PyTorch chooses)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for logprob.csv and logprob.png (default: benchmarks/results/DEVICE for the full grid with every "
        "provider, runs/bench/DEVICE for a part of it)",
    )
    arguments = parser.parse_args(argv)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    grid = QUICK_GRID if arguments.quick else default_grid(torch.device(arguments.device))
    arguments.grid = [case for case in grid if _wanted(case, arguments.cases)]
    if not arguments.grid:
        parser.error(
            f"--cases {arguments.cases}: no case has that in its name; there are {', '.join(c.name for c in grid)}"
        )
    names = list(providers) if arguments.providers is None else arguments.providers.split(",")
    unknown = [name for name in names if name not in providers]
    if unknown:
        parser.error(f"--providers {','.join(unknown)}: unknown; there are {', '.join(providers)}")
    arguments.chosen = [providers[name] for name in names]
    return arguments


def _wanted(case: Case, parts: str | None) -> bool:
    return parts is None or any(part in case.name for part in parts.split(","))


def _output_folder(arguments: argparse.Namespace, slug: str) -> Path:
    if arguments.output is not None:
        return Path(arguments.output)
    partial = arguments.quick or arguments.cases is not None or arguments.providers is not None
    return REPOSITORY / ("runs/bench" if partial else "benchmarks/results") / slug


def run(arguments: argparse.Namespace) -> list[Result]:
    """Run the cases, printing each as it ends, and write the files."""
    device = torch.device(arguments.device)
    machine = describe_machine(device)
    folder = _output_folder(arguments, machine.slug)
    folder.mkdir(parents=True, exist_ok=True)
    copy = Copy(device, small=arguments.quick)
    print(report.heading(machine), end="\n\n")
    print(report.legend(device.type), flush=True)
    results: list[Result] = []
    for case in arguments.grid:
        budget = QUICK_BUDGET if arguments.quick else BUDGETS[device.type]
        case_results = run_case(case, arguments.chosen, device, copy, budget)
        if not results:
            print(report.unavailable(dict.fromkeys(r.entry for r in case_results)))
        results += case_results
        report.write_csv(folder / "logprob.csv", results, machine)
        print(report.case_table(case, case_results), flush=True)
    print("", report.summary(results, OURS), f"written: {folder / 'logprob.csv'}", sep="\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
    elif any(r.time is not None for r in results):
        from harness.plot import write_plot

        write_plot(folder / "logprob.png", results, machine)
        print(f"written: {folder / 'logprob.png'}")
    return results


def main(argv: Sequence[str] | None = None, providers: dict[str, Provider] = PROVIDERS) -> int:
    """Run the benchmark with the arguments of a command line (default: this process's) and return the exit code."""
    arguments = parse_arguments(argv, providers)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results = run(arguments)
    bad = [r for r in results if r.entry.provider.name == OURS and r.entry.status in (WRONG, FAILED)]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
