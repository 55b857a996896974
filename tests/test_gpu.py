"""What only a GPU can show: no host sync, CUDA graphs, repeatability, few rows and many, launches, sanitizer cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from tolerance import assert_as_exact_as_eager
from torch import Tensor

from dil_kernels import (
    dil_loss,
    fused_dil_loss,
    fused_linear_dil_loss,
    linear_token_logps,
    sequence_logps,
    token_logps,
)
from dil_kernels.losses import LossParameters, divergence_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
DEVICE = "cuda"
LSIF = LossParameters("lsif")


@dataclass
class Batch:
    """Pairs, padded and packed: the same tokens under both layouts."""

    logits: Tensor  # [2B, T, V], a leaf
    ref_logits: Tensor  # [2B, T, V]
    labels: Tensor  # [2B, T]
    ref_sums: Tensor  # [2, B]
    flat_logits: Tensor  # [2B * T, V], a leaf
    flat_ref_logits: Tensor  # [2B * T, V]
    flat_labels: Tensor  # [2B * T]
    cu_seqlens: Tensor  # [2B + 1]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.logits, self.flat_logits]


def make_batch(B: int, T: int, V: int, dtype: torch.dtype = torch.bfloat16) -> Batch:
    gen = torch.Generator(DEVICE).manual_seed(0)
    logits, ref = (torch.randn(2 * B, T, V, device=DEVICE, generator=gen, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, V, (2 * B, T), device=DEVICE, generator=gen)
    labels[:, : T // 2] = -100
    return Batch(
        logits=logits.requires_grad_(),
        ref_logits=ref,
        labels=labels,
        ref_sums=-T * torch.rand(2, B, device=DEVICE, generator=gen),
        flat_logits=logits.detach().clone().view(-1, V).requires_grad_(),
        flat_ref_logits=ref.view(-1, V),
        flat_labels=labels.flatten(),
        cu_seqlens=torch.arange(0, 2 * B * T + 1, T, dtype=torch.int32, device=DEVICE),
    )


def head_output(leaf: Tensor) -> Tensor:
    """Logits that may be overwritten: not a leaf, and needed by no other backward."""
    return leaf * 1


def fused_packed(b: Batch, **options) -> tuple[Tensor, ...]:
    return fused_dil_loss(
        b.flat_logits, b.flat_labels, ref_logits=b.flat_ref_logits, cu_seqlens=b.cu_seqlens, **options
    )


def thin_loss(b: Batch) -> tuple[Tensor, ...]:
    """The loss that trainers call, on sums that carry a gradient."""
    chosen, rejected = sequence_logps(b.logits, b.labels, average_log_prob=True).chunk(2)
    return dil_loss(chosen, rejected, b.ref_sums[0] / 10, b.ref_sums[1] / 10)


def alternating(labels: Tensor) -> Tensor:
    return torch.arange(labels.shape[0], device=labels.device) % 2 == 0


def head_of(b: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states [2B, T, 8] and a weight [V, 8] that depend on the leaf."""
    V = b.logits.shape[-1]
    return b.logits[..., :8], b.logits.flatten()[: 8 * V].view(V, 8)


def fused_linear(b: Batch, **options) -> tuple[Tensor, ...]:
    hidden, weight = head_of(b)
    return fused_linear_dil_loss(
        hidden,
        weight,
        b.labels,
        ref_hidden_states=hidden.detach() / 2,
        ref_lm_head_weight=weight.detach(),
        max_scored_tokens=b.labels.numel(),
        **options,
    )


def logps_and_statistics(b: Batch) -> tuple[Tensor, ...]:
    logps, statistics = token_logps(b.logits, b.labels, final_logit_softcapping=20.0, return_statistics=True)
    return logps, *statistics


def linear_statistics(b: Batch) -> tuple[Tensor, ...]:
    logps, statistics = linear_token_logps(
        *head_of(b), b.labels, max_scored_tokens=b.labels.numel(), stash_bytes=0, return_statistics=True
    )
    return logps, *statistics


