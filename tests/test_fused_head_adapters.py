"""Adapters of PEFT on a model with the fused head."""

from __future__ import annotations

import pytest
from fused_head_models import (
    RELATIVE,
    assert_close,
    assert_same,
    batch,
    fused,
    largest,
    make,
    own,
    with_lora,
)
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dil_kernels.models.fused_head import fused_head_problem, install_fused_head


@pytest.mark.parametrize("installed_first", [False, True])
def test_lora_on_the_body(installed_first):
    base = make("Gemma2ForCausalLM")
    if installed_first:
        install_fused_head(base)
    model = with_lora(base, target_modules=["q_proj", "v_proj", "down_proj"])
    if not installed_first:
        install_fused_head(model)
    assert_same(model, *batch())


@pytest.mark.parametrize(
    "adapter",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
@pytest.mark.parametrize("name", ["GraniteForCausalLM", "PhiForCausalLM"])
def test_adapted_head(name, adapter):
    model = with_lora(make(name), **adapter)
    install_fused_head(model)
    inputs, labels, upstream = batch()
    assert_same(model, inputs, labels, upstream)
    with model.disable_adapter():
        base = own(model, inputs, labels)
        assert_close(fused(model, inputs, labels), base, RELATIVE * largest(base), "log-probs of the base model")
    assert largest(fused(model, inputs, labels) - base) > 0.1


def test_merged_adapter():
    model = with_lora(make("LlamaForCausalLM"), target_modules=["lm_head"])
    inputs, labels, _ = batch()
    install_fused_head(model)
    expected = own(model, inputs, labels)
    model.merge_adapter()
    assert_close(fused(model, inputs, labels), expected, RELATIVE * largest(expected), "log-probs")


def test_head_that_is_adapted_after_the_installation_is_noticed():
    model = make("LlamaForCausalLM")
    install_fused_head(model)
    model = with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(RuntimeError, match="install it again"):
        fused(model, *batch()[:2])
    install_fused_head(model)
    assert_same(model, *batch())


def test_adapters_that_are_refused():
    dora = with_lora(make("LlamaForCausalLM"), target_modules=["lm_head"], use_dora=True)
    assert "other than plain LoRA" in fused_head_problem(dora)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(make("LlamaForCausalLM"), config)
    install_fused_head(prompted)
    with pytest.raises(ValueError, match="virtual tokens"):
        fused(prompted, *batch()[:2])


class Doubled(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_message_names_the_adapter_that_is_refused():
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    problem = fused_head_problem(get_peft_model(make("LlamaForCausalLM"), ia3))
    assert "peft.tuners.ia3.layer.Linear, an adapter other than plain LoRA" in problem
    model = with_lora(make("LlamaForCausalLM"), target_modules=["lm_head"])
    model.get_base_model().lm_head.__class__ = Doubled
    assert "a Doubled, whose forward is not that of PEFT's LoRA" in fused_head_problem(model)


def two_adapters(**options) -> nn.Module:
    model = with_lora(make("LlamaForCausalLM"), **options)
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "second" in name and "lora_A" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


NAMES = ["second", "default", "__base__"]


def test_an_adapter_for_each_row():
    model = two_adapters(target_modules=["q_proj"])
    inputs, labels, _ = batch()
    install_fused_head(model)
    expected = own(model, {**inputs, "adapter_names": NAMES}, labels)
    assert_close(fused(model, {**inputs, "adapter_names": NAMES}, labels), expected, RELATIVE * largest(expected), "")
    assert largest(fused(model, inputs, labels)[0] - expected[0]) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"]}, "its output head is called with adapter_names beside the hidden states"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "nor adapter_names where an adapter",
        ),
    ],
)
def test_a_head_for_each_row_is_refused(options, message):
    model = two_adapters(**options)
    inputs, labels, _ = batch()
    install_fused_head(model)
    with pytest.raises(ValueError, match=message):
        fused(model, {**inputs, "adapter_names": NAMES}, labels)
