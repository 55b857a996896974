"""Token and sequence log-probabilities of every backend against the eager reference in fp64."""

from __future__ import annotations

from dataclasses import replace

import implementations
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation, every_implementation, every_kernel
from problems import IGNORE, Problem, boundaries, problems
from tolerance import assert_as_exact_as_eager

from dil_kernels import sequence_logps, token_logps
from dil_kernels.functional import LogitStatistics

pytestmark = pytest.mark.usefixtures("nan_poisoned")
FP64_EPS = torch.finfo(torch.float64).eps  # of the probability 1: what the oracle cannot tell from 0


def logits_of(problem: Problem, device: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    if dtype is None and device == "cpu":
        return problem.logits.detach()  # as strided
    return problem.logits.detach().to(device=device, dtype=dtype or problem.logits.dtype)


def run(problem: Problem, backend: str, device: str, dtype: torch.dtype | None = None):
    """Log-probs and the gradient of the logits."""
    logits = logits_of(problem, device, dtype).requires_grad_()
    logps = token_logps(logits, problem.labels.to(device), **problem.how, backend=backend)
    (grad,) = torch.autograd.grad(logps, logits, problem.grad.to(device=device, dtype=logps.dtype))
    return logps, grad


def statistics(problem: Problem, backend: str, device: str, dtype: torch.dtype | None = None):
    """Log-probs as they come with statistics, and the statistics."""
    return token_logps(
        logits_of(problem, device, dtype),
        problem.labels.to(device),
        **problem.how,
        return_statistics=True,
        backend=backend,
    )


def without_labels(grad: torch.Tensor, problem: Problem) -> torch.Tensor:
    grad = grad.detach().cpu().clone()
    targets = problem.labels[:, 1:] if problem.shift else problem.labels
    index = targets.clamp(min=0).unsqueeze(-1)
    grad[:, : index.shape[1]] = grad[:, : index.shape[1]].scatter(-1, index, 0.0)
    return grad


def rounded_exponents(grad: torch.Tensor, problem: Problem) -> float:
    """The largest entry of a gradient times what its exponentials are taken of, in last places of its dtype.

    An exponential in fp32, of the softmax or of softcapping's slope, is relative to itself as uncertain as its argument
    is. Eager may be luckier than that, and its error no measure: in a row of two entries there is but one exponential.
    """
    x, cap = problem.logits.detach().double(), problem.softcapping
    capped = x if cap is None else cap * torch.tanh(x / cap)
    exponents = (capped / problem.temperature).log_softmax(-1).abs()
    if cap is not None:  # the slope, and what the largest logit is taken from, which is rounded itself
        exponents = exponents + 2 * (x / cap).abs() + 2 * capped.abs().amax(-1, keepdim=True) / problem.temperature
    exponents = exponents[:, : x.shape[1] - problem.shift]
    terms = (grad[:, : exponents.shape[1]].double().abs() * exponents).nan_to_num(0.0, 0.0)
    return terms.max().item() * torch.finfo(torch.float32).eps / torch.finfo(problem.logits.dtype).eps


@every_kernel
@given(problem=problems())
def test_forward_and_backward_match_the_oracle(impl: Implementation, problem: Problem) -> None:
    truth = run(problem, "eager", "cpu", torch.float64)
    eager = run(problem, "eager", impl.device)
    actual = run(problem, impl.backend, impl.device)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == problem.logits.dtype
    assert_as_exact_as_eager(actual[0], eager[0], truth[0], "logps", unresolved=FP64_EPS)
    # The entries of the labels are large; without them, those of the softmax are judged by their own size.
    softmax = [without_labels(grad, problem) for _, grad in (actual, eager, truth)]
    for name, (*grads, true_grad), unresolved in (
        ("grad_logits", [grad for _, grad in (actual, eager, truth)], FP64_EPS),
        ("grad_logits apart from the labels", softmax, 0.0),
    ):
        magnitude = rounded_exponents(true_grad, problem)
        assert_as_exact_as_eager(*grads, true_grad, name, magnitude=magnitude, unresolved=unresolved)


@given(problem=problems(dtypes=(torch.float64,)))
def test_cpp_in_fp64_matches_the_oracle(problem: Problem) -> None:
    truth, actual = run(problem, "eager", "cpu"), run(problem, "cpp", "cpu")
    torch.testing.assert_close(actual[0], truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], truth[1], rtol=1e-10, atol=1e-12)
    (_, true_statistics), (_, measured) = statistics(problem, "eager", "cpu"), statistics(problem, "cpp", "cpu")
    torch.testing.assert_close(measured, true_statistics, rtol=1e-12, atol=1e-12)


