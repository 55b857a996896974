"""What is printed and the CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness.cases import DTYPE_NAMES, PASSES, Case
from harness.check import MULTIPLE
from harness.machine import Machine
from harness.runner import UNAVAILABLE, Entry, Result

WIDTH = 110
COLUMNS = "{:<22} {:>10} {:>19} {:>9} {:>9} {:>11} {:>11} {:>11}"
HEADER = COLUMNS.format("provider", "median ms", "p20 - p80", "GB/s", "of copy", "x authors", "max error", "peak MB")


def heading(machine: Machine) -> str:
    """What was run, on what."""
    return "\n".join(
        (
            "Per-sequence log-probs from logits [sequences, tokens, vocabulary]",
            f"device    {machine.device}, {machine.threads} CPU threads",
            f"versions  torch {machine.torch}, triton {machine.triton}, dil_kernels {machine.dil_kernels}, "
            f"commit {machine.commit}",
        )
    )


def legend(device_type: str) -> str:
    """How to read the tables."""
    lines = [
        "forward    without asking for a gradient, as a reference model is scored",
        "GB/s       bytes that no implementation can avoid, said above each table, over the median time",
        "of copy    that over the bandwidth of a large Tensor.copy_ (bytes read plus written) timed in the same rounds",
        "x authors  how many times faster than the authors' way (fp32 log_softmax over every row of a slice)",
        "max error  against fp64; forward: of a sequence's log-prob, relative; forward+backward: of a gradient",
        f"           element, relative to it + |upstream|/V; {MULTIPLE} times eager PyTorch's in that dtype is allowed",
        "peak MB    most bytes held by tensors at a time during a call, beside its inputs (1 MB = 1e6 bytes)",
    ]
    if device_type == "cpu":
        lines.append(
            "Gradients go to a fresh buffer on each call, as for a user; on a CPU that includes its page faults."
        )
    return "\n".join(lines)


def unavailable(entries: Iterable[Entry]) -> str:
    """Who is not run here and why, a line each."""
    return "\n".join(f"not run    {e.provider.name}: {e.reason}" for e in entries if e.status == UNAVAILABLE)


def case_table(case: Case, results: Sequence[Result]) -> str:
    """One table a pass."""
    lines = [
        "",
        "=" * WIDTH,
        f"{case.sequences} x {case.tokens} tokens, vocabulary {case.vocab}, {DTYPE_NAMES[case.dtype]}: "
        f"{case.scored_rows} of {case.rows} rows scored   [{case.name}]",
    ]
    for timed in PASSES:
        mine = [r for r in results if r.timed is timed]
        megabytes = timed.bytes_counted(case) / 1e6
        lines += [
            "",
            f"{timed.name}: {megabytes:.1f} MB counted ({timed.words})",
            f"floor {mine[0].floor_ms:.3f} ms, at the {mine[0].copy_gbps:.1f} GB/s of a copy in the same rounds",
            HEADER,
            "-" * WIDTH,
        ]
        lines += [_line(r) for r in mine if r.entry.status != UNAVAILABLE]
    return "\n".join(lines)


def _line(result: Result) -> str:
    if result.time is None or result.gbps is None or result.share_of_copy is None or result.error is None:
        return f"{result.entry.label:<22} not timed, {result.entry.status}: {result.entry.reason}"[:WIDTH]
    time = result.time
    return COLUMNS.format(
        result.entry.label,
        f"{time.p50:.3f}",
        f"{time.p20:.3f} - {time.p80:.3f}",
        f"{result.gbps:.1f}",
        f"{result.share_of_copy:.0%}",
        "" if result.ratio is None else f"{result.ratio:.2f}",
        f"{result.error:.1e}",
        "" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.1f}",
    )


def write_csv(path: Path, results: Sequence[Result], machine: Machine) -> None:
    """One row a case, provider and pass; a figure that was not measured is an empty field."""
    rows = [dict(_fields(result, machine)) for result in results]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _fields(result: Result, machine: Machine) -> Iterator[tuple[str, object]]:
    case, entry, time = result.case, result.entry, result.time
    p20, p50, p80 = (time.p20, time.p50, time.p80) if time else (None, None, None)
    yield "case", case.name
    yield "sequences", case.sequences
    yield "tokens", case.tokens
    yield "vocab", case.vocab
    yield "dtype", DTYPE_NAMES[case.dtype]
    yield "scored_percent", case.scored_percent
    yield "rows", case.rows
    yield "scored_rows", case.scored_rows
    yield "provider", entry.provider.name
    yield "provider_label", entry.label
    yield "provider_version", entry.version
    yield "pass", result.timed.name
    yield "status", entry.status
    yield "reason", entry.reason
    yield "p20_ms", _number(p20)
    yield "p50_ms", _number(p50)
    yield "p80_ms", _number(p80)
    yield "samples", time.samples if time else ""
    yield "bytes", result.timed.bytes_counted(case)
    yield "bytes_in_words", result.timed.words
    yield "gbps", _number(result.gbps)
    yield "copy_gbps", _number(result.copy_gbps)
    yield "floor_ms", _number(result.floor_ms)
    yield "share_of_copy", _number(result.share_of_copy)
    yield "times_faster_than_authors", _number(result.ratio)
    yield "max_error", _number(result.error)
    yield "max_error_allowed", _number(result.error_allowed)
    yield "peak_bytes", "" if result.peak_bytes is None else result.peak_bytes
    yield "device", machine.device
    yield "cpu_threads", machine.threads
    yield "torch", machine.torch
    yield "triton", machine.triton
    yield "dil_kernels", machine.dil_kernels
    yield "commit", machine.commit
    yield "date", machine.date


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def summary(results: Sequence[Result], ours: str) -> str:
    """A line a pass: ours beside the authors' way and the copy, as ranges over the cases."""
    lines = []
    for timed in PASSES:
        mine = [r for r in results if r.timed is timed and r.entry.provider.name == ours and r.time is not None]
        shares = [r.share_of_copy for r in mine if r.share_of_copy is not None]
        ratios = [r.ratio for r in mine if r.ratio is not None]
        if shares:
            faster = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as the authors' way, " if ratios else ""
            lines.append(f"{timed.name:<16}  {ours}: {faster}{min(shares):.0%} to {max(shares):.0%} of copy bandwidth")
    return "\n".join(lines)
