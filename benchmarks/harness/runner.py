"""One case: check every provider, then time those that are right."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from harness.ceilings import Ceilings, Rates
from harness.check import allowed_errors, find_problem
from harness.family import Case, Errors, Family, Fn, Pass, Provider, WrongResultError
from harness.machine import Machine, last_cache_bytes
from harness.records import FAILED, OK, UNAVAILABLE, WRONG, Record
from harness.timing import Budget, Call, Quantiles, time_interleaved
from harness.trace import Trace, trace_call

# Inputs are rotated that together are this many times the last cache, so that no call finds its input there.
CACHE_MULTIPLE = 4
MAX_ROTATION = 512  # of inputs so small that launches cost more than bytes


@dataclass
class Entry:
    """A provider in a case, after its correctness check."""

    provider: Provider
    version: str
    status: str
    reason: str = ""
    fn: Fn | None = None
    errors: Errors = field(default_factory=dict)
    allowed: Errors = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What all cases of a run share."""

    family: Family
    providers: Sequence[Provider]
    device: torch.device
    machine: Machine
    ceilings: Ceilings
    budget: Budget


def run_case(run: Run, case: Case) -> list[Record]:
    """Records of every pass and provider, in the order of the passes and then of the providers."""
    try:
        inputs = run.family.make_inputs(case, run.device)
        entries = _check_all(run, case, inputs)
        _free(run.device)  # of the truth
        rotations = _rotations(run, case, entries, inputs)
    # A grid made for a large GPU must still run its other cases on a small one.
    except torch.OutOfMemoryError as error:
        entries = [Entry(p, p.version(), FAILED, f"inputs or truth: {_first_line(error)}") for p in run.providers]
        _free(run.device)
        return [_record(run, case, timed, entry) for timed in run.family.passes for entry in entries]
    records = []
    for timed in run.family.passes:
        records += _time_pass(run, case, timed, entries, rotations)
    return records


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _check_all(run: Run, case: Case, inputs: Any) -> list[Entry]:
    truth = run.family.make_truth(inputs)
    yardstick = run.family.measure_errors(run.family.yardstick, inputs, truth)
    entries = []
    for provider in run.providers:
        entries.append(_check(run, case, provider, inputs, truth, yardstick))
        _free(run.device)
    return entries


def _check(run: Run, case: Case, provider: Provider, inputs: Any, truth: Any, yardstick: Errors) -> Entry:
    problem = provider.problem(run.device)
    if problem is not None:
        return Entry(provider, "", UNAVAILABLE, problem)
    version = provider.version()
    try:
        fn = provider.build()
        if not provider.checked:
            return Entry(provider, version, OK, fn=fn)
        errors = run.family.measure_errors(fn, inputs, truth)
    except WrongResultError as error:
        return Entry(provider, version, WRONG, str(error))
    # A provider may fail in any way, for want of memory too; the others must still be measured.
    except Exception as error:
        return Entry(provider, version, FAILED, _first_line(error))
    allowed = allowed_errors(run.family, yardstick, provider, case.dtype)
    problem = find_problem(errors, allowed)
    return Entry(provider, version, OK if problem is None else WRONG, problem or "", fn, errors, allowed)


@dataclass(frozen=True)
class Rotations:
    """Equal inputs: some shared by providers that leave them alone, some for those that destroy them, if any."""

    shared: list[Any]
    private: list[Any]

    def of(self, provider: Provider) -> list[Any]:
        """Those that a provider is timed on."""
        return self.private if provider.destroys_inputs else self.shared


def _rotations(run: Run, case: Case, entries: Sequence[Entry], inputs: Any) -> Rotations:
    count = min(math.ceil(CACHE_MULTIPLE * last_cache_bytes(run.device) / case.rotated_bytes), MAX_ROTATION)
    shared = [inputs] + [run.family.fresh(inputs) for _ in range(count - 1)]
    destroyed = any(entry.provider.destroys_inputs for entry in entries if entry.status == OK)
    return Rotations(shared, [run.family.fresh(inputs) for _ in range(count)] if destroyed else [])


def _make_call(timed: Pass, fn: Fn, rotation: list[Any]) -> Call:
    return lambda i: timed.run(fn, rotation[i % len(rotation)])


def _time_pass(run: Run, case: Case, timed: Pass, entries: Sequence[Entry], rotations: Rotations) -> list[Record]:
    calls: dict[str, Call] = {}
    traces: dict[str, Trace] = {}
    for entry in entries:
        if entry.status != OK:
            continue
        assert entry.fn is not None
        name, call = entry.provider.name, _make_call(timed, entry.fn, rotations.of(entry.provider))
        try:
            traces[name] = trace_call(call, run.device)
        except Exception as error:  # what fits in memory during the check may not fit beside the rotated inputs
            entry.status, entry.reason = FAILED, _first_line(error)
            _free(run.device)
            continue
        calls[name] = call
    gemm_dtype = None if timed.flops_counted is None else case.dtype
    times = time_interleaved({**run.ceilings.calls(gemm_dtype), **calls}, run.device, run.budget)
    rates = run.ceilings.rates(times, gemm_dtype)
    return [_record(run, case, timed, entry, rates, times, traces) for entry in entries]


def _record(
    run: Run,
    case: Case,
    timed: Pass,
    entry: Entry,
    rates: Rates | None = None,
    times: Mapping[str, Quantiles] = MappingProxyType({}),
    traces: Mapping[str, Trace] = MappingProxyType({}),
) -> Record:
    family, name = run.family, entry.provider.name
    nbytes = timed.bytes_counted(case)
    flops = None if timed.flops_counted is None else timed.flops_counted(case)
    floor_ms = None if rates is None else rates.floor_ms(nbytes, flops)
    time, trace, baseline = times.get(name), traces.get(name), times.get(family.baseline)
    return Record(
        case=case.name,
        title=case.title,
        columns=case.columns,
        provider=name,
        label=name if entry.status == UNAVAILABLE else entry.provider.label_on(run.device),
        version=entry.version,
        pass_name=timed.name,
        status=entry.status,
        reason=entry.reason,
        p20_ms=time and time.p20,
        p50_ms=time and time.p50,
        p80_ms=time and time.p80,
        samples=time and time.samples,
        host_ms=time and time.host_p50,
        launches=trace and trace.launches,
        bytes=nbytes,
        flops=flops,
        counted=timed.words,
        copy_gbps=rates and rates.copy_gbps,
        gemm_tflops=rates and rates.gemm_tflops,
        floor_ms=floor_ms,
        share_of_floor=floor_ms / time.p50 if time and floor_ms is not None else None,
        baseline=family.baseline,
        speedup=baseline.p50 / time.p50 if time and baseline else None,
        max_error=entry.errors.get(timed.error),
        max_error_allowed=entry.allowed.get(timed.error),
        peak_bytes=trace and trace.peak_bytes,
        machine=run.machine,
    )
