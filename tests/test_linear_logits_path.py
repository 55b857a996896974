"""The head without the logits gives the log-probs and losses of the path through the logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation, every_implementation, every_kernel
from linear_problems import make_problem
from problems import IGNORE, boundaries

from dil_kernels import (
    fused_dil_loss,
    fused_linear_dil_loss,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    token_logps,
)

pytestmark = pytest.mark.usefixtures("nan_poisoned")


@every_kernel
@given(data=st.data())
@settings(max_examples=15)
def test_equals_the_logits_path(impl: Implementation, data: st.DataObject) -> None:
    problem = make_problem(2, 6, 16, data.draw(st.sampled_from((17, 100, 1000))), shift=True, seed=3).to(
        torch.float32, impl.device
    )
    problem.labels[0, :3] = IGNORE
    options = {"temperature": 0.8, "backend": impl.backend}
    inputs = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    logits = inputs[0] @ inputs[1].t()
    expected = token_logps(logits, problem.labels, **options)
    actual = linear_token_logps(*inputs, problem.labels, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = problem.upstream.to(actual.dtype)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        linear_sequence_logps(*inputs, problem.labels, average_log_prob=True, **options),
        sequence_logps(logits, problem.labels, average_log_prob=True, **options),
        rtol=1e-5,
        atol=1e-5,
    )


@every_implementation
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_ref_states", [False, True])
@given(data=st.data())
@settings(max_examples=10)
def test_fused_loss_equals_the_loss_of_the_logits(
    impl: Implementation, packed: bool, with_ref_states: bool, data: st.DataObject
) -> None:
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    B, D, V = 2, 8, 50
    if packed:
        lengths = data.draw(boundaries(num_sequences=2 * B))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        shape: tuple[int, ...] = (sum(lengths),)
    else:
        cu_seqlens, shape = None, (2 * B, 6)
    hidden = torch.randn(*shape, D, generator=gen)
    ref_hidden = torch.randn(*shape, D + 1, generator=gen)
    weight, ref_weight = torch.randn(V, D, generator=gen) / 4, torch.randn(V, D + 1, generator=gen) / 4
    labels = torch.randint(0, V, shape, generator=gen)
    labels[torch.rand(shape, generator=gen) < 0.3] = IGNORE
    move = [x.to(impl.device) for x in (hidden, weight, ref_hidden, ref_weight, labels)]
    hidden, weight, ref_hidden, ref_weight, labels = move
    common = {
        "loss_type": data.draw(st.sampled_from(("lsif", "bce", "dpo"))),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(impl.device),
        "pair_layout": data.draw(st.sampled_from(("concatenated", "interleaved"))),
        "average_log_prob": True,  # sums of LSIF would amplify every rounding
    }
    reference = {"ref_hidden_states": ref_hidden, "ref_lm_head_weight": ref_weight}
    logits_reference = {"ref_logits": (ref_hidden.double() @ ref_weight.double().t()).cpu()}
    if not with_ref_states:
        sums = torch.randn(2, B, generator=gen) - 10
        reference = {"ref_chosen_logps": sums[0].to(impl.device), "ref_rejected_logps": sums[1].to(impl.device)}
        logits_reference = {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    out = fused_linear_dil_loss(*inputs, labels, backend=impl.backend, **common, **reference)
    grads = torch.autograd.grad(out.loss, inputs)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    truth = fused_dil_loss(
        exact[0] @ exact[1].t(),
        labels.cpu(),
        backend="eager",
        **{**common, "cu_seqlens": cu_seqlens},
        **logits_reference,
    )
    for name, a, t in zip(out._fields, out, truth, strict=True):
        torch.testing.assert_close(
            a.cpu().double(), t.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for g, t in zip(grads, torch.autograd.grad(truth.loss, exact), strict=True):
        # Terms cancel; LSIF's are as large as e^(2u), 1e6 and more for a single token far from the reference.
        atol = 1e-5 * max(1.0, t.abs().max().item())
        torch.testing.assert_close(g.cpu().double(), t, rtol=1e-4, atol=atol)
