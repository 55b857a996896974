"""All stretches of a row through one call of PyTorch's FlashAttention: its function by hand, itself on a GPU."""

from __future__ import annotations

from typing import Any

import flash_attention
import pytest
import torch
from test_packed_attention import row_of
from test_prefix_sharing import make_family
from torch import Tensor

from dil_kernels.data import share_prefixes
from dil_kernels.data.batches import Segments
from dil_kernels.models import packed_attention
from dil_kernels.models.packed_attention import PackedMask, install_packed_attention
from dil_kernels.models.prefix_sharing import install_prefix_sharing
from dil_kernels.models.varlen_attention import (
    in_autocast_dtype,
    is_right,
    takes_varlen,
    varlen_attention,
    varlen_inputs,
)

SHARED = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([4], [8]), ([5, 6, 8, 9], []), ([5, 6, 7], [11, 12, 13])]


def function_of_aten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """torch.ops.aten._flash_attention_forward, which CPUs lack."""
    assert not return_debug_mask
    boundaries = cum_seq_q, cum_seq_k, max_q, max_k
    return (flash_attention.flash_attn_varlen_func(query, key, value, *boundaries, dropout_p, scale, is_causal),)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the CPU take it; what it was called with."""
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda *_args, **_kwargs: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", function_of_aten)
    flash_attention.CALLS.clear()
    return flash_attention.CALLS


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_packed_rows(name: str, calls: list[dict[str, Any]]) -> None:
    model = make_family(name)
    sequences, row = row_of((9, 1, 13, 4))
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in sequences], dim=1)
    install_packed_attention(model)
    calls.clear()
    torch.testing.assert_close(model(**row).logits, alone)
    assert len(calls) == model.config.num_hidden_layers
    assert all(call["lengths_q"] == call["lengths_k"] == [9, 1, 13, 4] for call in calls)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_shared_prefixes(name: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family(name)
    install_prefix_sharing(model)
    row, _ = share_prefixes(SHARED)
    calls.clear()
    logits = model(**row.model_inputs()).logits
    assert [call["lengths_k"] for call in calls] == [[2, 3, 5, 4, 2, 4, 6]] * model.config.num_hidden_layers
    parameters = list(model.parameters())
    weights = torch.arange(logits.numel(), dtype=logits.dtype).cos().view_as(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    monkeypatch.undo()
    by_stretches = model(**row.model_inputs()).logits
    torch.testing.assert_close(logits, by_stretches)
    truth = torch.autograd.grad((by_stretches * weights).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(gradients, truth)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", ["mistral", "llama4_text"])
def test_windows_and_chunks_stay_with_their_masks(name: str) -> None:
    model = make_family(name)
    install_prefix_sharing(model)
    flash_attention.CALLS.clear()
    model(**share_prefixes(SHARED)[0].model_inputs())
    layers_without = [kind == "full_attention" for kind in getattr(model.config, "layer_types", [])]
    assert len(flash_attention.CALLS) == sum(layers_without)


def from_the_top(query: Tensor, key: Tensor, value: Tensor, *boundaries: Any, scale: float | None = None) -> Any:
    """Queries and keys begin together."""
    cum_seq_q, cum_seq_k = boundaries[:2]
    lengths = cum_seq_q.diff().tolist()
    first = zip(cum_seq_k.tolist(), lengths, strict=False)
    place = torch.cat([torch.arange(start, start + length) for start, length in first])
    same = cum_seq_q, cum_seq_q, max(lengths), max(lengths)
    return function_of_aten(query, key[place], value[place], *same, 0.0, True, False, scale=scale)


def scales_as_it_likes(*args: Any, scale: float | None = None) -> Any:
    return function_of_aten(*args)


def fails(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("function", "right"),
    [(function_of_aten, True), (from_the_top, False), (scales_as_it_likes, False), (fails, False)],
)
def test_it_is_measured_before_it_is_used(function: Any, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", function)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float16):
            assert is_right.__wrapped__(torch.device("cpu"), dtype, 4, 2, 16) == right


def test_want_of_memory_says_nothing_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", short)
    with pytest.raises(torch.OutOfMemoryError):
        is_right.__wrapped__(torch.device("cpu"), torch.bfloat16, 4, 2, 16)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("calls")
def test_the_first_to_attend_may_be_a_checkpointed_layer(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured there, and the layer saves what it saves when it is computed again."""
    model = make_family("llama").float().train()
    install_prefix_sharing(model)
    inputs = share_prefixes(SHARED)[0].model_inputs()
    monkeypatch.setattr(
        packed_attention,
        "takes_varlen",
        lambda q, k, _v, **_: is_right(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3]),
    )
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        is_right.cache_clear()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).logits.float().square().mean()
        loss.backward()
        assert is_right.cache_info().misses == 1
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    is_right.cache_clear()
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-4)