# Every fused call of a training step. What a call returns without a gradient is compared and not differentiated.
FUSED_CALLS: dict[str, Callable[[Batch], tuple[Tensor, ...]]] = {
    "token_logps": lambda b: (token_logps(b.logits, b.labels),),
    "token_logps, temperature": lambda b: (token_logps(b.logits, b.labels, temperature=0.7),),
    "token_logps, statistics": lambda b: logps_and_statistics(b),
    "sequence_logps": lambda b: (sequence_logps(b.logits, b.labels),),
    "sequence_logps, packed": lambda b: (
        sequence_logps(b.flat_logits, b.flat_labels, cu_seqlens=b.cu_seqlens, average_log_prob=True),
    ),
    "dil_loss": thin_loss,
    "fused_dil_loss, lsif": lambda b: fused_dil_loss(b.logits, b.labels, ref_logits=b.ref_logits),
    "fused_dil_loss, dpo": lambda b: fused_dil_loss(b.logits, b.labels, ref_logits=b.ref_logits, loss_type="dpo"),
    "fused_dil_loss, reference sums": lambda b: fused_dil_loss(
        b.logits, b.labels, ref_chosen_logps=b.ref_sums[0], ref_rejected_logps=b.ref_sums[1], loss_type="bce"
    ),
    "fused_dil_loss, unpaired": lambda b: fused_dil_loss(
        b.logits, b.labels, ref_logits=b.ref_logits, is_chosen=alternating(b.labels), non_negative=0.5
    ),
    "fused_dil_loss, softcap": lambda b: fused_dil_loss(
        b.logits, b.labels, ref_logits=b.ref_logits, final_logit_softcapping=20.0
    ),
    "fused_dil_loss, packed": fused_packed,
    "fused_dil_loss, packed dpo": lambda b: fused_packed(b, loss_type="dpo", reduction="sum"),
    "fused_dil_loss, non-negative": lambda b: fused_dil_loss(
        b.logits, b.labels, ref_logits=b.ref_logits, non_negative=0.5
    ),
    "linear, stash": lambda b: fused_linear(b, stash_bytes=1 << 30),
    "linear, recomputed": lambda b: fused_linear(b, stash_bytes=0, final_logit_softcapping=20.0),
    "linear, statistics": lambda b: linear_statistics(b),
}
IN_PLACE_CALLS: dict[str, Callable[[Batch], tuple[Tensor, ...]]] = {
    "token_logps, in place": lambda b: (token_logps(head_output(b.logits), b.labels, inplace_backward=True),),
    "fused_dil_loss, in place": lambda b: fused_dil_loss(
        head_output(b.logits), b.labels, ref_logits=b.ref_logits, inplace_backward=True
    ),
}
every_fused_call = pytest.mark.parametrize("name", [*FUSED_CALLS, *IN_PLACE_CALLS])
every_traceable_call = pytest.mark.parametrize("name", FUSED_CALLS)


def call_of(name: str) -> Callable[[Batch], tuple[Tensor, ...]]:
    return FUSED_CALLS[name] if name in FUSED_CALLS else IN_PLACE_CALLS[name]


def step(call: Callable[[Batch], tuple[Tensor, ...]], batch: Batch) -> list[Tensor]:
    """Outputs, and the gradient of those that have one under an upstream gradient that differs by element."""
    outputs = call(batch)
    heads = [out for out in outputs if out.requires_grad]
    upstream = [torch.linspace(-1.0, 2.0, out.numel(), device=out.device).view(out.shape) for out in heads]
    grads = torch.autograd.grad(heads, batch.leaves, upstream, allow_unused=True)
    return [out.detach() for out in outputs] + [grad for grad in grads if grad is not None]


def assert_equal_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@every_fused_call
def test_no_host_sync(name: str) -> None:
    call, batch = call_of(name), make_batch(2, 16, 1000)
    step(call, batch)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss_type", divergence_names())
