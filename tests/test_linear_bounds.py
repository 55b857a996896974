"""The head with a bound on the scored positions, and with labels of any stride."""

from __future__ import annotations

import pytest
import torch
from implementations import Implementation, every_implementation, every_kernel
from linear_problems import make_problem
from problems import IGNORE
from torch import Tensor

from dil_kernels import linear_token_logps
from dil_kernels.ops import linear_head
from dil_kernels.ops.head_steps import CppSteps, HeadProcessing, TritonSteps

pytestmark = pytest.mark.usefixtures("nan_poisoned")


@every_kernel
def test_rows_beyond_the_bound_are_nan(impl: Implementation) -> None:
    targets = torch.tensor([5, IGNORE, 6, 7, IGNORE, 8], device=impl.device)
    hidden, weight = torch.randn(6, 4, device=impl.device), torch.randn(9, 4, device=impl.device)
    head = linear_head.Head(weight, None, HeadProcessing(1.0, 0.0, 1.0, 4, 32))
    steps = CppSteps if impl.backend == "cpp" else TritonSteps
    for bound, index in ((3, [0, 2, 3]), (6, [0, 2, 3, 5, 6, 6]), (0, [])):
        rows = steps(head, True).select(targets, IGNORE, bound)
        beyond = [place for place in (0, 2, 3, 5) if place not in index]
        assert rows.index.tolist() == index
        assert rows.labels.tolist() == [0 if place == 6 else targets[place] for place in index]
        assert rows.logps.isnan().nonzero().flatten().tolist() == beyond
        assert rows.statistics[:2].isnan().nonzero()[:, 1].tolist() == 2 * beyond
        assert not rows.statistics[2].any()
    out = linear_head.head_forward(
        hidden, targets, head, steps, rows=3, stash_rows=0, ignore_index=IGNORE, grad_hidden=False, statistics=False
    )
    assert out.logps.isnan().tolist() == [False] * 5 + [True]


@every_kernel
def test_labels_of_any_stride(impl: Implementation) -> None:
    hidden, weight = torch.randn(1, 6, 8, device=impl.device), torch.randn(20, 8, device=impl.device)
    labels = torch.arange(12, device=impl.device).unsqueeze(0)[:, ::2]
    for strided in (labels, labels[:, :1].expand(1, 6)):
        actual, expected = (
            linear_token_logps(hidden, weight, y, shift=False, backend=impl.backend)
            for y in (strided, strided.contiguous())
        )
        assert torch.equal(actual, expected)


def test_a_bound_that_is_too_small_is_refused() -> None:
    targets = torch.tensor([5, IGNORE, 6, 7, IGNORE, 8])
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match="max_scored_tokens=3, but labels score 4 positions"):
        linear_token_logps(hidden, weight, targets, shift=False, max_scored_tokens=3)


@every_implementation
def test_a_bound_on_the_scored_positions(impl: Implementation) -> None:
    problem = make_problem(2, 5, 8, 40, shift=True).to(torch.float32, impl.device)
    problem.labels[0, 2] = IGNORE

    def run(bound: int | None) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (problem.hidden, problem.weight)]
        logps, stats = linear_token_logps(
            *inputs, problem.labels, max_scored_tokens=bound, return_statistics=True, backend=impl.backend
        )
        upstream = torch.where(logps.isnan(), 0, problem.upstream.to(logps.dtype))
        return logps.detach(), *stats, *torch.autograd.grad(logps, inputs, upstream)

    for actual, expected in zip(run(7), run(None), strict=True):
        torch.testing.assert_close(actual, expected)
    if impl.device == "cpu":
        with pytest.raises(ValueError, match="max_scored_tokens=6, but labels score 7 positions"):
            run(6)


@every_implementation
def test_what_a_compiled_bound_leaves_out_is_nan(impl: Implementation) -> None:
    torch._dynamo.reset()
    problem = make_problem(2, 5, 8, 40, shift=True).to(torch.float32, impl.device)
    problem.labels[0, 2] = IGNORE
    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    options = {"max_scored_tokens": 4, "return_statistics": True, "backend": impl.backend}
    compiled = torch.compile(linear_token_logps, fullgraph=True, backend="aot_eager")
    logps, stats = compiled(*inputs, problem.labels, **options)
    beyond = torch.tensor([[False] * 4, [False, True, True, True]], device=impl.device)
    assert torch.equal(logps.isnan(), beyond)
    assert torch.equal(stats.entropy.isnan(), beyond)
    assert torch.equal(stats.mean_logit.isnan(), beyond)
    assert not stats.top1_hit[beyond].any()
    shortened = problem.labels.clone()
    shortened[1, 2:] = IGNORE
    expected = linear_token_logps(*inputs, shortened, backend=impl.backend)
    torch.testing.assert_close(logps[~beyond], expected[~beyond])
    upstream = problem.upstream.to(logps.dtype)
    grads = torch.autograd.grad(logps, inputs, upstream)
    for actual, truth in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-6)
