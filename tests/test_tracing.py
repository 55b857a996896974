"""Every public function under torch.compile with shapes and options that change, on meta tensors and on fake ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from public_calls import CALLS, Call, parameters_of, public_functions
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import dil_kernels

SIZES = (4, 6)


def every_call(*backends: str) -> pytest.MarkDecorator:
    """Every call with each of these backends that it knows."""
    return pytest.mark.parametrize(
        ("call", "backend"),
        [
            pytest.param(call, {"backend": backend} if backend else {}, id=f"{call}-{backend}")
            for call in CALLS
            for backend in call.backends or ("",)
            if backend in backends or not backend
        ],
    )


@pytest.mark.parametrize("function", public_functions())
def test_every_argument_is_in_some_call(function: Any) -> None:
    calls = [call for call in CALLS if call.function is function]
    tensors = set().union(*(call.make(4) for call in calls))
    assert tensors == parameters_of(function, "Tensor")
    varying = set().union(*(call.varying for call in calls))
    # What only losses and links of pairs have.
    refused = {"scale", "label_smoothing"} if function is dil_kernels.unpaired_dil_loss else set()
    assert varying >= (parameters_of(function, "float") | parameters_of(function, "int")) - refused


def outputs_and_gradients(call: Call, run: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    outputs = run(tensors, options)
    differentiable = [x for x in outputs if x.requires_grad]
    inputs = [tensors[name] for name in call.gradients]
    # The device is given, as `torch.device` may not reach linspace: transformers replaces that while it loads a model,
    # and torch keeps the functions that it reaches as they were when it first asked for them.
    upstream = [torch.linspace(1.0, 2.0, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, inputs, upstream) if inputs else ()
    return [x.detach() for x in (*outputs, *gradients)]


def assert_compiled_as_called(call: Call, options: dict[str, Any], **how: Any) -> None:
    """Calls of other shapes and options through one compiled function."""
    torch._dynamo.reset()
    compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager", **how)
    for turn, size in enumerate(SIZES):
        given = call.options(turn) | options
        actual, expected = (
            outputs_and_gradients(call, run, call.inputs(size, turn), given) for run in (compiled, call.run)
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@every_call("cpp", "auto")
def test_dynamic_shapes_and_options(call: Call, backend: dict[str, str]) -> None:
    assert_compiled_as_called(call, backend, dynamic=True)


@every_call("eager")
def test_shapes_and_options_that_change(call: Call, backend: dict[str, str]) -> None:
    assert_compiled_as_called(call, backend)


def compiled_calls(run: Any, values: Sequence[Any], **how: Any) -> int:
    """How often torch compiles for calls with these values, which agree with those of no compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, **how)
    logits, labels = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    for value in values:
        torch.testing.assert_close(compiled(logits, labels, value), run(logits, labels, value))
    return counter.frame_count


@pytest.mark.parametrize("dynamic", [None, True])
def test_what_torch_compiles_anew(dynamic: bool | None) -> None:
    many = [0.5 + i / 8 for i in range(torch._dynamo.config.recompile_limit + 2)]

    def tempered(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return dil_kernels.token_logps(logits, labels, temperature=temperature)

    def scaled(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
        return dil_kernels.token_logps(logits * scale, labels)

    def bounded(logits: Tensor, labels: Tensor, most: int) -> Tensor:
        return dil_kernels.linear_token_logps(logits, logits[0], labels % 5, max_scored_tokens=most, stash_bytes=most)

    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled_calls(tempered, many, dynamic=dynamic)
    with torch._dynamo.config.patch(recompile_limit=2 * len(many)):
        assert compiled_calls(tempered, many, dynamic=dynamic) >= len(many)
    assert compiled_calls(scaled, many, dynamic=dynamic) <= 2
    assert compiled_calls(bounded, [10 * i for i in range(1, len(many) + 1)], dynamic=dynamic) <= 2


@every_call("cpp", "triton", "auto", "eager")
def test_fake_tensors(call: Call, backend: dict[str, str]) -> None:
    options = call.options(0) | backend
    expected = outputs_and_gradients(call, call.run, call.inputs(4), options)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(x) for name, x in call.inputs(4).items()}
        actual = outputs_and_gradients(call, call.run, tensors, options)
    assert_alike(actual, expected, "cpu")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_meta_tensors(call: Call) -> None:
    options = call.options(0)
    expected = outputs_and_gradients(call, call.run, call.inputs(4), options)
    with torch.device("meta"):
        tensors = {name: x.detach().to("meta").requires_grad_(x.requires_grad) for name, x in call.inputs(4).items()}
        actual = outputs_and_gradients(call, call.run, tensors, options)
    assert_alike(actual, expected, "meta")


def assert_alike(actual: list[Tensor], expected: list[Tensor], device: str) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (e.shape, e.dtype, device)
