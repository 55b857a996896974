"""The head under autograd: what is kept and asked for, tied weights, checkpoints, autocast, compilation, its ops."""

from __future__ import annotations

import itertools

import pytest
import torch
from implementations import Implementation, every_implementation, every_kernel
from linear_problems import make_problem
from problems import IGNORE
from torch import Tensor

from dil_kernels import fused_linear_dil_loss, linear_token_logps, token_logps
from dil_kernels.ops import linear as linear_ops
from dil_kernels.ops import linear_head
from dil_kernels.ops.linear import LINEAR_LOGPS_BWD, LINEAR_LOGPS_FWD

pytestmark = pytest.mark.usefixtures("nan_poisoned")


@every_kernel
def test_without_a_gradient_nothing_is_kept(impl: Implementation, monkeypatch) -> None:
    problem = make_problem(2, 5, 8, 40).to(torch.float32, impl.device)
    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    kept = []
    forward = linear_ops.head_forward

    def note(*args: object, **kwargs: object) -> linear_head.HeadForward:
        out = forward(*args, **kwargs)
        kept.append(out.stash.numel() + out.sums.numel())
        return out

    monkeypatch.setattr(linear_ops, "head_forward", note)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            linear_token_logps(*inputs, problem.labels, backend=impl.backend)
    assert kept[0] > 0
    assert kept[1:] == [0, 0]


@every_implementation
def test_gradients_only_of_what_needs_one(impl: Implementation) -> None:
    problem = make_problem(2, 5, 8, 40, bias=True).to(torch.float32, impl.device)
    _, *all_grads = problem.run(impl.backend)
    inputs = (problem.hidden, problem.weight, problem.bias)
    for asked in itertools.product((False, True), repeat=3):
        given_inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, asked, strict=True)]
        saved: list[int] = []

        def note(x: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logps = linear_token_logps(
                *given_inputs[:2], problem.labels, lm_head_bias=given_inputs[2], shift=False, backend=impl.backend
            )
        assert logps.requires_grad == any(asked)
        if impl.backend != "eager" and not (asked[1] or asked[2]):
            assert sum(saved) < problem.hidden.numel() + problem.weight.numel() + 200  # no stash
        if not any(asked):
            assert not saved
            continue
        wanted = [x for x in given_inputs if x.requires_grad]
        grads = torch.autograd.grad(logps, wanted, problem.upstream.to(logps.dtype))
        expected = [g for g, is_asked in zip(all_grads, asked, strict=True) if is_asked]
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


@every_kernel
def test_tied_embeddings_get_both_gradients(impl: Implementation) -> None:
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (2, 7), generator=gen).to(impl.device)
    table = torch.randn(60, 8, generator=gen).to(impl.device).requires_grad_()
    logps = linear_token_logps(torch.tanh(table[tokens]), table, tokens, backend=impl.backend)
    (grad,) = torch.autograd.grad(logps.sum(), table)
    exact = table.detach().double().cpu().requires_grad_()
    states = torch.tanh(exact[tokens.cpu()])
    (truth,) = torch.autograd.grad(token_logps(states @ exact.t(), tokens.cpu(), backend="eager").sum(), exact)
    torch.testing.assert_close(grad.cpu().double(), truth, rtol=1e-4, atol=1e-5)


