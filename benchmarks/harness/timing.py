"""Hot, interleaved timing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # the argument counts calls, so that a call can rotate its buffers

WARMUP_CALLS = 1
CALLS_PER_ROUND = 2


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
class Quantiles:
    """Of the samples of one call, in milliseconds."""

    p20: float
    p50: float
    p80: float
    samples: int


def quantiles(samples_ms: Sequence[float]) -> Quantiles:
    """Interpolated linearly."""
    points = torch.tensor(samples_ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, p50, p80 = points.tolist()
    return Quantiles(p20, p50, p80, len(samples_ms))


def time_calls(call: Call, first: int, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` calls in a row; by events on CUDA, whose queue is not drained between calls."""
    if device.type != "cuda":
        samples = []
        for i in range(first, first + count):
            start = time.perf_counter()
            call(i)
            samples.append((time.perf_counter() - start) * 1e3)
        return samples
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for i, (begin, end) in enumerate(events, start=first):
        begin.record()
        call(i)
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def time_interleaved(calls: dict[str, Call], device: torch.device, budget: Budget) -> dict[str, Quantiles]:
    """Time calls beside each other, so that a machine's slow moments fall on all of them.

    Each round runs every call once unmeasured and `CALLS_PER_ROUND` times measured; the order rotates by one a round.
    """
    last_warm_ms = [time_calls(call, 0, WARMUP_CALLS, device)[-1] for call in calls.values()]
    round_seconds = sum(last_warm_ms) * 1e-3 * (1 + CALLS_PER_ROUND)
    rounds = min(max(math.ceil(budget.seconds / round_seconds), budget.min_rounds), budget.max_rounds)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            first = r * (1 + CALLS_PER_ROUND)
            samples[name] += time_calls(calls[name], first, 1 + CALLS_PER_ROUND, device)[1:]
    return {name: quantiles(values) for name, values in samples.items()}