def test_a_row_that_its_mask_does_not_fit_is_an_error(calls: list[dict[str, Any]]) -> None:
    """FlashAttention would read beyond it."""
    mask = PackedMask((2, 3), (None, None), (None, None), causal=True)
    query = torch.zeros(1, 2, 6, 8)
    calls.clear()
    with pytest.raises(RuntimeError, match="split"):
        packed_attention._packed_sdpa_attention(torch.nn.Module(), query, query, query, mask)
    assert calls == []


def test_what_is_not_taken() -> None:
    assert PackedMask((2048, 2048), (None,) * 2, (None,) * 2, causal=True).in_one_call
    assert not PackedMask((2048, 2049), (None,) * 2, (None,) * 2, causal=True).in_one_call
    assert PackedMask((4096, 2049), (None,) * 2, (None, 0), causal=True).in_one_call
    assert not PackedMask((4, 3), (None,) * 2, (None, 0), causal=False).in_one_call
    query = torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16)
    assert not takes_varlen(query, query, query)  # a CPU's
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in in_autocast_dtype(*[query.float()] * 3)] == [torch.bfloat16] * 3
        assert [x.dtype for x in in_autocast_dtype(*[query.double()] * 3)] == [torch.float64] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 72, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_itself_on_a_gpu(size: int, dtype: torch.dtype, shared: bool) -> None:
    """As exact as stretch by stretch, in fp64; the gradients, too. 8 heads of queries and 2 of keys."""
    lengths = (300, 37, 128, 1, 65, 200)
    prefixes = (None, None, 0, 0, 1, None) if shared else (None,) * len(lengths)
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (8, 2, 2)
    leaves = [
        torch.randn(1, h, sum(lengths), size, generator=generator, device="cuda", dtype=dtype).requires_grad_()
        for h in heads
    ]
    upstream = torch.randn(1, sum(lengths), 8, size, generator=generator, device="cuda", dtype=dtype)

    def outcome(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
        output = attend(*inputs)
        return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]

    def in_plain_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        stretches = [x.split(lengths, dim=2) for x in (query, key, value)]
        for q, k, v, prefix in zip(*stretches, prefixes, strict=True):
            if prefix is not None:
                k, v = torch.cat([stretches[1][prefix], k], dim=2), torch.cat([stretches[2][prefix], v], dim=2)
            k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
            scores = q @ k.transpose(-1, -2) / size**0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
            parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        return torch.cat(parts, dim=2).transpose(1, 2)

    def varlen(*tensors: Tensor) -> Tensor:
        assert takes_varlen(*tensors)
        return varlen_attention(*tensors, varlen_inputs(Segments(lengths, prefixes), tensors[0].device), None)

    truth = outcome(in_plain_pytorch, [x.detach().double().requires_grad_() for x in leaves])
    eager, actual = outcome(in_plain_pytorch, leaves), outcome(varlen, leaves)
    for true, rounded, ours in zip(truth, eager, actual, strict=True):
        assert (ours - true).norm() <= 1.5 * (rounded - true).norm() + 1e-3 * true.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_a_model_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 by autocast: all layers take it, and logits and gradients are as near to fp32 as stretch by stretch."""
    model = make_family("llama").float().cuda()
    install_prefix_sharing(model)
    inputs = share_prefixes(SHARED)[0].to("cuda").model_inputs()
    seen: list[PackedMask] = []
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)

    def outcome(autocast: bool) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(**inputs).logits.float()
        weights = torch.arange(logits.numel(), device="cuda").cos().view_as(logits)
        return [logits.detach(), *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]

    in_one_call, truth = outcome(autocast=True), outcome(autocast=False)
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda *_args, **_kwargs: False)
    by_stretches = outcome(autocast=True)
    assert [len(mask.varlen) for mask in seen] == [1, 0, 0]
    for ours, rounded, true in zip(in_one_call, by_stretches, truth, strict=True):
        assert (ours - true).norm() <= 2 * (rounded - true).norm() + 1e-3 * true.norm()
