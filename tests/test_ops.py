"""The torch.library ops: schemas and fakes by opcheck, tracing by torch.compile, gradients by gradcheck."""

from __future__ import annotations

import itertools

import implementations
import pytest
import torch
from implementations import Implementation, every_implementation, every_kernel
from torch.autograd import forward_ad

from dil_kernels import dil_loss, fused_dil_loss, linear_token_logps, sequence_logps, token_logps
from dil_kernels.losses import LossParameters, divergence_names
from dil_kernels.ops.logps import LOGPS_BWD, LOGPS_BWD_INPLACE, LOGPS_FWD

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


def logps_inputs(device: str, dtype: torch.dtype = torch.float32):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 33, generator=gen).to(device, dtype)
    labels = torch.randint(0, 33, (2, 4), generator=gen).to(device)
    labels[0, 1] = -100
    return logits, labels


@every_kernel
@pytest.mark.parametrize(("shift", "softcapping", "statistics"), [(True, 0.0, True), (False, 5.0, False)])
def test_opcheck_logps(impl: Implementation, shift: bool, softcapping: float, statistics: bool) -> None:
    logits, labels = logps_inputs(impl.device)
    how = (-100, shift, softcapping, 0.7)
    forward = LOGPS_FWD.on(impl.backend, logits)
    torch.library.opcheck(forward, (logits, labels, *how, statistics), test_utils=OPCHECKS)
    logps, row_max, log_sum, _ = forward(logits, labels, *how, statistics)
    grad = torch.randn_like(logps)
    for op in (LOGPS_BWD, LOGPS_BWD_INPLACE):
        backward = op.on(impl.backend, logits)
        torch.library.opcheck(backward, (grad, logits.clone(), labels, row_max, log_sum, *how), test_utils=OPCHECKS)


@pytest.mark.parametrize("impl", [p for p in implementations.LOSSES if p.values[0].backend != "eager"])
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck_density_ratio(impl: Implementation, packed: bool) -> None:
    ops = torch.ops.dil_kernels
    shape = (11,) if packed else (4, 5)
    token_logps = torch.randn(shape, device=impl.device)
    labels = torch.randint(-1, 3, (12,) if packed else (4, 6), device=impl.device)
    cu_seqlens = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32, device=impl.device) if packed else None
    sides = torch.tensor([True, False, False, True], device=impl.device)
    references = ((torch.randn_like(token_logps), None), (None, torch.randn(4, device=impl.device).double()))
    for ref, is_chosen in itertools.product(references, (None, sides)):
        parameters = LossParameters("lsif", alpha=0.5, max_log_ratio=3.0, rejected_weight=2.0)
        flags = (True, False, True, -1, True)
        inputs = (token_logps, labels, cu_seqlens, *ref, is_chosen, *parameters, *flags)
        torch.library.opcheck(ops.density_ratio_fwd.default, inputs, test_utils=OPCHECKS)
        loss, _, logratios, _, lengths, counts, coefs = ops.density_ratio_fwd(*inputs)
        grads = (torch.ones_like(loss), None, torch.randn_like(logratios), None)
        inputs = (*grads, token_logps, labels, cu_seqlens, is_chosen, lengths, counts, coefs, *flags)
        torch.library.opcheck(ops.density_ratio_bwd.default, inputs, test_utils=OPCHECKS)