@every_kernel
@given(problem=problems())
def test_statistics_match_the_oracle(impl: Implementation, problem: Problem) -> None:
    true_logps, truth = statistics(problem, "eager", "cpu", torch.float64)
    eager_logps, _ = statistics(problem, "eager", impl.device)
    logps, actual = statistics(problem, impl.backend, impl.device)
    assert_as_exact_as_eager(logps, eager_logps, true_logps, "logps beside statistics", unresolved=FP64_EPS)
    assert actual.mean_logit.dtype == actual.entropy.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in actual)
    assert_close_statistics(actual, truth, problem)


def assert_close_statistics(actual: LogitStatistics, truth: LogitStatistics, problem: Problem) -> None:
    # Entropies are in nats, which need no scale; means by the size of what they are the mean of.
    torch.testing.assert_close(actual.entropy.cpu().double(), truth.entropy, rtol=1e-6, atol=1e-6, equal_nan=True)
    _, sizes = statistics(replace(problem, logits=problem.logits.abs()), "eager", "cpu", torch.float64)
    mean, true_mean = actual.mean_logit.cpu().double(), truth.mean_logit
    close = (mean == true_mean) | (mean.isnan() & true_mean.isnan())
    close |= sizes.mean_logit * problem.logits.shape[-1] >= torch.finfo(torch.float32).max  # the sum is not an fp32
    assert (close | ((mean - true_mean).abs() <= 1e-6 * sizes.mean_logit)).all()
    if problem.softcapping is None:  # which makes values equal up to rounding that differ in fp64
        assert torch.equal(actual.top1_hit.cpu(), truth.top1_hit)


@every_kernel
def test_top1_hits_under_softcapping(impl: Implementation) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-50.0, -4.0, -torch.inf]], device=impl.device)
    labels = torch.tensor([1, 2, 1], device=impl.device)
    _, measured = token_logps(
        logits, labels, shift=False, final_logit_softcapping=5.0, return_statistics=True, backend=impl.backend
    )
    assert measured.top1_hit.tolist() == [True, False, True]


def test_statistics_of_a_hand_checked_literal() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [2.0, 4.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0, IGNORE])
    for backend in ("eager", "cpp"):
        _, (mean, entropy, hit) = token_logps(
            logits, labels, shift=False, temperature=2.0, return_statistics=True, backend=backend
        )
        assert mean.tolist() == [-torch.inf, 1.0, 0.0]
        p = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64).softmax(0)
        expected = torch.tensor([2.0, 1.0, 1.0]).double().log()
        expected[1] = -(p * p.log()).sum()
        expected[2] = 0.0
        torch.testing.assert_close(entropy, expected)
        assert hit.tolist() == [True, False, False]


LAUNCHES = {
    "one_tile": ((8, 8), 0),
    "many_tiles": ((2, 1), 0),
    "many_tiles_ahead": ((1, 1, 3, 3), 0),
    "split": ((1, 1), 64),
    "split_with_many_tiles": ((2, 1, 2, 2), 1024),
}


