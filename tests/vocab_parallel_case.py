"""What the runs of tests/vocab_parallel_runs.py share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from linear_problems import Problem
from torch import Tensor

from dil_kernels import linear_token_logps

# Sums over parts are rounded once more than sums over the whole: in units in the last place of what is largest.
TOLERANCE = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 3, torch.float16: 3}


@dataclass(frozen=True)
class Split:
    """Where the parts of a vocabulary begin and end."""

    bounds: tuple[int, ...]

    @property
    def own(self) -> slice:
        rank = dist.get_rank()
        return slice(self.bounds[rank], self.bounds[rank + 1])


def group() -> dist.ProcessGroup:
    return dist.group.WORLD


def refused(error: type[Exception], message: str) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(error, match=re.escape(message))


def assert_close(actual: Tensor, expected: Tensor, what: str, least: float = 0.0) -> None:
    """Up to rounding at the size of the largest, or of `least` where that is larger."""
    ulps = TOLERANCE[expected.dtype] * torch.finfo(expected.dtype).eps
    largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=ulps, atol=ulps * max(largest, least), equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def assert_same_on_all(value: Tensor, what: str) -> None:
    """Bit by bit."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    for other in values:
        torch.testing.assert_close(other, values[0], rtol=0, atol=0, equal_nan=True, msg=f"{what} differ by process")


@st.composite
def splits(draw: st.DrawFn, V: int) -> Split:
    """Parts of any sizes, few entries and all but few included."""
    processes = dist.get_world_size()
    inner = draw(st.lists(st.integers(1, V - 1), min_size=processes - 1, max_size=processes - 1, unique=True))
    return Split((0, *sorted(inner), V))


def on_all_alike(property_: Callable[..., None]) -> None:
    """Run a property with the same examples on all processes, which meet in collectives; none is shrunk."""
    options = settings(
        max_examples=25, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    options(property_)()


def linear_results(problem: Problem, backend: str, **how: Any) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias) if x is not None]
    logps, statistics = linear_token_logps(
        *inputs[:2],
        problem.labels,
        lm_head_bias=inputs[2] if problem.bias is not None else None,
        shift=problem.shift,
        backend=backend,
        return_statistics=True,
        **problem.options,
        **how,
    )
    grads = torch.autograd.grad(logps, inputs, problem.upstream.to(logps.dtype))
    mean, entropy, hit = statistics
    return logps.detach(), mean, entropy, hit.to(mean.dtype), *grads


def check_linear(problem: Problem, split: Split, dtype: torch.dtype, backend: str, stash_bytes: int | None) -> None:
    """A head in parts against the head in one piece."""
    whole = problem.to(dtype)
    bias = None if whole.bias is None else whole.bias[split.own]
    part = replace(whole, weight=whole.weight[split.own], bias=bias)
    actual = linear_results(part, backend, process_group=group(), stash_bytes=stash_bytes)
    expected = list(linear_results(whole, "cpp" if backend == "triton" else backend, stash_bytes=stash_bytes))
    expected[5:] = [x[split.own] for x in expected[5:]]
    names = ("log-probs", "mean logits", "entropies", "hits", "hidden states", "weight", "bias")
    for name, one, other in zip(names, actual, expected, strict=False):
        assert_close(one, other, f"{name} {dtype} {backend} {split.bounds}")
    for name, one in zip(names[:5], actual, strict=False):
        assert_same_on_all(one, name)