def test_no_host_sync_of_any_loss(loss_type: str) -> None:
    batch = make_batch(2, 16, 1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(lambda b: fused_dil_loss(b.logits, b.labels, ref_logits=b.ref_logits, loss_type=loss_type), batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_fused_call
def test_cuda_graph_capture_and_replay(name: str) -> None:
    call, batch = call_of(name), make_batch(2, 16, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(call, batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, batch)
    for seed in (1, 2):
        gen = torch.Generator(DEVICE).manual_seed(seed)
        with torch.no_grad():
            for leaf in batch.leaves:
                leaf.copy_(torch.randn(leaf.shape, device=DEVICE, generator=gen))
        graph.replay()
        replayed = [value.clone() for value in captured]
        assert_equal_bits(replayed, step(call, batch))


@every_fused_call
@pytest.mark.parametrize("sizes", [(4, 64, 32000), (1, 8, 128256)])
def test_bitwise_repeatability(name: str, sizes: tuple[int, int, int]) -> None:
    call, batch = call_of(name), make_batch(*sizes)
    first = step(call, batch)
    for _ in range(3):
        assert_equal_bits(step(call, batch), first)


@every_traceable_call
def test_traces_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    batch = make_batch(2, 16, 1000)
    compiled = torch.compile(FUSED_CALLS[name], fullgraph=True)
    for actual, expected in zip(step(compiled, batch), step(FUSED_CALLS[name], batch), strict=True):
        rtol = 1e-5 if actual.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6)


def check_rows(logits: Tensor, labels: Tensor) -> None:
    """Log-probs and gradient of [N, V] against fp64, no worse than eager in the same dtype."""
    grad_logps = torch.linspace(-1.0, 2.0, len(labels), device=DEVICE)
    results = []
    for backend, dtype in (("auto", logits.dtype), ("eager", logits.dtype), ("eager", torch.float64)):
        x = logits.detach().to(dtype).requires_grad_()
        logps = token_logps(x, labels, shift=False, backend=backend)
        (grad,) = torch.autograd.grad(logps, x, grad_logps.to(logps.dtype))
        results.append((logps.detach(), grad))
    (logps, grad), (eager_logps, eager_grad), (true_logps, true_grad) = results
    assert_as_exact_as_eager(logps, eager_logps, true_logps, "log-probs")
    assert_as_exact_as_eager(grad, eager_grad, true_grad, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 131, 512])
def test_few_rows(rows: int, dtype: torch.dtype) -> None:
    gen = torch.Generator(DEVICE).manual_seed(rows)
    logits = 4 * torch.randn(rows, 128256, device=DEVICE, generator=gen)
    labels = torch.randint(0, 128256, (rows,), device=DEVICE, generator=gen)
    labels[1::3] = -100
    check_rows(logits.to(dtype), labels)


@pytest.mark.parametrize("vocab", [1000, 32001, 50257, 151669, 262144])
def test_vocabularies_with_and_without_a_tail(vocab: int) -> None:
    gen = torch.Generator(DEVICE).manual_seed(vocab)
    logits = 4 * torch.randn(33, vocab, device=DEVICE, generator=gen)
    labels = torch.randint(0, vocab, (33,), device=DEVICE, generator=gen)
    labels[:3] = vocab - 1
    check_rows(logits.bfloat16(), labels)


def test_100000_rows() -> None:
    gen = torch.Generator(DEVICE).manual_seed(0)
    logits = 4 * torch.randn(100_000, 1003, device=DEVICE, generator=gen)
    labels = torch.randint(0, 1003, (100_000,), device=DEVICE, generator=gen)
    labels[::2] = -100
    check_rows(logits.bfloat16(), labels)


@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_2_31_elements(inplace: bool) -> None:
    V, N = 128256, 17000  # 2.18e9 elements, 4.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    logits = torch.empty(1, N, V, device=DEVICE, dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, V, (1, N), device=DEVICE)
    labels[:, 1:-5] = -100
    logits.requires_grad_()
    tail = logits.detach()[:, -5:].double().cpu().requires_grad_()
    truth = token_logps(tail, labels[:, -5:].cpu(), shift=False, backend="eager")
    (true_grad,) = torch.autograd.grad(truth.sum(), tail)
    x = head_output(logits) if inplace else logits
    logps = token_logps(x, labels, shift=False, inplace_backward=inplace)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(logps[:, -5:].detach().cpu().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[:, -5:].cpu().double(), true_grad, rtol=1e-2, atol=1e-5)
    assert grad[:, 1:-5].count_nonzero() == 0


def test_in_place_adds_no_vocabulary_sized_memory() -> None:
    batch = make_batch(2, 64, 32000)
    logits = head_output(batch.logits)
    token_logps(head_output(batch.logits), batch.labels, inplace_backward=True).sum().backward()
    batch.logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    logps = token_logps(logits, batch.labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(logps, logits, torch.ones_like(logps))
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.cuda.max_memory_allocated() - held < logits.nbytes // 100


def test_invalid_boundaries_give_nan_not_a_plausible_number() -> None:
    batch = make_batch(1, 4, 100)
    for bad in ([0, 5, 3], [0, 4, 7], [1, 4, 8], [0, 4, 900], [0, -3, 8]):
        cu_seqlens = torch.tensor(bad, dtype=torch.int32, device=DEVICE)
        out = fused_dil_loss(
            batch.flat_logits, batch.flat_labels, ref_logits=batch.flat_ref_logits, cu_seqlens=cu_seqlens
        )
        assert out.loss.isnan()
        assert out.losses.isnan().all()
        assert sequence_logps(batch.flat_logits, batch.flat_labels, cu_seqlens=cu_seqlens).isnan().all()


def test_the_loss_is_one_launch() -> None:
    from torch.profiler import ProfilerActivity, profile

    token = torch.randn(512, 2047, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 9, (512, 2048), device=DEVICE)
    inputs = (token, labels, None, torch.randn_like(token), None, None, *LSIF, True, False, True, -100, True)
    torch.ops.dil_kernels.density_ratio_fwd(*inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        torch.ops.dil_kernels.density_ratio_fwd(*inputs)
        torch.cuda.synchronize()
    kernels = [e.name for e in trace.events() if "Memset" not in e.name and e.device_type.name == "CUDA"]
    assert len(kernels) == 1, kernels


SANITIZED = [  # together every kernel, with and without its options
    ("fused_dil_loss, lsif", 31, torch.float32),
    ("fused_dil_loss, softcap", 1000, torch.bfloat16),
    ("fused_dil_loss, unpaired", 31, torch.float32),
    ("token_logps, statistics", 1000, torch.float32),
    ("token_logps, statistics", 33333, torch.bfloat16),
    ("linear, stash", 1000, torch.float32),
    ("linear, stash", 9001, torch.bfloat16),
    ("linear, recomputed", 1000, torch.bfloat16),
    ("linear, statistics", 1000, torch.float32),
    ("fused_dil_loss, packed", 1000, torch.bfloat16),
    ("fused_dil_loss, packed dpo", 4097, torch.float32),
    ("fused_dil_loss, in place", 4097, torch.bfloat16),
    ("token_logps, temperature", 33333, torch.float16),
    ("sequence_logps, packed", 31, torch.bfloat16),
]


@pytest.mark.parametrize(("name", "V", "dtype"), SANITIZED)
def test_sanitize(name: str, V: int, dtype: torch.dtype) -> None:
    """Small cases of every kernel, for compute-sanitizer; right against the CPU too."""
    batch = make_batch(2, 5, V, dtype)
    on_cpu = Batch(**{f.name: getattr(batch, f.name).detach().cpu() for f in fields(Batch)})
    for leaf in on_cpu.leaves:
        leaf.requires_grad_()
    # A product of 16-bit factors cancels: its error is one of its largest terms'.
    rtol, share = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 3e-3)
    for actual, expected in zip(step(call_of(name), batch), step(call_of(name), on_cpu), strict=True):
        atol = share * max(1.0, expected.double().abs().max().item())
        torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=atol)
