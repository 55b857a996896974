"""Every int64 is an ignore_index, those that no float holds included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from implementations import Implementation, every_implementation
from torch import Tensor

from dil_kernels import (
    fused_dil_loss,
    fused_linear_dil_loss,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    token_logps,
)

IGNORED = (-(2**63), -(2**53) - 1, -1, 0, 2**53 + 1, 2**63 - 1)
CU_SEQLENS = torch.tensor([0, 5, 5, 9, 12], dtype=torch.int32)
SUMS = torch.tensor([-8.0, -6.0])


def reference_on(device: torch.device) -> dict[str, Tensor]:
    return {"ref_chosen_logps": SUMS.to(device), "ref_rejected_logps": SUMS.to(device)}


Call = Callable[..., Tensor]
CALLS: dict[str, Call] = {
    "token_logps": lambda hidden, weight, labels, **how: token_logps(hidden @ weight.t(), labels, **how),
    "sequence_logps": lambda hidden, weight, labels, **how: sequence_logps(
        hidden @ weight.t(), labels, average_log_prob=True, **how
    ),
    "fused_dil_loss": lambda hidden, weight, labels, **how: (
        fused_dil_loss(hidden @ weight.t(), labels, **reference_on(weight.device), **how).loss
    ),
    "linear_token_logps": linear_token_logps,
    "linear_sequence_logps": lambda *inputs, **how: linear_sequence_logps(*inputs, average_log_prob=True, **how),
    "fused_linear_dil_loss": lambda *inputs, **how: (
        fused_linear_dil_loss(*inputs, **reference_on(inputs[0].device), **how).loss
    ),
}


def problem(name: str, *, packed: bool) -> tuple[list[Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states and weight; labels that are all at least 1; which of them are ignored; boundaries."""
    gen = torch.Generator().manual_seed(0)
    shape = (12,) if packed else (4, 3)
    inputs = [torch.randn(*shape, 8, generator=gen), torch.randn(20, 8, generator=gen)]
    labels = torch.randint(1, 20, shape, generator=gen)
    ignored = torch.rand(shape, generator=gen) < 0.3
    return inputs, labels, ignored, {"cu_seqlens": CU_SEQLENS} if packed and "token" not in name else {}


@every_implementation
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_every_int64_is_ignored_alike(impl: Implementation, name: str, shift: bool, packed: bool) -> None:
    inputs, labels, ignored, boundaries = problem(name, packed=packed)
    results = []
    for ignore_index in (-100, *IGNORED):
        hidden, weight = (x.to(impl.device).requires_grad_() for x in inputs)
        marked = labels.masked_fill(ignored, ignore_index).to(impl.device)
        options = {"ignore_index": ignore_index, "shift": shift, "backend": impl.backend}
        boundaries = {key: value.to(impl.device) for key, value in boundaries.items()}
        result = CALLS[name](hidden, weight, marked, **options, **boundaries)
        upstream = torch.linspace(1.0, 2.0, result.numel(), device=impl.device).view(result.shape)
        results.append([result.detach(), *torch.autograd.grad(result, [hidden, weight], upstream)])
    assert all(x.isfinite().all() for x in results[0])
    for ignore_index, result in zip(IGNORED, results[1:], strict=True):
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual, expected), f"ignore_index={ignore_index}"


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ignore_index", [2**53 + 1, -(2**53) - 1, 2**63 - 1])
def test_its_neighbour_is_a_wrong_label(name: str, backend: str, ignore_index: int) -> None:
    inputs, labels, _, _ = problem(name, packed=False)
    labels[1, 2] = ignore_index - 1
    with pytest.raises(ValueError, match=rf"or ignore_index={ignore_index}, got {ignore_index - 1}"):
        CALLS[name](*inputs, labels, ignore_index=ignore_index, backend=backend)
