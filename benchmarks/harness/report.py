"""What is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.check import MULTIPLE
from harness.family import OURS, Family
from harness.machine import Machine
from harness.records import OK, UNAVAILABLE, Record

WIDTH = 110
LABEL_WIDTH = 28


@dataclass(frozen=True)
class Column:
    """One column of the tables.

    Attributes:
        width: in characters, the blank before it not counted.
        text: of a timed record.
        words: for the legend; {errors}, {baseline} and {multiple} are filled in.
    """

    width: int
    text: Callable[[Record], str]
    words: str


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


COLUMNS = {
    "median ms": Column(
        10, lambda r: _ms(r.p50_ms), "on CUDA between two events, the queue kept full; on the CPU wall time"
    ),
    "p20 - p80": Column(17, lambda r: f"{_ms(r.p20_ms)} - {_ms(r.p80_ms)}", "of the same samples"),
    "host ms": Column(
        9, lambda r: _ms(r.host_ms), "until the call has returned to Python; on the CPU that is all of it"
    ),
    "launches": Column(
        9,
        lambda r: _number(r.launches, "d"),
        "on CUDA kernels, copies and fills; on the CPU operators dispatched, those inside others too",
    ),
    "GB/s": Column(8, lambda r: _number(r.gbps, ".1f"), "bytes counted, said above each table, over the median"),
    "TFLOP/s": Column(8, lambda r: _number(r.tflops, ".2f"), "FLOPs counted, said above each table, over the median"),
    "tokens/s": Column(
        10,
        lambda r: _number(r.p50_ms and int(r.columns["tokens"]) / r.p50_ms * 1e3, ".0f"),
        "tokens of prompts and responses, padding not counted, over the median",
    ),
    "of floor": Column(
        9,
        lambda r: _number(r.share_of_floor, ".0%"),
        "floor over median; the floor is the time of the counted bytes at the rate of a large Tensor.copy_ (read plus "
        "written), or of the counted FLOPs at that of a large torch.mm if longer, both timed in the same rounds",
    ),
    "x baseline": Column(11, lambda r: _number(r.speedup, ".2f"), "how many times faster than {baseline}"),
    "max error": Column(
        10,
        lambda r: _number(r.max_error, ".1e"),
        "against fp64; {errors}; {multiple} times that of eager PyTorch in the same dtype is allowed",
    ),
    "peak MB": Column(
        9,
        lambda r: _number(None if r.peak_bytes is None else r.peak_bytes / 1e6, ".1f"),
        "most bytes held by tensors at a time during a call, beside its inputs; 1 MB = 1e6 bytes",
    ),
}


def heading(family: Family, machine: Machine) -> str:
    """What was run, on what."""
    driver = f", driver {machine.driver}" if machine.driver else ""
    return "\n".join(
        (
            family.title,
            f"device    {machine.device}{driver}, {machine.cpu_threads} CPU threads",
            f"versions  torch {machine.torch}, triton {machine.triton}, dil_kernels {machine.dil_kernels}, "
            f"commit {machine.commit}, source {machine.source}",
        )
    )


def legend(family: Family, device_type: str) -> str:
    """How to read the tables."""
    words = {"errors": family.error_words, "baseline": family.baseline_words, "multiple": MULTIPLE}
    lines = []
    for name in family.columns:
        lines += textwrap.wrap(
            f"{name:<12}{COLUMNS[name].words.format(**words)}",
            WIDTH,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
    if device_type == "cpu":
        lines.append(
            "Results go to fresh buffers on each call, as for a user; on a CPU that includes their page faults."
        )
    return "\n".join(lines)


def unavailable(records: Iterable[Record]) -> str:
    """Who is not run here and why, a line each."""
    lines = dict.fromkeys(f"not run    {r.provider}: {r.reason}" for r in records if r.status == UNAVAILABLE)
    return "\n".join(lines)


def case_table(family: Family, records: Sequence[Record]) -> str:
    """Of the records of one case: one table a pass."""
    lines = ["", "=" * WIDTH, f"{records[0].title}   [{records[0].case}]"]
    for timed in family.passes:
        mine = [r for r in records if r.pass_name == timed.name]
        lines += ["", *_counted(mine[0]), _line("provider", list(family.columns), family), "-" * WIDTH]
        for record in mine:
            if record.status == OK:
                lines.append(_line(record.label, [COLUMNS[name].text(record) for name in family.columns], family))
            elif record.status != UNAVAILABLE:
                lines.append(f"{record.label:<{LABEL_WIDTH}} not timed, {record.status}: {record.reason}"[:WIDTH])
    return "\n".join(lines)


def _counted(record: Record) -> list[str]:
    flops = "" if record.flops is None else f" and {record.flops / 1e9:.3f} GFLOP"
    lines = textwrap.wrap(
        f"{record.pass_name}: {record.bytes / 1e6:.3f} MB{flops} counted ({record.counted})",
        WIDTH,
        subsequent_indent="  ",
    )
    if record.floor_ms is not None and record.copy_gbps is not None:
        gemm = "" if record.gemm_tflops is None else f" and the {record.gemm_tflops:.2f} TFLOP/s of a GEMM"
        lines.append(
            f"floor {_ms(record.floor_ms)} ms, at the {record.copy_gbps:.1f} GB/s of a copy{gemm} in the same rounds"
        )
    return lines


def _line(label: str, texts: Sequence[str], family: Family) -> str:
    cells = [f"{text:>{COLUMNS[name].width}}" for name, text in zip(family.columns, texts, strict=True)]
    return " ".join([f"{label:<{LABEL_WIDTH}}", *cells])


def summary(records: Sequence[Record]) -> str:
    """A line a pass: ours beside the baseline and the floor, as ranges over the cases, and where another is ahead."""
    lines = []
    for timed in dict.fromkeys(r.pass_name for r in records):
        mine = [r for r in records if r.pass_name == timed and r.status == OK]
        ours = [r for r in mine if r.provider == OURS]
        shares = [r.share_of_floor for r in ours if r.share_of_floor is not None]
        speedups = [r.speedup for r in ours if r.speedup is not None]
        if not shares:
            continue
        faster = f"{min(speedups):.1f} to {max(speedups):.1f} times as fast as {ours[0].baseline}, " if speedups else ""
        lines.append(f"{timed:<17} {OURS}: {faster}{min(shares):.0%} to {max(shares):.0%} of the floor")
        lines += [f"{'':<17} {line}" for line in _ahead(ours, mine)]
    return "\n".join(lines)


def _ahead(ours: Sequence[Record], timed: Sequence[Record]) -> list[str]:
    """Where a provider that is not ours and does the whole work has the smaller median."""
    lines = []
    for own in ours:
        rivals = (r for r in timed if r.case == own.case and not r.provider.startswith(OURS))
        fastest = min((r for r in rivals if r.max_error is not None), key=lambda r: r.p50_ms or 0.0, default=None)
        if fastest is not None and fastest.p50_ms and own.p50_ms and fastest.p50_ms < own.p50_ms:
            lines.append(f"{fastest.label} is ahead in {own.case}: {_ms(fastest.p50_ms)} ms, ours {_ms(own.p50_ms)} ms")
    return lines or ["ahead of every other provider in every case"]