@every_implementation
@pytest.mark.parametrize(("packed", "with_sums"), [(True, False), (False, True)])
def test_compile_fullgraph(impl: Implementation, packed: bool, with_sums: bool) -> None:
    torch._dynamo.reset()

    def step(logits, labels, ref_logits, cu_seqlens, chosen, rejected):
        ref = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected} if with_sums else {"ref_logits": ref_logits}
        # Ops around the call, so that the graph holds more than it.
        out = fused_dil_loss(logits * 2, labels, cu_seqlens=cu_seqlens, backend=impl.backend, **ref)
        return out.loss * 3, out.chosen_rewards - out.rejected_rewards

    compiled = torch.compile(step, fullgraph=True)
    for T in (6, 9):  # the second length makes the shapes dynamic
        gen = torch.Generator().manual_seed(T)
        shape = (4 * T,) if packed else (4, T)
        labels = torch.randint(0, 19, shape, generator=gen).to(impl.device)
        ref, base = (torch.randn(*shape, 19, generator=gen).to(impl.device) for _ in range(2))
        sums = torch.randn(2, 2, generator=gen).to(impl.device)
        cu = torch.tensor([0, T, T + 1, 3 * T, 4 * T], dtype=torch.int32, device=impl.device) if packed else None
        results = []
        for function in (step, compiled):
            logits = base.clone().requires_grad_()
            loss, margins = function(logits, labels, ref, cu, *sums)
            loss.backward()
            results.append((loss.detach(), margins.detach(), logits.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@every_implementation
def test_compile_fullgraph_of_the_other_functions(impl: Implementation) -> None:
    torch._dynamo.reset()
    logits, labels = logps_inputs(impl.device)
    loss_backend = "eager" if impl.backend == "eager" else "auto"

    def step(x):
        w, l = sequence_logps(x, labels, backend=impl.backend).chunk(2)
        tokens, statistics = token_logps(
            x, labels, final_logit_softcapping=20.0, return_statistics=True, backend=impl.backend
        )
        return (
            dil_loss(w, l, w.detach() - 1, l.detach() + 1, loss_type="bce", reduction="mean", backend=loss_backend)[0]
            + (tokens * statistics.entropy * statistics.top1_hit).sum()
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x = logits.clone().requires_grad_()
        function(x).backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_compile_fullgraph_of_unpaired_responses(backend: str) -> None:
    torch._dynamo.reset()
    logits, labels = logps_inputs("cpu")
    is_chosen = torch.tensor([True, False])

    def step(x):
        options = {"loss_type": "power", "power": -0.5, "alpha": 0.5, "max_log_ratio": 2.0, "chosen_weight": 2.0}
        out = fused_dil_loss(
            x, labels, ref_logits=logits, is_chosen=is_chosen, non_negative=0.9, backend=backend, **options
        )
        return out.loss + out.share(out.counts)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x = (2 * logits).requires_grad_()
        function(x).backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0])


def test_compile_fullgraph_with_changing_options() -> None:
    torch._dynamo.reset()
    logits, labels = logps_inputs("cpu")

    def step(x, temperature, beta, cap):
        how = {"temperature": temperature, "final_logit_softcapping": cap}
        return fused_dil_loss(x, labels, ref_logits=logits, loss_type="dpo", beta=beta, **how, backend="cpp").loss

    compiled, moved = torch.compile(step, fullgraph=True), logits + torch.randn_like(logits)
    for value in (1.0, 0.7, 0.4):
        torch.testing.assert_close(compiled(moved, value, value, 4 * value), step(moved, value, value, 4 * value))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("softcapping", [None, 2.0])
def test_gradcheck_of_cpp_logps(shift: bool, softcapping: float | None) -> None:
    logits, labels = logps_inputs("cpu", torch.float64)

    def f(x):
        return token_logps(x, labels, shift=shift, final_logit_softcapping=softcapping, temperature=1.3, backend="cpp")

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(),))


@pytest.mark.parametrize("loss_type", divergence_names())
def test_gradcheck_of_the_fused_loss(loss_type: str) -> None:
    logits, labels = logps_inputs("cpu", torch.float64)
    ref = torch.randn_like(logits)

    def f(x):
        out = fused_dil_loss(x, labels, ref_logits=ref, loss_type=loss_type)
        return out.loss, out.losses, out.chosen_logps, out.rejected_rewards

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(),))