@pytest.mark.parametrize("impl", [p for p in implementations.KERNELS if p.values[0].backend == "triton"])
@pytest.mark.parametrize("launch", LAUNCHES)
@given(problem=problems(vocabularies=(7, 600, 2048, 5003), max_rows=3))
@settings(max_examples=8)
def test_every_way_to_launch_matches_the_oracle(impl: Implementation, launch: str, problem: Problem) -> None:
    from dil_kernels.kernels import launch as module

    shape, min_span = LAUNCHES[launch]
    shapes = module.Shapes(*3 * (module.Shape(*shape),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "shapes", lambda capability, itemsize: shapes)
        patch.setattr(module, "MIN_SPAN", min_span or 2**31)
        patch.setattr(module, "forward_launch", module.forward_launch.__wrapped__)  # keeps no choice
        actual = run(problem, impl.backend, impl.device)
        _, measured = statistics(problem, impl.backend, impl.device)
    truth, eager = run(problem, "eager", "cpu", torch.float64), run(problem, "eager", impl.device)
    _, true_statistics = statistics(problem, "eager", "cpu", torch.float64)
    for i, what in enumerate(("logps", "grad_logits")):
        assert_as_exact_as_eager(actual[i], eager[i], truth[i], what, unresolved=FP64_EPS)
    assert_close_statistics(measured, true_statistics, problem)


@every_kernel
@pytest.mark.parametrize("softcapping", [None, 30.0])
@pytest.mark.parametrize("V", [32000, 49152, 50257])
def test_fp32_logps_are_within_1e_6_relative(impl: Implementation, V: int, softcapping: float | None) -> None:
    gen = torch.Generator().manual_seed(V)
    logits = 3.0 * torch.randn(4, 5, V, generator=gen)
    labels = torch.randint(0, V, (4, 5), generator=gen)
    how = {"final_logit_softcapping": softcapping}
    truth = token_logps(logits.double(), labels, **how, backend="eager")
    actual = token_logps(logits.to(impl.device), labels.to(impl.device), **how, backend=impl.backend)
    torch.testing.assert_close(actual.cpu().double(), truth, rtol=1e-6, atol=0.0)


@every_kernel
@pytest.mark.parametrize("V", [2, 1000, 50257])
def test_confident_tokens_keep_their_relative_precision(impl: Implementation, V: int) -> None:
    """Log-prob, entropy and the label's gradient, down to 1e-17: what is lost is the rounding of distances to rivals.

    Log-probs are also within 1e-6 relative or 1e-8 absolute.
    """
    gaps = torch.tensor([1.0, 5.0, 10.0, 14.0, 18.0, 22.0, 26.0, 40.0])
    logits = torch.randn(1, len(gaps), V, generator=torch.Generator().manual_seed(0))
    label = V // 2
    logits[..., label] = logits.amax(-1) + gaps
    labels = torch.full((1, len(gaps)), label)
    grad = torch.linspace(-1.0, 2.0, len(gaps))[None]

    def confident(x: torch.Tensor, backend: str):
        x = x.clone().requires_grad_()
        y = labels.to(x.device)
        logps, measured = token_logps(x, y, shift=False, return_statistics=True, backend=backend)
        (dx,) = torch.autograd.grad(logps, x, grad.to(x))
        return logps.detach(), measured.entropy, dx[..., label]

    truth = confident_truth(logits, labels, grad)
    found = [x.cpu().double() for x in confident(logits.to(impl.device), impl.backend)]
    for actual, true in zip(found, truth, strict=True):
        assert ((actual - true).abs() <= (1e-6 + 1.2e-7 * gaps) * true.abs()).all()
    torch.testing.assert_close(found[0], truth[0], rtol=1e-6, atol=1e-8)


def confident_truth(logits: torch.Tensor, labels: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where p is nearly 1, even fp64 has to leave the label's term out of the sum."""
    x = logits.double()
    label = labels.unsqueeze(-1)
    d = x - x.gather(-1, label)
    rest = d.exp().scatter(-1, label, 0.0).sum(-1)
    logps = -rest.log1p()
    entropy = -logps - (d.exp() * d).sum(-1) / (1.0 + rest)
    return logps, entropy, -grad.double() * logps.expm1()


def test_a_hand_checked_literal() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0986122886681098]]).log_softmax(-1)  # p = (1/2, 1/2), (1/4, 3/4)
    for backend in ("eager", "cpp"):
        logps = token_logps(logits, torch.tensor([0, 1]), shift=False, backend=backend)
        torch.testing.assert_close(logps.exp(), torch.tensor([0.5, 0.75]))


@every_implementation
@given(data=st.data())
@settings(max_examples=20)
def test_packed_equals_padded(impl: Implementation, data: st.DataObject) -> None:
    lengths = data.draw(boundaries(num_sequences=4))
    shift, average = data.draw(st.booleans()), data.draw(st.booleans())
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    V, N, T = 37, sum(lengths), max(max(lengths), 2)
    packed = torch.randn(N, V, generator=gen)
    labels = torch.randint(0, V, (N,), generator=gen)
    labels[torch.rand(N, generator=gen) < 0.3] = IGNORE
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    padded = torch.zeros(4, T, V)
    padded_labels = torch.full((4, T), IGNORE)
    for s in range(4):
        a, b = int(cu_seqlens[s]), int(cu_seqlens[s + 1])
        padded[s, : b - a], padded_labels[s, : b - a] = packed[a:b], labels[a:b]
    expected = sequence_logps(padded, padded_labels, shift=shift, average_log_prob=average, backend="eager")
    x = packed.to(impl.device).requires_grad_()
    arguments = (labels.to(impl.device),)
    options = {"cu_seqlens": cu_seqlens.to(impl.device), "shift": shift, "average_log_prob": average}
    actual = sequence_logps(x, *arguments, **options, backend=impl.backend)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    batched = sequence_logps(x.unsqueeze(0), labels.unsqueeze(0).to(impl.device), **options, backend=impl.backend)
    assert torch.equal(batched, actual)


