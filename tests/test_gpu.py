"""What only a GPU can show: no host sync, CUDA graphs, repeatability, large offsets, launches, and sanitizer cases."""

from __future__ import annotations

import pytest
import torch

from dil_kernels import fused_dil_loss, sequence_logps, token_logps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


def batch(B: int, T: int, V: int, dtype: torch.dtype = torch.bfloat16):
    gen = torch.Generator("cuda").manual_seed(0)
    logits, ref = (torch.randn(2 * B, T, V, device="cuda", generator=gen, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, V, (2 * B, T), device="cuda", generator=gen)
    labels[:, : T // 2] = -100
    return logits.requires_grad_(), labels, ref


def packed(batch):
    logits, labels, ref = batch
    S, T, V = logits.shape
    cu_seqlens = torch.arange(0, S * T + 1, T, dtype=torch.int32, device="cuda")
    return logits.detach().view(-1, V).requires_grad_(), labels.flatten(), ref.view(-1, V), cu_seqlens


@pytest.mark.parametrize("loss_type", ["lsif", "dpo"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_no_host_sync(loss_type: str, is_packed: bool) -> None:
    def step(logits, labels, ref, cu_seqlens=None):
        out = fused_dil_loss(logits, labels, ref_logits=ref, cu_seqlens=cu_seqlens, loss_type=loss_type)
        out.loss.backward()
        sequence_logps(logits, labels, cu_seqlens=cu_seqlens, average_log_prob=True)

    inputs = packed(batch(2, 16, 1000)) if is_packed else batch(2, 16, 1000)
    step(*inputs)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_capture_and_replay() -> None:
    logits, labels, ref = batch(2, 16, 1000)

    def step():
        logits.grad = None
        out = fused_dil_loss(logits, labels, ref_logits=ref)
        out.loss.backward()
        return out.loss.detach(), logits.grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    for seed in (1, 2):
        new = torch.randn(logits.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        with torch.no_grad():
            logits.copy_(new)
        graph.replay()
        replayed = loss.clone(), grad.clone()
        expected = step()
        assert torch.equal(replayed[0], expected[0])
        assert torch.equal(replayed[1], expected[1])


def test_bitwise_repeatability() -> None:
    logits, labels, ref = batch(4, 64, 32000)
    results = []
    for _ in range(3):
        logits.grad = None
        out = fused_dil_loss(logits, labels, ref_logits=ref)
        out.loss.backward()
        results.append((*(field.detach() for field in out), logits.grad))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_more_than_2_31_elements() -> None:
    V, N = 128256, 17000  # 2.18e9 elements, 4.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.empty(1, N, V, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, V, (1, N), device="cuda")
    labels[:, 1:-5] = -100
    logits.requires_grad_()
    logps = token_logps(logits, labels, shift=False)
    logps.sum().backward()
    tail = logits.detach()[:, -5:].double().cpu()
    truth = token_logps(tail, labels[:, -5:].cpu(), shift=False, backend="eager")
    torch.testing.assert_close(logps[:, -5:].detach().cpu().double(), truth, rtol=1e-5, atol=1e-5)
    assert logits.grad is not None
    expected = torch.nn.functional.one_hot(labels[:, -5:].cpu(), V) - tail.softmax(-1)
    torch.testing.assert_close(logits.grad[:, -5:].cpu().double(), expected.double(), rtol=1e-2, atol=1e-5)
    assert logits.grad[:, 1:-5].abs().max() == 0


def test_invalid_boundaries_give_nan_not_a_plausible_number() -> None:
    logits, labels, ref, _ = packed(batch(1, 4, 100))
    for bad in ([0, 5, 3], [0, 4, 7], [1, 4, 8], [0, 4, 900], [0, -3, 8]):
        cu_seqlens = torch.tensor(bad, dtype=torch.int32, device="cuda")
        out = fused_dil_loss(logits, labels, ref_logits=ref, cu_seqlens=cu_seqlens)
        assert out.loss.isnan()
        assert out.losses.isnan().all()
        assert sequence_logps(logits, labels, cu_seqlens=cu_seqlens).isnan().all()


def test_the_loss_is_one_launch() -> None:
    from torch.profiler import ProfilerActivity, profile

    token = torch.randn(512, 2047, device="cuda", requires_grad=True)
    labels = torch.randint(0, 9, (512, 2048), device="cuda")
    inputs = (token, labels, None, torch.randn_like(token), None, "lsif", 0.1, 0.0, True, False, True, -100, True)
    torch.ops.dil_kernels.density_ratio_fwd(*inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        torch.ops.dil_kernels.density_ratio_fwd(*inputs)
        torch.cuda.synchronize()
    kernels = [e.name for e in trace.events() if "Memset" not in e.name and e.device_type.name == "CUDA"]
    assert len(kernels) == 1, kernels


@pytest.mark.parametrize("V", [31, 1000, 4097])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sanitize(V: int, is_packed: bool, dtype: torch.dtype) -> None:
    """Small cases of every kernel, for compute-sanitizer; right against eager too."""
    inputs = batch(2, 5, V, dtype)
    logits, labels, ref, *cu = packed(inputs) if is_packed else inputs
    grads = []
    for backend in ("triton", "eager"):
        logits.grad = None
        out = fused_dil_loss(logits, labels, ref_logits=ref, cu_seqlens=cu[0] if cu else None, backend=backend)
        (out.loss + out.chosen_logps.sum()).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=1e-3)