@every_kernel
def test_second_derivatives_are_refused(impl: Implementation) -> None:
    logits, labels = logps_inputs(impl.device)
    logits.requires_grad_()
    logps = token_logps(logits, labels, backend=impl.backend)
    with pytest.raises(RuntimeError, match="token_logps can be differentiated once"):
        torch.autograd.grad(logps.sum(), logits, create_graph=True)
    w, l = torch.zeros(2, 1, device=impl.device, requires_grad=True)
    loss = dil_loss(w, l, w.detach(), l.detach(), reduction="sum")[0]
    with pytest.raises(RuntimeError, match="density-ratio loss can be differentiated once"):
        torch.autograd.grad(loss, w, create_graph=True)


@every_kernel
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_derivatives_are_refused(impl: Implementation, requires_grad: bool) -> None:
    logits, labels = logps_inputs(impl.device)
    w, l = torch.zeros(2, 1, device=impl.device)
    with forward_ad.dual_level():
        x, u = (forward_ad.make_dual(t.requires_grad_(requires_grad), torch.ones_like(t)) for t in (logits, w))
        with pytest.raises(NotImplementedError, match="jvp"):
            token_logps(x, labels, backend=impl.backend)
        with pytest.raises(NotImplementedError, match="jvp"):
            dil_loss(u, l, w.detach(), l, reduction="sum")


@every_kernel
def test_transforms_of_torch_func_are_refused(impl: Implementation) -> None:
    """What they hand over does not say that it requires a gradient: a call without its Function would drop it."""
    logits, labels = logps_inputs(impl.device)
    hidden, weight = torch.randn(3, *labels.shape, 8, device=impl.device), torch.randn(33, 8, device=impl.device)
    w, l = torch.zeros(2, 3, 1, device=impl.device)
    calls = (
        (lambda x: token_logps(x, labels, backend=impl.backend), torch.stack([logits] * 3)),
        (lambda x: linear_token_logps(x, weight, labels, max_scored_tokens=9, backend=impl.backend), hidden),
        (lambda x: dil_loss(x, l[0], x, l[0], reduction="sum")[0], w),
    )
    for call, inputs in calls:
        for transform in (lambda x, call=call: torch.func.vmap(call)(x).sum(), lambda x, call=call: call(x[0]).sum()):
            with pytest.raises(RuntimeError, match="functorch"):
                torch.func.grad(transform)(inputs)


