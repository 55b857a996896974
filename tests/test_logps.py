"""Token and sequence log-probabilities of every backend against the eager reference in fp64."""

from __future__ import annotations

import implementations
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation, every_implementation, every_kernel
from problems import IGNORE, Problem, boundaries, problems
from tolerance import assert_as_exact_as_eager

from dil_kernels import sequence_logps, token_logps

pytestmark = pytest.mark.usefixtures("nan_poisoned")


def run(problem: Problem, backend: str, device: str, dtype: torch.dtype | None = None, **options):
    """Log-probs and the gradient of the logits."""
    logits = problem.logits.detach().to(device=device, dtype=dtype or problem.logits.dtype)
    if dtype is None and device == "cpu":
        logits = problem.logits.detach()  # as strided
    logits.requires_grad_()
    labels = problem.labels.to(device)
    logps = token_logps(
        logits, labels, shift=problem.shift, temperature=problem.temperature, backend=backend, **options
    )
    (grad,) = torch.autograd.grad(logps, logits, problem.grad.to(device=device, dtype=logps.dtype))
    return logps, grad


def without_labels(grad: torch.Tensor, problem: Problem) -> torch.Tensor:
    grad = grad.detach().cpu().clone()
    targets = problem.labels[:, 1:] if problem.shift else problem.labels
    index = targets.clamp(min=0).unsqueeze(-1)
    grad[:, : index.shape[1]] = grad[:, : index.shape[1]].scatter(-1, index, 0.0)
    return grad


@every_kernel
@given(problem=problems())
def test_forward_and_backward_match_the_oracle(impl: Implementation, problem: Problem) -> None:
    truth = run(problem, "eager", "cpu", torch.float64)
    eager = run(problem, "eager", impl.device)
    actual = run(problem, impl.backend, impl.device)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == problem.logits.dtype
    assert_as_exact_as_eager(actual[0], eager[0], truth[0], "logps")
    assert_as_exact_as_eager(actual[1], eager[1], truth[1], "grad_logits")
    # The entries of the labels are large; without them, those of the softmax are judged by their own size.
    softmax = [without_labels(grad, problem) for _, grad in (actual, eager, truth)]
    assert_as_exact_as_eager(*softmax, "grad_logits apart from the labels")


@given(problem=problems(dtypes=(torch.float64,)))
def test_cpp_in_fp64_matches_the_oracle(problem: Problem) -> None:
    truth, actual = run(problem, "eager", "cpu"), run(problem, "cpp", "cpu")
    torch.testing.assert_close(actual[0], truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], truth[1], rtol=1e-10, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("V", [32000, 49152])
def test_fp32_logps_are_within_1e_6_relative(impl: Implementation, V: int) -> None:
    gen = torch.Generator().manual_seed(V)
    logits = 3.0 * torch.randn(4, 5, V, generator=gen)
    labels = torch.randint(0, V, (4, 5), generator=gen)
    truth = token_logps(logits.double(), labels, backend="eager")
    actual = token_logps(logits.to(impl.device), labels.to(impl.device), backend=impl.backend)
    torch.testing.assert_close(actual.cpu().double(), truth, rtol=1e-6, atol=0.0)


@every_kernel
def test_confident_tokens_are_within_1e_6_absolute(impl: Implementation) -> None:
    logits = torch.randn(1, 6, 1000, generator=torch.Generator().manual_seed(0))
    logits[..., 7] = torch.tensor([10.0, 14.0, 18.0, 22.0, 26.0, 40.0])
    labels = torch.full((1, 6), 7)
    truth = token_logps(logits.double(), labels, shift=False, backend="eager")
    actual = token_logps(logits.to(impl.device), labels.to(impl.device), shift=False, backend=impl.backend)
    torch.testing.assert_close(actual.cpu().double(), truth, rtol=1e-6, atol=1e-6)


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
    gen = torch.Generator().manual_seed(0)
    logits = 5.0 * torch.randn(1, 3000, 11, generator=gen)
    labels = torch.randint(0, 11, (1, 3000), generator=gen)
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

    logits = torch.randn(1, 4, 9, device=impl.device, requires_grad=True)
    labels = torch.tensor([[3, 9, -1, 2]], device=impl.device)
    logps = functional._token_logps(logits, labels, IGNORE, False, 1.0, False, impl.backend)
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
