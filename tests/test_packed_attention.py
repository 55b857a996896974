"""Sequences packed in a row are computed as alone; models that would let them leak are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_training import RELATIVE
from tiny_model import SMALL, make_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from dil_kernels.data.batches import Packed
from dil_kernels.models.packed_attention import (
    PackedMask,
    UnsupportedPackingError,
    install_packed_attention,
    packing_problem,
)


def row_of(lengths: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    """Sequences [1, T] of these lengths, and what a model takes for all of them in one row."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(2, 160, (1, length), generator=generator) for length in lengths]
    boundaries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return sequences, Packed(torch.cat(sequences, dim=1), positions, boundaries, max(lengths)).model_inputs()


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def make_family(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **FAMILIES[name])).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_in_a_row_is_as_alone(name: str) -> None:
    """Longer than the sliding windows; one of a single token."""
    model = make_family(name)
    sequences, row = row_of((9, 1, 13, 4))
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in sequences], dim=1)
    install_packed_attention(model)
    torch.testing.assert_close(model(**row).logits, alone, rtol=0, atol=RELATIVE * alone.abs().max().item())
    again = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in sequences], dim=1)
    assert torch.equal(again, alone)


def test_no_other_sequence_changes_a_bit() -> None:
    model = make_model().eval()
    install_packed_attention(model)
    _, row = row_of((6, 8, 5))
    logits = model(**row).logits
    other = row["input_ids"].clone()
    other[:, :6] = other[:, :6].flip(1)
    other[:, 14:] = 3
    changed = model(**{**row, "input_ids": other}).logits
    assert torch.equal(changed[:, 6:14], logits[:, 6:14])
    assert not torch.equal(changed[:, :6], logits[:, :6])


def test_attention_runs_without_a_mask_of_all_pairs() -> None:
    model, seen = make_model().eval(), []
    install_packed_attention(model)
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    model(**row_of((6, 8, 5))[1])
    assert seen == [PackedMask((6, 8, 5), (None, None, None), (None, None, None), causal=True)]


def test_generation_and_checkpoints_stay_as_they_were(tmp_path: Path) -> None:
    model = make_model().eval()
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 7], [5, 6, 7, 8]]), "pad_token_id": 0, "max_new_tokens": 6}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    before = model.generate(**inputs, do_sample=False)
    install_packed_attention(model)
    assert torch.equal(model.generate(**inputs, do_sample=False), before)
    model.save_pretrained(tmp_path)
    assert "dil" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


class PositionsIgnored(LlamaForCausalLM):
    """Takes position_ids, and does not use them."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, use_cache=False)


class Shifted(GPT2LMHeadModel):
    """Keeps sequences apart, but its learned positions go on from one to the next."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.wpe.register_forward_pre_hook(lambda _m, args: (torch.arange(args[0].numel()).unsqueeze(0),))


def leaking() -> nn.Module:
    return PositionsIgnored(make_model().config)


def shifted() -> nn.Module:
    return Shifted(AutoConfig.for_model("gpt2", **SMALL, **FAMILIES["gpt2"]))


def recurrent() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def eager() -> nn.Module:
    return make_model(attn_implementation="eager")


def tempered() -> nn.Module:
    model = make_model()
    model.config.attn_temperature_tuning = True  # as Llama 4's
    return model


class BlockIndexer(nn.Module):
    """Stands for what chooses the tokens that sparse attention sees: all of them in a row as short as the check's."""


def sparse() -> nn.Module:
    model = make_model()
    model.model.layers[0].self_attn.indexer = BlockIndexer()
    return model


def invoked() -> nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[7])
    return get_peft_model(make_model(), config)


def without_weights() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(make_model().config)


REFUSED = {
    leaking: "PositionsIgnored lets a sequence depend on the one before it",
    shifted: "Shifted computes other logits for a sequence in a row with others",
    recurrent: "MambaForCausalLM lets a sequence depend on the one before it",
    eager: "LlamaForCausalLM attends with 'eager'",
    tempered: "LlamaForCausalLM scales its attention by the place in the row",
    sparse: r"LlamaForCausalLM selects the tokens that it attends to \(BlockIndexer\)",
    invoked: "an adapter of PeftModelForCausalLM begins where its row has tokens last",
    without_weights: "LlamaForCausalLM does not have its weights whole",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_model_that_would_not_be_exact_is_refused(make: Any) -> None:
    refused, good = make(), make_model()
    attention = refused.config._attn_implementation
    with pytest.raises(UnsupportedPackingError, match=REFUSED[make]):
        install_packed_attention(good, refused)
    assert (good.config._attn_implementation, refused.config._attn_implementation) == ("sdpa", attention)


def test_the_check_leaves_no_trace() -> None:
    model = make_model().train()
    assert packing_problem(model) is None
    install_packed_attention(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
