"""What the checks share: command line, comparisons, problems of launches, planted faults, exit status."""

from __future__ import annotations

import argparse
import linecache
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ptxemu import runner
from ptxemu.memory import Problems

ARCHITECTURES = {80: (8, 0), 90: (9, 0), 100: (10, 0), 120: (12, 0)}

# Races that do no harm: warps that hold copies of few elements read what another one has overwritten, and their own
# results are discarded. By the kernel, and what stands on the line of the store.
BENIGN = {
    ("_logps_bwd_kernel", "tl.store(dx_ptr + edge, dx_edge"),
    ("_head_tile_kernel", "tl.store(state_ptr + 3 * R"),
    ("_head_rescale_kernel", "tl.store(row_ptr + offsets, h"),
}


# ---- planted faults: what the checks must find


def _wrong_value(ptx: str) -> str:
    return re.sub(r"\bsub\.(rn\.)?(f32|f64)\b", r"add.\1\2", ptx)


def _wrong_address(ptx: str) -> str:
    return re.sub(r"(\bst\.global\b[^\[]*\[\s*[%\w]+)\s*(?:\+\s*\d+)?\s*\]", r"\1+1073741824]", ptx)


def _no_barrier(ptx: str) -> str:
    return re.sub(r"^\s*(bar|barrier)\.sync\b.*$", "", ptx, flags=re.M)


PLANTS: dict[str, Callable[[str], str]] = {"value": _wrong_value, "address": _wrong_address, "race": _no_barrier}


def options(description: str) -> argparse.Namespace:
    """The command line of a check."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("arch", type=int, nargs="?", default=90, choices=ARCHITECTURES)
    parser.add_argument("--full", action="store_true", help="all shapes and dtypes: many minutes")
    parser.add_argument("--noise", type=int, help="seed of the errors of approximate instructions")
    parser.add_argument("--schedule", choices=("first", "last"), help="which warp runs ahead of the others")
    parser.add_argument("--plant", choices=PLANTS, help="a fault to put into the compiled code")
    return parser.parse_args()


def install(given: argparse.Namespace) -> runner.Executor:
    """Let Triton launch in the emulator, as the command line wants it."""
    executor = runner.Executor(given.noise, given.schedule, PLANTS.get(given.plant))
    return runner.install(given.arch, executor)


def source_line(where: str, files: Iterable[str]) -> str:
    """The text at "file.py:12"."""
    name, _, line = where.partition(":")
    path = next((file for file in files if file.endswith("/" + name)), "")
    return linecache.getline(path, int(line or 0)).strip()


class Check:
    """A run: what was launched and compared, and what was wrong with it."""

    def __init__(self, executor: runner.Executor | None, stop_early: bool, sources: Iterable[str] = ()) -> None:
        self.executor, self.stop_early, self.sources = executor, stop_early, list(sources)
        self.counts: Counter[Any] = Counter()
        self.worst: defaultdict[str, float] = defaultdict(float)
        self.benign: Counter[Any] = Counter()
        self.failures: list[str] = []

    def fail(self, text: str) -> None:
        """Note what is wrong; a run with a planted fault has then shown what it is for."""
        self.failures.append(text)
        if self.stop_early:
            self.finish()

    def launched(self, what: object) -> None:
        """Take the problems of the launches since the last time."""
        for record in self.executor.take() if self.executor else ():
            self.counts[record.kernel, "launches"] += 1
            self.counts[record.kernel, "programs"] += int(torch.tensor(record.grid).prod())
            self.problems(what, record.kernel, record.problems)

    def problems(self, what: object, kernel: str, problems: Problems) -> None:
        """Take the problems of one launch."""
        for (kind, where), count in problems.counts.items():
            line = source_line(where, self.sources)
            harmless = kind.startswith("race (write after read)") and any(
                kernel == name and line.startswith(text) for name, text in BENIGN
            )
            if harmless or kind.startswith("note"):
                self.benign[kernel, kind, line or where] += count
                continue
            first = next(str(problem) for problem in problems.items if problem.kind == kind)
            self.fail(f"{kernel}, {what}: {first} ({line}), {count} times")

    def close(self, what: object, name: str, actual: Tensor, truth: Tensor, rtol: float, atol: float) -> None:
        """Compare what was launched last with fp64 values; NaN and infinities must be the same ones."""
        self.launched(what)
        actual, truth = actual.double(), truth.double()
        same = (actual == truth) | (actual.isnan() & truth.isnan())
        error = torch.where(same, 0.0, (actual - truth).abs()) / (atol + rtol * truth.abs())
        bad = ~(same | (error <= 1.0))
        self.counts["values", name] += actual.numel()
        if (~bad).any():
            self.worst[name] = max(self.worst[name], error[~bad].nan_to_num(0.0).max().item())
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            found = f"{actual[index].item()} instead of {truth[index].item()}"
            self.fail(f"{name}, {what}: {int(bad.sum())} of {bad.numel()} values are wrong; at {index} {found}")

    def expect(self, what: object, condition: bool, text: str) -> None:
        """Fail unless the condition holds."""
        if not condition:
            self.fail(f"{what}: {text}")

    def finish(self) -> None:
        """Report, and exit: 0 only if something was compared and nothing was wrong."""
        for key, count in sorted(self.counts.items(), key=str):
            print(f"{count:10d}  {' '.join(key)}")
        print("worst error / tolerance:", {name: round(error, 3) for name, error in self.worst.items()})
        for key, count in self.benign.items():
            print(f"harmless: {count} x {' | '.join(key)}")
        for failure in self.failures[:25]:
            print("FAILED", failure)
        compared = sum(count for key, count in self.counts.items() if key[0] == "values")
        print(f"{compared} values compared, {len(self.failures)} failures")
        raise SystemExit(1 if self.failures or not compared else 0)