@every_kernel
def test_repeated_backward_out_of_place(impl: Implementation) -> None:
    logits, labels = logps_inputs(impl.device)
    logits.requires_grad_()
    logps = token_logps(logits, labels, backend=impl.backend)
    first, second = (torch.autograd.grad(logps.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_kernel
def test_inplace_backward(impl: Implementation) -> None:
    hidden, labels = logps_inputs(impl.device)
    weight = torch.randn(33, 33, device=impl.device)
    grads = []
    for inplace in (False, True):
        h = hidden.clone().requires_grad_()
        logits = h @ weight
        address = logits.data_ptr()
        logps = token_logps(logits, labels, inplace_backward=inplace, backend=impl.backend)
        seen: list[int] = []
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        logps.square().sum().backward(retain_graph=True)
        assert (seen[0] == address) == inplace
        grads.append(h.grad)
    torch.testing.assert_close(grads[1], grads[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.square().sum().backward()


@every_kernel
def test_inplace_backward_runs_once_under_saved_tensor_hooks_too(impl: Implementation) -> None:
    hidden, labels = logps_inputs(impl.device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # which leave out autograd's version check
        logits = hidden.requires_grad_() * 1
        logps = token_logps(logits, labels, inplace_backward=True, backend=impl.backend)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        logps.sum().backward()


def copies(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def same(x: torch.Tensor) -> torch.Tensor:
    return x


HOOKS = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "the same tensor": lambda: torch.autograd.graph.saved_tensors_hooks(same, same),
    "a copy": lambda: torch.autograd.graph.saved_tensors_hooks(copies, same),
    "one copy for all": lambda: torch.autograd.graph.saved_tensors_hooks(copies, lambda x: x.view_as(x)),
}


@every_kernel
@pytest.mark.parametrize("hooks", HOOKS)
def test_inplace_backward_under_saved_tensor_hooks(impl: Implementation, hooks: str) -> None:
    """They leave out autograd's version check, so that only a buffer of its own keeps other users' numbers right."""
    hidden, labels = logps_inputs(impl.device)
    exact = hidden.double().cpu().requires_grad_()
    exact_logits = exact * 1
    exact_logps = token_logps(exact_logits, labels.cpu(), backend="eager")
    (exact_logps.square().sum() + exact_logits.square().sum()).backward()
    for order in ("before", "after"):
        h = hidden.clone().requires_grad_()
        with HOOKS[hooks]():
            logits = h * 1
            other = logits.square().sum() if order == "before" else 0.0
            logps = token_logps(logits, labels, inplace_backward=True, backend=impl.backend)
            other = logits.square().sum() if order == "after" else other
            logps = logps.square().sum()
        (logps + other).backward()
        torch.testing.assert_close(h.grad.double().cpu(), exact.grad, rtol=1e-5, atol=1e-5)


@every_kernel
def test_inplace_backward_of_the_loss_under_saved_tensor_hooks(impl: Implementation) -> None:
    hidden, labels = logps_inputs(impl.device)
    ref = -torch.ones(1, device=impl.device)
    grads = []
    for inplace in (False, True):
        h = hidden.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            logits = h * 1
            out = fused_dil_loss(
                logits,
                labels,
                ref_chosen_logps=ref,
                ref_rejected_logps=ref,
                inplace_backward=inplace,
                backend=impl.backend,
            )
            loss = out.loss + logits.square().sum()
        loss.backward()
        grads.append(h.grad)
    assert torch.equal(*grads)


@every_kernel
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_that_changed_behind_saved_tensor_hooks(impl: Implementation, inplace: bool) -> None:
    hidden, labels = logps_inputs(impl.device)
    logits = hidden.requires_grad_() * 1
    overwriting = token_logps(logits, labels, inplace_backward=True, backend=impl.backend)
    with torch.autograd.graph.saved_tensors_hooks(same, same):
        logps = token_logps(logits, labels, inplace_backward=inplace, backend=impl.backend)
    overwriting.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@every_kernel
def test_inplace_backward_never_corrupts_another_user_of_the_logits(impl: Implementation) -> None:
    hidden, labels = logps_inputs(impl.device)
    logits = hidden.requires_grad_().exp()  # exp needs its own output for its backward
    logps = token_logps(logits, labels, inplace_backward=True, backend=impl.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@every_kernel
def test_inplace_backward_refusals(impl: Implementation) -> None:
    logits, labels = logps_inputs(impl.device)

    def run(x, backend=impl.backend):
        return token_logps(x, labels, inplace_backward=True, backend=backend)

    leaf = torch.zeros(2, 6, 33, device=impl.device, requires_grad=True)
    for overwritten in (logits.clone().requires_grad_(), leaf[:, :4], leaf[:, 2:].view(2, 4, 33)):
        with pytest.raises(ValueError, match="leaf"):
            run(overwritten)
    with pytest.raises(ValueError, match="overlapping"):
        run((logits[:1] * 1).expand(2, 4, 33))
    with pytest.raises(ValueError, match="overlapping"):
        run(torch.zeros(500, device=impl.device).as_strided((2, 4, 33), (100, 20, 1)))
    with pytest.raises(ValueError, match="contiguous vocabulary"):
        run(logits.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() * 1)
    with pytest.raises(RuntimeError, match="eager"):
        run(logits, backend="eager")
    with pytest.raises(Exception, match=r"torch\.compile"):
        torch.compile(run, fullgraph=True)(logits)
