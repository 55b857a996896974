"""What was measured, one record a case, pass and provider; the CSV that holds them; what of an earlier run may stay."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from harness.family import Case, Family, Provider
from harness.machine import Machine

OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "unavailable"


@dataclass(frozen=True)
class Record:
    """One row of the CSV, in the order of its columns. What was not measured is None, an empty field."""

    case: str
    title: str
    columns: dict[str, int | str]  # the sizes of the case, a CSV column each
    provider: str
    label: str
    version: str
    pass_name: str
    status: str
    reason: str  # why it is not timed
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    samples: int | None
    host_ms: float | None  # median until the call returned; on the CPU that is all of it
    launches: int | None
    bytes: int
    flops: int | None
    counted: str  # these bytes and FLOPs in words
    copy_gbps: float | None  # of the machine, measured in the same rounds
    gemm_tflops: float | None  # likewise
    floor_ms: float | None
    share_of_floor: float | None
    baseline: str
    speedup: float | None  # time of the baseline over this time
    max_error: float | None
    max_error_allowed: float | None
    peak_bytes: int | None
    machine: Machine

    @property
    def gbps(self) -> float | None:
        """Bytes counted per second of the median, in 1e9."""
        return None if self.p50_ms is None else self.bytes / self.p50_ms / 1e6

    @property
    def tflops(self) -> float | None:
        """FLOPs counted per second of the median, in 1e12."""
        return None if self.p50_ms is None or self.flops is None else self.flops / self.p50_ms / 1e9


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _row(record: Record) -> dict[str, str]:
    row: dict[str, str] = {}
    for field in fields(Record):
        value = getattr(record, field.name)
        nested = asdict(value) if isinstance(value, Machine) else value
        row |= {k: _text(v) for k, v in nested.items()} if isinstance(nested, dict) else {field.name: _text(nested)}
    return row


def _parse(text: str, annotation: str) -> object:
    if text == "" and "None" in annotation:
        return None
    if annotation.startswith("float"):
        return float(text)
    return int(text) if annotation.startswith("int") else text


def _record(row: dict[str, str]) -> Record:
    machine = Machine(**{f.name: _parse(row[f.name], str(f.type)) for f in fields(Machine)})
    own = {f.name: str(f.type) for f in fields(Record) if f.name not in ("columns", "machine")}
    known = own.keys() | {f.name for f in fields(Machine)}
    columns = {name: int(text) if text.isdigit() else text for name, text in row.items() if name not in known}
    values = {name: _parse(row[name], annotation) for name, annotation in own.items()}
    return Record(columns=columns, machine=machine, **values)


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Replace the file at once, so that a run that is stopped leaves a whole one."""
    rows = [_row(record) for record in records]
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def read_csv(path: Path) -> list[Record]:
    """The records of a file that `write_csv` wrote; none of one with other columns, as an earlier version wrote."""
    needed = {f.name for cls in (Record, Machine) for f in fields(cls)} - {"columns", "machine"}
    with path.open(newline="") as file:
        return [_record(row) for row in csv.DictReader(file) if needed <= row.keys()]


def still_valid(
    records: Iterable[Record],
    family: Family,
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    machine: Machine,
) -> list[Record]:
    """The records of a case, if this run would measure the same code on the same machine again; else none.

    Device, driver, threads, versions and the digest of the sources must be the same; every chosen provider must be
    there in every pass, in the version it has now or unavailable for the same reason. A case stays whole or not at all,
    since its providers are compared within one run.
    """
    mine = [r for r in records if r.case == case.name]
    expected = set()
    for provider in providers:
        problem = provider.problem(device)
        version = provider.version() if problem is None else ""
        expected |= {(timed.name, provider.name, version, problem) for timed in family.passes}
    found = {(r.pass_name, r.provider, r.version, r.reason if r.status == UNAVAILABLE else None) for r in mine}
    same_machine = all(_setting(r.machine) == _setting(machine) for r in mine)
    return mine if found == expected and same_machine else []


def _setting(machine: Machine) -> dict[str, object]:
    return {name: value for name, value in asdict(machine).items() if name not in ("date", "commit")}
