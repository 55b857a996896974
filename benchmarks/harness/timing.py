"""Hot, interleaved timing."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # the argument counts calls, so that a call can rotate its buffers

WARMUP_CALLS = 1
CALLS_PER_ROUND = 2
LONG_MS = 1000.0  # a call that takes so long leaves nothing of the one before it in any cache: one a round is enough
# A CUDA queue is held up for this many times as long as the host takes to fill it, so that what is timed is the device.
LEAD = 2.0
MAX_LEAD_MS = 20.0
CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz; a slower one is held up for longer


@dataclass(frozen=True)
class Budget:
    """How long to time one group of calls.

    Attributes:
        seconds: aimed at, for all calls of the group together.
        min_rounds: rounds to make in any case.
        max_rounds: rounds to stop at.
    """

    seconds: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Sample:
    """One call, in milliseconds."""

    device_ms: float  # on CUDA between two events, elsewhere wall time
    host_ms: float  # until the call returned


@dataclass(frozen=True)
class Quantiles:
    """Of the samples of one call, in milliseconds."""

    p20: float
    p50: float
    p80: float
    samples: int
    host_p50: float


def quantiles(samples: Sequence[Sample]) -> Quantiles:
    """Interpolated linearly."""
    device, host = (
        torch.tensor([getattr(s, field) for s in samples], dtype=torch.float64) for field in ("device_ms", "host_ms")
    )
    p20, p50, p80 = device.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Quantiles(p20, p50, p80, len(samples), host.quantile(0.5).item())


def time_calls(call: Call, first: int, count: int, device: torch.device, lead_ms: float = 0.0) -> list[Sample]:
    """Time `count` calls in a row, numbered from `first`.

    On CUDA by events. The queue is held up for `lead_ms` before the first call and not drained between calls, so that
    the device never waits for the host; a call that itself waits for the device is timed with its waiting.
    """
    if device.type != "cuda":
        return [Sample(ms, ms) for ms in (_wall_ms(call, i) for i in range(first, first + count))]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    host = []
    if lead_ms:
        torch.cuda._sleep(round(lead_ms * CYCLES_PER_MS))
    for i, (begin, end) in enumerate(events, start=first):
        begin.record()
        host.append(_wall_ms(call, i))
        end.record()
    torch.cuda.synchronize(device)
    return [Sample(begin.elapsed_time(end), ms) for (begin, end), ms in zip(events, host, strict=True)]


def _wall_ms(call: Call, i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e3


def _named(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A range of that name for profilers, which then see the timed calls of one provider alone."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else contextlib.nullcontext()


def time_interleaved(calls: Mapping[str, Call], device: torch.device, budget: Budget) -> dict[str, Quantiles]:
    """Time calls beside each other, so that a machine's slow moments fall on all of them.

    Each round runs every call once unmeasured and `CALLS_PER_ROUND` times measured, or a long one just once; the order
    rotates by one a round.
    Calls are numbered on from one turn to the next, so that none finds in cache what the call before it has read.
    """
    warm = {name: time_calls(call, 0, WARMUP_CALLS, device)[-1] for name, call in calls.items()}
    unmeasured = {name: 0 if sample.device_ms > LONG_MS else 1 for name, sample in warm.items()}
    per_turn = {name: 1 + CALLS_PER_ROUND if skipped else 1 for name, skipped in unmeasured.items()}
    leads = {name: min(LEAD * per_turn[name] * sample.host_ms, MAX_LEAD_MS) for name, sample in warm.items()}
    round_ms = sum(per_turn[name] * sample.device_ms for name, sample in warm.items())
    if device.type == "cuda":
        round_ms += sum(leads.values())
    rounds = min(max(math.ceil(budget.seconds / (round_ms * 1e-3)), budget.min_rounds), budget.max_rounds)
    names = list(calls)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    first = 0
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            with _named(name, device):
                timed = time_calls(calls[name], first, per_turn[name], device, leads[name])
            samples[name] += timed[unmeasured[name] :]
            first += per_turn[name]
    return {name: quantiles(values) for name, values in samples.items()}
