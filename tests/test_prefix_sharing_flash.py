"""Shared prefixes through transformers' integration of FlashAttention, with its functions in plain PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import flash_attention
import pytest
import torch
from flash_attention import CALLS, attend_with, let_flash_run
from plain_training import GradientRecorder, assert_all_close
from tiny_model import SMALL, make_model, make_pairs
from tiny_trainer import make_trainer
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.flash_attention import flash_attention_forward

from dil_kernels.data import share_prefixes
from dil_kernels.models.packed_attention import UnsupportedPackingError, attention_of
from dil_kernels.models.prefix_sharing import install_prefix_sharing

NAMES = ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]
ROWS = [([5, 6, 7, 8, 9], [8, 9, 4]), ([4], [8]), ([5, 6, 7, 8, 9], [7]), ([3, 2], [6, 5, 4, 3, 2, 7]), ([4, 6], [])]
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "gemma3_text": {**WINDOW, "head_dim": 8},
    "gemma2": {**WINDOW, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def make_family(name: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name]})
    attention = "eager" if name == "gemma2" else "sdpa"  # which leaves its softcap out
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().double()


def of_responses(model: Any, logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The logits [T, V] of all responses and their prompts' last tokens, and the gradients of a sum of them."""
    parts = torch.cat([part[-len(response) - 1 :] for part, (_, response) in zip(logits, ROWS, strict=True)])
    weights = torch.arange(parts.numel(), dtype=parts.dtype).cos().view_as(parts)
    return parts, list(torch.autograd.grad((parts * weights).sum(), list(model.parameters())))


def on_the_row(model: Any) -> tuple[Tensor, list[Tensor]]:
    row, _ = share_prefixes(ROWS)
    return of_responses(model, list(model(**row.model_inputs()).logits[0].split(row.cu_seqlens.diff().tolist())))


def one_by_one(model: Any) -> tuple[Tensor, list[Tensor]]:
    sequences = [torch.tensor([prompt + response]) for prompt, response in ROWS]
    return of_responses(model, [model(input_ids=ids, use_cache=False).logits[0] for ids in sequences])


def assert_same(actual: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]]) -> None:
    for one, other in zip([actual[0], *actual[1]], [truth[0], *truth[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_the_sequences_alone_and_of_sdpa(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    let_flash_run(monkeypatch, NAMES[0])
    plain = make_family(name)
    alone = one_by_one(plain)
    model = attend_with(copy.deepcopy(plain), NAMES[0])
    assert_same(one_by_one(model), alone)
    install_prefix_sharing(model)
    assert attention_of(model) == NAMES[0]
    CALLS.clear()
    shared = on_the_row(model)
    assert_same(shared, alone)
    # Prefixes of 4, 1 and 1 tokens, then the segments.
    assert [call["lengths_q"] for call in CALLS] == [[4, 1, 1, 4, 2, 2, 7, 1]] * 2
    assert [call["lengths_k"] for call in CALLS] == [[4, 1, 1, 8, 2, 6, 8, 2]] * 2
    windows = FAMILIES[name].get("layer_types", ["sliding_attention"] * 2 if name == "mistral" else ["full"] * 2)
    assert [call["window_size"] for call in CALLS] == [(2, 2) if "sliding" in x else (-1, -1) for x in windows]
    assert {call["softcap"] for call in CALLS} == {FAMILIES[name].get("attn_logit_softcapping", 0.0)}
    if attention_of(plain) == "sdpa":
        install_prefix_sharing(plain)
        assert_same(shared, on_the_row(plain))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_is_that_of_padded_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, datasets_cache: None, name: str, checkpointing: bool
) -> None:
    let_flash_run(monkeypatch, name)
    steps = []
    for sharing in (False, True):
        recorder = GradientRecorder()
        models = make_model(0), make_model(1)
        policy, ref = (attend_with(model, name) if sharing else model for model in models)
        trainer = make_trainer(
            tmp_path,
            model=policy,
            ref_model=ref,
            train_dataset=make_pairs(7),
            callbacks=[recorder],
            prefix_sharing=sharing,
            gradient_checkpointing=checkpointing,
            per_device_train_batch_size=7,
            max_steps=1,
            max_grad_norm=0.0,
        )
        CALLS.clear()
        trainer.train()
        steps.append((recorder.steps[0], trainer.state.log_history[0]["loss"]))
    assert len(CALLS) == 4 + 2 * checkpointing  # two layers of policy and reference
    assert_all_close(steps[1][0], steps[0][0])
    assert steps[1][1] == pytest.approx(steps[0][1], rel=1e-5)


def test_without_an_index_the_attention_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    let_flash_run(monkeypatch, NAMES[0])
    model = attend_with(make_model().eval(), NAMES[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(input_ids=ids, use_cache=False).logits
    install_prefix_sharing(model)
    wrapped = AttentionInterface()[NAMES[0]]
    assert wrapped is not flash_attention_forward
    install_prefix_sharing(model)
    assert AttentionInterface()[NAMES[0]] is wrapped
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    AttentionInterface.register(NAMES[0], flash_attention_forward)
    with pytest.raises(RuntimeError, match="'flash_attention_2' was loaded again after install_prefix_sharing"):
        on_the_row(model)


def test_what_aligns_queries_with_the_beginning_of_their_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention did before 2.1."""
    let_flash_run(monkeypatch, NAMES[0])
    model = attend_with(make_model().eval(), NAMES[0])
    as_before = flash_attention.flash_attn_func

    def from_the_top(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        return as_before(q, k[:, : q.shape[1]], v[:, : q.shape[1]], *options)

    monkeypatch.setattr(flash_attention, "flash_attn_func", from_the_top)
    with pytest.raises(UnsupportedPackingError, match="LlamaForCausalLM computes other logits for responses"):
        install_prefix_sharing(model)


def test_flash_attention_that_is_not_installed_is_refused() -> None:
    with pytest.raises(UnsupportedPackingError, match="cannot run on a row that shares prefixes"):
        install_prefix_sharing(attend_with(make_model(), NAMES[0]))
