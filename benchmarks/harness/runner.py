"""One case: check every provider, then time those that are right."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.cases import FORWARD, PASSES, Case, Inputs, Pass, make_inputs
from harness.check import Errors, Oracle, allowed_errors, make_oracle, measure_errors
from harness.machine import Copy, last_cache_bytes
from harness.memory import peak_bytes
from harness.providers import BASELINE, Provider, SequenceLogps, describe, eager_sequence_logps
from harness.timing import Budget, Call, Quantiles, time_interleaved

# Buffers are rotated that together are this many times the last cache, so that no call finds its input there.
CACHE_MULTIPLE = 4
COPY = "copy"

OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "unavailable"


@dataclass(frozen=True)
class Entry:
    """A provider in a case, after its correctness check."""

    provider: Provider
    label: str
    version: str
    status: str
    reason: str = ""  # why it is not timed
    fn: SequenceLogps | None = None
    errors: Errors | None = None
    allowed: Errors | None = None


@dataclass(frozen=True)
class Result:
    """One case, provider and pass. What was not measured is None."""

    case: Case
    entry: Entry
    timed: Pass
    copy_gbps: float  # copy bandwidth of the machine, measured in the same rounds
    time: Quantiles | None = None
    peak_bytes: int | None = None
    ratio: float | None = None  # time of the authors' way over this time

    @property
    def gbps(self) -> float | None:
        """Bytes counted per second of the median, in 1e9."""
        return None if self.time is None else self.timed.bytes_counted(self.case) / (self.time.p50 * 1e-3) / 1e9

    @property
    def floor_ms(self) -> float:
        """Time that the counted bytes take at copy bandwidth."""
        return self.timed.bytes_counted(self.case) / (self.copy_gbps * 1e9) * 1e3

    @property
    def share_of_copy(self) -> float | None:
        """GB/s over those of the copy."""
        return None if self.gbps is None else self.gbps / self.copy_gbps

    @property
    def error(self) -> float | None:
        """Of what the pass adds: log-probs in forward, the gradient in forward+backward."""
        return _of_pass(self.entry.errors, self.timed)

    @property
    def error_allowed(self) -> float | None:
        """What `error` may be at most."""
        return _of_pass(self.entry.allowed, self.timed)


def _of_pass(errors: Errors | None, timed: Pass) -> float | None:
    if errors is None:
        return None
    return errors.logps if timed is FORWARD else errors.grad


def run_case(
    case: Case, providers: Sequence[Provider], device: torch.device, copy: Copy, budget: Budget
) -> list[Result]:
    """Results of every provider and pass, in the order of the passes and then of the providers."""
    inputs = make_inputs(case, device)
    entries = _check_all(case, providers, device, inputs)
    correct = [entry for entry in entries if entry.status == OK]
    shared, private = _rotations(case, correct, device, inputs)
    results = []
    for timed in PASSES:
        calls = {
            entry.provider.name: _make_call(entry, timed, inputs, private if entry.provider.destroys_logits else shared)
            for entry in correct
        }
        peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
        times = time_interleaved({COPY: copy, **calls}, device, budget)
        copy_gbps = copy.gbps(times[COPY].p50)
        baseline = times.get(BASELINE)
        for entry in entries:
            name = entry.provider.name
            time = times.get(name)
            ratio = baseline.p50 / time.p50 if baseline is not None and time is not None else None
            results.append(Result(case, entry, timed, copy_gbps, time, peaks.get(name), ratio))
    return results


def _check_all(case: Case, providers: Sequence[Provider], device: torch.device, inputs: Inputs) -> list[Entry]:
    oracle = make_oracle(inputs)
    eager = measure_errors(eager_sequence_logps, inputs, oracle)
    entries = []
    for provider in providers:
        entries.append(_check(provider, case, device, inputs, oracle, eager))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return entries


def _check(
    provider: Provider, case: Case, device: torch.device, inputs: Inputs, oracle: Oracle, eager: Errors
) -> Entry:
    problem = provider.problem(device)
    if problem is not None:
        return Entry(provider, provider.name, "", UNAVAILABLE, problem)
    label, version = describe(provider, device, case.dtype), provider.version()
    try:
        fn = provider.build()
        errors = measure_errors(fn, inputs, oracle)
    # A provider may fail in any way, for want of memory too; the others must still be measured.
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return Entry(provider, label, version, FAILED, f"{type(error).__name__}: {first_line}")
    allowed = allowed_errors(eager, case.dtype, provider.logps_in_logits_dtype)
    problem = errors.problem(allowed)
    return Entry(provider, label, version, OK if problem is None else WRONG, problem or "", fn, errors, allowed)


def _rotations(
    case: Case, entries: Sequence[Entry], device: torch.device, inputs: Inputs
) -> tuple[list[Tensor], list[Tensor]]:
    """Equal leaf logits: some shared by providers that leave them alone, some for those that destroy them, if any."""
    count = max(1, math.ceil(CACHE_MULTIPLE * last_cache_bytes(device) / case.logits_bytes))
    shared = [inputs.logits] + [_leaf_copy(inputs.logits) for _ in range(count - 1)]
    destroyed = any(entry.provider.destroys_logits for entry in entries)
    return shared, [_leaf_copy(inputs.logits) for _ in range(count)] if destroyed else []


def _leaf_copy(logits: Tensor) -> Tensor:
    return logits.detach().clone().requires_grad_()


def _make_call(entry: Entry, timed: Pass, inputs: Inputs, rotation: list[Tensor]) -> Call:
    """The call that is timed. Its results are freed inside it, as a training step frees them."""
    fn, labels, upstream = entry.fn, inputs.labels, inputs.upstream
    assert fn is not None

    def forward(i: int) -> None:
        with torch.no_grad():
            fn(rotation[i % len(rotation)], labels)

    def forward_backward(i: int) -> None:
        logits = rotation[i % len(rotation)]
        torch.autograd.grad(fn(logits, labels), logits, upstream)

    return forward if timed is FORWARD else forward_backward