@every_kernel
def test_backward_again_and_through_itself(impl: Implementation) -> None:
    problem = make_problem(2, 5, 8, 40).to(torch.float32, impl.device)
    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    for stash_bytes in (0, 1 << 20):
        logps = linear_token_logps(*inputs, problem.labels, shift=False, stash_bytes=stash_bytes, backend=impl.backend)
        upstream = problem.upstream.to(logps.dtype)
        first = torch.autograd.grad(logps, inputs, upstream, retain_graph=True)
        second = torch.autograd.grad(logps, inputs, upstream, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(logps, inputs, upstream, create_graph=True)


@every_kernel
def test_weight_changed_before_it_is_needed_again(impl: Implementation) -> None:
    problem = make_problem(1, 5, 8, 40).to(torch.float32, impl.device)
    weight = problem.weight.requires_grad_()
    logps = linear_token_logps(problem.hidden, weight, problem.labels, stash_bytes=0, backend=impl.backend)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@every_kernel
def test_gradient_checkpointing_and_loss_scale(impl: Implementation) -> None:
    problem = make_problem(2, 5, 8, 40).to(torch.float16, impl.device)
    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_token_logps(hidden, weight, problem.labels, shift=False, backend=impl.backend)

    upstream = problem.upstream.float()
    plain = torch.autograd.grad(logps(*inputs), inputs, upstream)
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(logps, *inputs, use_reentrant=False), inputs, upstream
    )
    scaled = torch.autograd.grad(logps(*inputs), inputs, 1024 * upstream)
    for p, a, s in zip(plain, again, scaled, strict=True):
        assert torch.equal(p, a)
        torch.testing.assert_close(s.float() / 1024, p.float(), rtol=2e-3, atol=1e-4)


@every_kernel
def test_autocast(impl: Implementation) -> None:
    problem = make_problem(2, 5, 16, 40).to(torch.float32, impl.device)
    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    with torch.autocast(impl.device, torch.bfloat16):
        logps = linear_token_logps(*inputs, problem.labels, backend=impl.backend)
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = linear_token_logps(*half, problem.labels, backend=impl.backend)
    assert torch.equal(logps, expected)
    grads = torch.autograd.grad(logps.sum(), inputs)
    assert [g.dtype for g in grads] == [torch.float32] * 2
    for g, e in zip(grads, torch.autograd.grad(expected.sum(), half), strict=True):
        assert torch.equal(g, e.float())


@every_kernel
@pytest.mark.parametrize("stash_bytes", [0, 1 << 20])
def test_compile_fullgraph(impl: Implementation, stash_bytes: int) -> None:
    torch._dynamo.reset()
    problem = make_problem(4, 6, 8, 40).to(torch.float32, impl.device)
    problem.labels[:, :2] = IGNORE
    sums = torch.full((2,), -5.0, device=impl.device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_dil_loss(
            hidden,
            weight,
            problem.labels,
            ref_chosen_logps=sums,
            ref_rejected_logps=sums,
            stash_bytes=stash_bytes,
            final_logit_softcapping=10.0,
            backend=impl.backend,
        ).loss

    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    for g, e in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


@every_kernel
def test_opcheck(impl: Implementation) -> None:
    problem = make_problem(1, 9, 8, 40, bias=True).to(torch.float32, impl.device)
    hidden, targets = problem.hidden[0], problem.labels[0].clone()
    targets[2:4] = IGNORE
    how = (0.5, 9.0, 1.5, 4, 32)
    forward = (hidden, problem.weight, problem.bias, targets, 8, 3, IGNORE, True, True, *how)
    op, backward = (op.on(impl.backend, hidden) for op in (LINEAR_LOGPS_FWD, LINEAR_LOGPS_BWD))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, forward, test_utils=checks)
    _, _, *saved = op(*forward)
    grad = torch.randn(9, device=impl.device)
    inputs = (grad, hidden, problem.weight, problem.bias, targets, *saved, True, True, True, *how)
    torch.library.opcheck(backward, inputs, test_utils=checks)


def test_gradcheck(small_tiles) -> None:
    problem = make_problem(1, 7, 5, 70, bias=True)
    problem.labels[0, 2] = IGNORE
    for stash_bytes in (0, 2 * 128 * 8, 1 << 20):

        def logps(hidden: Tensor, weight: Tensor, bias: Tensor, stash_bytes: int = stash_bytes) -> Tensor:
            return linear_token_logps(
                hidden,
                weight,
                problem.labels,
                lm_head_bias=bias,
                final_logit_softcapping=3.0,
                logit_scale=0.7,
                temperature=1.2,
                stash_bytes=stash_bytes,
                backend="cpp",
            )

        inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
        assert torch.autograd.gradcheck(logps, inputs)
