"""Rows in which each prompt stands once: a response has the log-probs and the gradients that it has alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import RELATIVE
from tiny_model import SMALL, make_model
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from dil_kernels import fused_linear_dil_loss
from dil_kernels.data import share_prefixes
from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.data.collators import pack_sequences
from dil_kernels.models.packed_attention import (
    PackedMask,
    UnsupportedPackingError,
    install_packed_attention,
)
from dil_kernels.models.prefix_sharing import install_prefix_sharing, sharing_problem

ROUNDING = 1e-6  # fp64 models whose norms and rotary embeddings are in fp32, of the largest entry
Sequences = list[tuple[list[int], list[int]]]

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKS = {
    "attention_chunk_size": 4,
    "attn_temperature_tuning": False,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "gemma3_text": {**WINDOW, "head_dim": 8},
    "llama4_text": {**CHUNKS, "head_dim": 8},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": GPT2,
    "qwen2": {},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
}


def make_family(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name], **options})
    model = AutoModelForCausalLM.from_config(config).eval().double()
    model.set_experts_implementation("eager")  # the others have no fp64
    return model


def test_a_row_has_each_prompt_once() -> None:
    row, labels = share_prefixes([([5, 6, 7], [8, 9]), ([4], [8]), ([5, 6, 7], []), ([4, 6, 7], [9]), ([], [3, 2])])
    #                             prefixes    | segments
    assert row.input_ids.tolist() == [[5, 6, 4, 6, 7, 8, 9, 4, 8, 7, 7, 9, 3, 2]]
    assert row.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 2, 3, 0, 1]]
    assert labels.tolist() == [[-100] * 5 + [8, 9, -100, 8, -100, -100, 9, -100, 2]]
    assert row.cu_seqlens.tolist() == [0, 7, 9, 10, 12, 14]
    assert row.cu_seqlens.dtype == torch.int32
    assert row.stretch_lengths == [2, 2, 3, 2, 1, 2, 2]
    assert row.stretch_prefixes == [None, None, 0, None, 0, 1, None]
    moved = row.to("meta")
    assert {x.device.type for x in moved[:3]} == {"meta"}
    assert moved[3:] == row[3:]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda ids: torch.tensor(ids, dtype=torch.int32)])
@pytest.mark.parametrize("join", [share_prefixes, pack_sequences])
def test_token_ids_may_be_tensors(join: Any, kind: Any) -> None:
    rows = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([4], [8])]
    expected, labels = join(rows)
    row, own_labels = join([(kind(prompt), response) for prompt, response in rows[:2]] + [tuple(map(kind, rows[2]))])
    assert torch.equal(own_labels, labels)
    for value, truth in zip(row, expected, strict=True):
        assert torch.equal(value, truth) if isinstance(truth, Tensor) else value == truth
    with pytest.raises(TypeError, match="sequences must be pairs of token ids, integers each: 'float'"):
        join([([1.9, 2], [3])])


def test_only_all_token_ids_make_a_prompt_the_same() -> None:
    row, _ = share_prefixes([([5, 6, 7], [8]), ([5, 6, 8], [8]), ([6, 7], [8])])
    assert row.stretch_prefixes == [None, None, None, 0, 1, 2]


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    """Groups of up to 4 responses to prompts of 1 to 9 tokens, which may begin alike, in any order."""
    tokens = st.integers(2, 12)
    prompts = draw(st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=3))
    group = st.tuples(st.sampled_from(prompts), st.lists(tokens, min_size=0, max_size=8))
    return draw(st.lists(group, min_size=1, max_size=8))


def weighted(logits: Tensor) -> Tensor:
    """A sum of logits [T, V] in which each has another weight."""
    return (logits * torch.arange(logits.numel(), dtype=logits.dtype).cos().view_as(logits)).sum()


def assert_near(actual: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(actual, truth, rtol=0, atol=ROUNDING * max(1.0, truth.abs().max().item()))


def of_model(model: nn.Module, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_the_sequences_alone(name: str) -> None:
    model = make_family(name)
    install_prefix_sharing(model)

    @settings(max_examples=15)
    @given(sequences())
    def check(rows: Sequences) -> None:
        row, labels = share_prefixes(rows)
        segments = model(**row.model_inputs()).logits[0].split(row.cu_seqlens.diff().tolist())
        parts, alone = [], []
        for (prompt, response), segment in zip(rows, segments, strict=True):
            count = len(response) + 1
            parts.append(segment[-count:])
            alone.append(model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -count:])
        assert labels[labels != IGNORE_INDEX].tolist() == [token for _, response in rows for token in response]
        actual, truth = torch.cat(parts), torch.cat(alone)
        assert_near(actual, truth)
        for gradient, expected in zip(of_model(model, weighted(actual)), of_model(model, weighted(truth)), strict=True):
            if expected is not None:
                assert_near(gradient, expected)

    check()


def test_no_other_sequence_changes_a_bit() -> None:
    model = make_model().eval()
    install_prefix_sharing(model)
    rows = [([5, 6, 7], [8, 9, 10]), ([5, 6, 7], [11, 12]), ([20, 21], [22]), ([30], [31])]
    row, _ = share_prefixes(rows)
    other, _ = share_prefixes([rows[0], ([5, 6, 7], [3, 4]), ([40, 41], [42]), ([50], [51])])
    assert other.input_ids.shape == row.input_ids.shape
    logits, changed = (model(**x.model_inputs()).logits[0].split(row.cu_seqlens.diff().tolist()) for x in (row, other))
    assert torch.equal(changed[0][-4:], logits[0][-4:])
    assert all(not torch.equal(changed[index], logits[index]) for index in (1, 2, 3))


def test_attention_forms_no_mask_of_all_pairs() -> None:
    model, seen = make_model().eval(), []
    install_prefix_sharing(model)
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    model(**share_prefixes([([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([4], [8])])[0].model_inputs())
    (mask,) = seen
    assert isinstance(mask, PackedMask)
    assert mask.lengths == (2, 3, 2, 2)
    assert mask.prefixes == (None, 0, 0, None)
    assert mask.causal
    assert [None if part is None else [*part.shape] for part in mask.masks] == [None, [1, 1, 3, 5], [1, 1, 2, 4], None]
    assert mask.masks[1].long().tolist() == [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


def test_a_window_counts_in_the_sequence() -> None:
    model, seen = make_family("mistral"), []
    install_prefix_sharing(model)
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    model(**share_prefixes([([5, 6, 7, 8], [9, 10]), ([5, 6, 7, 8], [10])])[0].model_inputs())
    assert not seen[0].causal
    assert seen[0].masks[2].long().tolist() == [[[[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]]


def test_generation_padded_and_packed_rows_stay_as_they_were(tmp_path: Path) -> None:
    model = make_model().eval()
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 7], [5, 6, 7, 8]]), "pad_token_id": 0, "max_new_tokens": 6}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    before = model.generate(**inputs, do_sample=False)
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    of_packed = model(**packed, use_cache=False).logits
    install_prefix_sharing(model)
    install_packed_attention(model)
    install_prefix_sharing(model)
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    model(**share_prefixes([([5, 6, 7], [8, 9])])[0].model_inputs())
    assert torch.equal(model.generate(**inputs, do_sample=False), before)
    torch.testing.assert_close(
        model(**packed, use_cache=False).logits, of_packed, rtol=0, atol=RELATIVE * of_packed.abs().max().item()
    )
    model.save_pretrained(tmp_path)
    assert "dil" not in (tmp_path / "config.json").read_text()


def test_a_loop_of_ones_own_builds_such_a_row() -> None:
    """With the fused loss from hidden states, its gradients against those of padded sequences."""
    model, prompts = make_model().double(), [[5, 6, 7], [9, 4]]
    rows = [(prompts[0], [8, 9]), (prompts[1], [7]), (prompts[0], [10, 3, 4]), (prompts[1], [11, 12])]
    refs = {"ref_chosen_logps": torch.tensor([-9.0, -5.0]), "ref_rejected_logps": torch.tensor([-12.0, -11.0])}
    refs = {name: value.double() for name, value in refs.items()}
    longest = max(len(prompt + response) for prompt, response in rows)
    padded, labels = (
        torch.stack([pad(torch.tensor(x), (0, longest - len(x)), value=fill) for x in parts])
        for parts, fill in (
            ([p + r for p, r in rows], 0),
            ([[IGNORE_INDEX] * len(p) + r for p, r in rows], IGNORE_INDEX),
        )
    )
    mask = torch.stack([torch.arange(longest) < len(prompt + response) for prompt, response in rows]).long()
    hidden = model.model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
    truth = fused_linear_dil_loss(hidden, model.lm_head.weight, labels, **refs)
    expected = of_model(model, truth.loss)
    install_prefix_sharing(model)
    row, labels = share_prefixes(rows)
    hidden = model.model(**row.model_inputs()).last_hidden_state
    output = fused_linear_dil_loss(hidden, model.lm_head.weight, labels, cu_seqlens=row.cu_seqlens, **refs)
    for name, value in truth._asdict().items():
        torch.testing.assert_close(getattr(output, name), value, msg=lambda text, n=name: f"{n}: {text}")
    for actual, gradient in zip(of_model(model, output.loss), expected, strict=True):
        torch.testing.assert_close(actual, gradient)


class Smeared(LlamaForCausalLM):
    """Each token has something of the one before it in its row, as convolutions over the sequence do."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.register_forward_hook(lambda _m, _a, x: x + pad(x[:, :-1], (0, 0, 1, 0)))


