"""`linear_memory_bytes` is an upper bound of what the head takes, and not a loose one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import make_problem
from torch import Tensor

from dil_kernels import linear_memory_bytes, linear_token_logps
from dil_kernels.functional import default_stash_bytes
from dil_kernels.ops import linear_head
from dil_kernels.ops.head_steps import CppSteps, HeadProcessing
from dil_kernels.ops.linear_head import TileShape, stash_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a product of bf16 matrices holds for itself, where the head takes one; it is not in the bound.
OF_A_PRODUCT = {torch.bfloat16: 1 << 19}
WANTED = list(itertools.product((True, False), repeat=3))


def used_and_predicted(
    num_scored: int, N: int, D: int, V: int, dtype: torch.dtype, wanted: tuple[bool, ...], stash_bytes: int
) -> tuple[int, int]:
    """Bytes beyond inputs, log-probs and gradients, over forward and backward; what they were said to be."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=gen).to(dtype) for n in (N, V))
    bias = torch.randn(V, generator=gen).to(dtype)
    labels = torch.randint(0, V, (N,), generator=gen)
    labels[torch.randperm(N, generator=gen)[num_scored:]] = -100
    inputs = [x.requires_grad_() for x, is_wanted in zip((hidden, weight, bias), wanted, strict=True) if is_wanted]

    def run() -> list[Tensor]:
        logps = linear_token_logps(
            hidden,
            weight,
            labels,
            lm_head_bias=bias if wanted[2] else None,
            shift=False,
            stash_bytes=stash_bytes,
            backend="cpp",
        )
        return [logps, *(torch.autograd.grad(logps, inputs, torch.ones_like(logps)) if inputs else ())]

    results, peak = peak_bytes(run)
    names = ("hidden_states_grad", "lm_head_weight_grad", "lm_head_bias_grad")
    predicted = linear_memory_bytes(
        num_scored,
        D,
        V,
        dtype,
        num_tokens=N,
        stash_bytes=stash_bytes,
        device="cpu",
        **dict(zip(names, wanted, strict=True)),
    )
    return peak - sum(x.numel() * x.element_size() for x in results), predicted


@settings(max_examples=60)
@given(data=st.data())
def test_the_bound_holds_and_is_tight(data: st.DataObject) -> None:
    N = data.draw(st.integers(2, 400))
    num_scored = data.draw(st.integers(0, N))
    D, V = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 3000))
    dtype, wanted = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(WANTED))
    stash_rows = data.draw(st.integers(0, num_scored))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(linear_head.TILE_SHAPES, "cpu", TileShape(32, 512))
        stash_bytes = stash_rows * stash_stride(V) * dtype.itemsize
        used, predicted = used_and_predicted(num_scored, N, D, V, dtype, wanted, stash_bytes)
    assert used - OF_A_PRODUCT.get(dtype, 0) <= predicted <= 1.3 * used + (1 << 17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stash_of_a_16_bit_head_takes_no_wide_copy(dtype: torch.dtype) -> None:
    stash_bytes = 300 * stash_stride(20000) * 2
    used, predicted = used_and_predicted(300, 300, 64, 20000, dtype, (True, True, False), stash_bytes)
    weight_grad = 20000 * 64 * 2  # the peak may be in the forward, before it is there
    assert used <= predicted <= 1.1 * (used + weight_grad)
    # The stash, a tile of logits in fp32, and not the stash in fp32 beside them.
    assert used <= 1.2 * (stash_bytes + 300 * 4096 * 4)


def test_the_default_stash() -> None:
    sizes = (10, 8, 20, torch.float32)
    default = default_stash_bytes(torch.device("cpu"))
    expected = linear_memory_bytes(*sizes, stash_bytes=default, device="cpu")
    assert linear_memory_bytes(*sizes, stash_bytes=None, device="cpu") == expected
    assert expected > linear_memory_bytes(*sizes, stash_bytes=0, device="cpu")


def test_the_measurement_sees_what_an_op_allocates_inside() -> None:
    x, factor = torch.ones(1000, 1024, dtype=torch.bfloat16), torch.ones(1000, 1)
    _, peak = peak_bytes(lambda: x.mul_(factor))  # works in fp32
    assert peak >= x.numel() * 4


@pytest.mark.usefixtures("nan_poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grads", [(True, True, False), (True, False, False), (False, True, True), (False,) * 3])
def test_predicted_memory(dtype: torch.dtype, grads: tuple[bool, ...], monkeypatch) -> None:
    monkeypatch.setitem(linear_head.TILE_SHAPES, "cpu", TileShape(32, 512))
    problem = make_problem(1, 200, 256, 4000, bias=grads[2]).to(dtype)
    problem.labels[0, :80] = -100
    options = {"grad_hidden": grads[0], "grad_weight": grads[1], "grad_bias": grads[2]}
    for stash_rows in (0, 50, 120):
        stash_bytes = stash_rows * stash_stride(4000) * dtype.itemsize
        head = linear_head.Head(problem.weight, problem.bias, HeadProcessing(1.0, 0.0, 1.0, 32, 512))
        kept = stash_rows if grads[1] or grads[2] else 0

        def run(kept: int = kept, head: linear_head.Head = head) -> list[Tensor | None]:
            out = linear_head.head_forward(
                problem.hidden[0],
                problem.labels[0],
                head,
                CppSteps,
                rows=120,
                stash_rows=kept,
                ignore_index=-100,
                grad_hidden=grads[0],
                statistics=False,
            )
            if not any(grads):
                return [out.logps]
            grad = torch.ones_like(out.logps)
            hidden, targets = problem.hidden[0], problem.labels[0]
            return [out.logps, *linear_head.head_backward(grad, hidden, targets, head, CppSteps, out, **options)]

        results, peak = peak_bytes(run)
        used = peak - sum(x.numel() * x.element_size() for x in results if x is not None)
        predicted = linear_memory_bytes(
            120,
            256,
            4000,
            dtype,
            num_tokens=200,
            hidden_states_grad=grads[0],
            lm_head_weight_grad=grads[1],
            lm_head_bias_grad=grads[2],
            stash_bytes=stash_bytes,
            device="cpu",
        )
        own = used - OF_A_PRODUCT.get(dtype, 0)
        assert own <= predicted <= 1.2 * used + (1 << 18), (stash_rows, used, predicted)


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ({"num_scored_tokens": -1}, ValueError, "num_scored_tokens must be >= 0, got -1"),
        ({"vocab_size": 30.0}, TypeError, "vocab_size must be an integer, got 30.0"),
        ({"num_tokens": True}, TypeError, "num_tokens must be an integer, got True"),
        ({"stash_bytes": -1}, ValueError, "stash_bytes must be >= 0, got -1"),
    ],
)
def test_sizes_that_are_none(given: dict[str, Any], error: type[Exception], problem: str) -> None:
    sizes = {"num_scored_tokens": 4, "hidden_size": 8, "vocab_size": 30, "dtype": torch.float32}
    with pytest.raises(error, match=problem):
        linear_memory_bytes(**{**sizes, **given})