@every_implementation
def test_sequence_sums_are_exact_for_long_sequences(impl: Implementation) -> None:
    tokens = 300 if impl == Implementation("triton", "cpu") else 3000  # the interpreter takes 10 ms a row
    gen = torch.Generator().manual_seed(0)
    logits = 5.0 * torch.randn(1, tokens, 11, generator=gen)
    labels = torch.randint(0, 11, (1, tokens), generator=gen)
    truth = sequence_logps(logits.double(), labels, backend="eager")
    actual = sequence_logps(logits.to(impl.device), labels.to(impl.device), backend=impl.backend)
    torch.testing.assert_close(actual.cpu().double(), truth, rtol=3e-7, atol=0.0)


@every_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_give_nan(impl: Implementation, bad: float) -> None:
    for position in (0, 5, 36, 2047, 2999):
        logits = torch.randn(1, 2, 3000, generator=torch.Generator().manual_seed(position))
        logits[0, 0, position] = bad
        logps = token_logps(
            logits.to(impl.device), torch.tensor([[1, 2]], device=impl.device), shift=False, backend=impl.backend
        )
        assert logps[0, 0].isnan()
        assert logps[0, 1].isfinite()


@every_implementation
def test_minus_infinity_rows(impl: Implementation) -> None:
    logits = torch.full((1, 3, 40), -torch.inf)
    logits[0, 1, 7] = 2.0
    logits[0, 2, :] = torch.finfo(torch.float32).min
    labels = torch.tensor([[7, 7, 7]])
    logps = token_logps(logits.to(impl.device), labels.to(impl.device), shift=False, backend=impl.backend).cpu()
    assert logps[0, 0].isnan()
    assert logps[0, 1] == 0.0
    torch.testing.assert_close(logps[0, 2], torch.tensor(40.0).log().neg())
    impossible = token_logps(logits.to(impl.device), labels.to(impl.device) + 1, shift=False, backend=impl.backend)
    assert impossible[0, 1] == -torch.inf


@pytest.mark.parametrize("impl", [p for p in implementations.ALL if p.values[0].backend != "cpp"])
def test_labels_out_of_range_are_nan_without_a_host_check(impl: Implementation) -> None:
    from dil_kernels.functional import logps as functional
    from dil_kernels.options import LogitsOptions

    logits = torch.randn(1, 4, 9, device=impl.device, requires_grad=True)
    labels = torch.tensor([[3, 9, -1, 2]], device=impl.device)
    checked = functional.CheckedLogits(logits, labels, impl.backend)
    logps, _ = functional.logps_of_labels(checked, LogitsOptions(shift=False))
    assert logps.isnan().tolist() == [[False, True, True, False]]
    logps.nan_to_num(0.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, [0, 3]].isfinite().all()


@every_kernel
def test_many_rows_and_a_large_vocabulary(impl: Implementation) -> None:
    gen = torch.Generator().manual_seed(1)
    for B, T, V in ((1, 2, 262144), (2, 150, 13)):
        logits = torch.randn(B, T, V, generator=gen).to(impl.device).requires_grad_()
        labels = torch.randint(0, V, (B, T), generator=gen).to(impl.device)
        truth = token_logps(logits.detach().cpu().double(), labels.cpu(), backend="eager")
        logps = token_logps(logits, labels, backend=impl.backend)
        torch.testing.assert_close(logps.detach().cpu().double(), truth, rtol=1e-6, atol=1e-6)
        logps.sum().backward()
        assert logits.grad is not None
        # Each row of the gradient of a log-softmax sums to zero.
        assert logits.grad[:, :-1].double().sum(-1).abs().max() < 1e-5
        assert torch.equal(logits.grad[:, -1], torch.zeros_like(logits.grad[:, -1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [50257, 49152])
def test_cpp_writes_large_gradients_past_the_caches(dtype: torch.dtype, V: int) -> None:
    """At any alignment of a row, the same bits as in place, which is never written so."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 90, V, generator=gen).to(dtype)
    labels = torch.randint(0, V, (1, 90), generator=gen)
    upstream = torch.randn(1, 90, generator=gen)
    grads = []
    for inplace in (False, True):
        own = logits.clone().requires_grad_()
        head_output = own.view_as(own) if not inplace else own * 1
        logps = token_logps(head_output, labels, shift=False, backend="cpp", inplace_backward=inplace)
        grads += torch.autograd.grad(logps, own, upstream)
    assert grads[0].nbytes > 8 << 20
    assert torch.equal(*grads)