class Shifted(LlamaForCausalLM):
    """Keeps sequences apart, but counts positions in the row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.rotary_emb.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {"position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]}),
            with_kwargs=True,
        )


class Detached(LlamaForCausalLM):
    """Has the logits of the sequences, but no gradient reaches the prompt."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.k_proj.register_forward_hook(
                lambda _m, _a, x: torch.cat([x[:, :4].detach(), x[:, 4:]], 1) if x.shape[1] > 9 else x
            )


def smeared() -> nn.Module:
    return Smeared(make_model().config)


def shifted() -> nn.Module:
    return Shifted(make_model().config)


def detached() -> nn.Module:
    return Detached(make_model().config)


def recurrent() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def eager() -> nn.Module:
    return make_model(attn_implementation="eager")


def by_length() -> nn.Module:
    return make_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})


def with_router_loss() -> nn.Module:
    return make_family("qwen3_moe", output_router_logits=True)


def tempered() -> nn.Module:
    return make_family("llama4_text", attn_temperature_tuning=True)


def without_weights() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(make_model().config)


REFUSED: dict[Callable[[], nn.Module], str] = {
    smeared: "Smeared lets a response depend on another sequence of its row",
    shifted: "Shifted computes other logits for responses that share their prompt",
    detached: "Detached computes other gradients for responses that share their prompt",
    recurrent: "MambaForCausalLM attends with 'eager'",
    eager: "LlamaForCausalLM attends with 'eager', and prefixes are shared by 'sdpa' and FlashAttention only",
    by_length: "the rotary embedding of LlamaForCausalLM .*goes by the l",
    with_router_loss: "Qwen3MoeForCausalLM adds a loss of its router",
    tempered: "Llama4ForCausalLM scales its attention by the place in the row",
    without_weights: "LlamaForCausalLM does not have its weights whole",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_model_that_would_not_be_exact_is_refused(make: Callable[[], Any]) -> None:
    refused, good = make(), make_model()
    attention = refused.config._attn_implementation
    with pytest.raises(UnsupportedPackingError, match=REFUSED[make]):
        install_prefix_sharing(good, refused)
    assert (good.config._attn_implementation, refused.config._attn_implementation) == ("sdpa", attention)
    assert not good.model._forward_pre_hooks
    assert not good.model._forward_hooks


def test_a_model_that_is_not_prepared_fails_on_such_a_row() -> None:
    row, _ = share_prefixes([([5, 6, 7], [8, 9])])
    with pytest.raises(AttributeError, match="Segments"):
        make_model()(**row.model_inputs())


def test_the_check_leaves_no_trace() -> None:
    model = make_model().train()
    install_prefix_sharing(model)
    assert sharing_problem(model) is None
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
