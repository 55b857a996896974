"""LoRA on a base in 4 bits: the same adapters, gradients and reference as on the base that the 4 bits stand for."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lora import assert_reference_is, lora_config
from tiny_model import make_model, make_pairs, save_model
from tiny_trainer import make_trainer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dil_kernels.cli import programs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model = make_model(tie_word_embeddings=False, hidden_size=64, intermediate_size=128)
    return save_model(tmp_path / "base", model)


def load_in_4bit(model_dir: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=config)


def dequantized(model_dir: Path) -> Any:
    """The model in fp32 with the weights that the 4 bits stand for."""
    import bitsandbytes

    whole, quantized = AutoModelForCausalLM.from_pretrained(model_dir), load_in_4bit(model_dir)
    replaced = 0
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.get_submodule(name).weight = nn.Parameter(weight.float())
            replaced += 1
    assert replaced == 14
    return whole


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_four_bits_train_as_the_weights_they_stand_for(tmp_path: Path, model_dir: Path, checkpointing: bool) -> None:
    trainers = []
    for base in (load_in_4bit(model_dir), dequantized(model_dir)):
        trainer = make_trainer(
            tmp_path,
            model=base,
            peft_config=lora_config(),
            train_sampling_strategy="sequential",
            activation_checkpointing=checkpointing,
            optim="sgd",
            max_steps=3,
        )
        trainer.train()
        trainers.append(trainer)
    quantized, whole = trainers
    assert quantized.ref_model is None
    assert quantized.uses_fused_head
    assert_reference_is(quantized, copy.deepcopy(dequantized(model_dir)))
    expected = {name: value for name, value in whole.model.state_dict().items() if "lora_" in name}
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if "lora_B" in name)
    for name, value in expected.items():
        torch.testing.assert_close(quantized.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_that_were_repacked_are_refused(tmp_path: Path, model_dir: Path) -> None:
    """As bitsandbytes does it on CPUs with AVX512-BF16, when a layer runs in evaluation mode."""
    model = load_in_4bit(model_dir)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(NotImplementedError, match=r"^model has run in evaluation mode, for which bits"):
        make_trainer(tmp_path, model=model, peft_config=lora_config())


def test_dil_train_loads_in_4bit(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(4).to_json(pairs)
    argv = ["--model", str(model_dir), "--train-file", str(pairs), "--output-dir", str(tmp_path / "out"), "--use-cpu"]
    argv += ["--load-in-4bit", "--max-steps", "2", "--report-to", "none", "--disable-tqdm"]
    with pytest.raises(SystemExit):
        programs.main(argv)
    assert "--load-in-4bit needs --lora-rank" in capsys.readouterr().err
    assert programs.main([*argv, "--lora-rank", "4"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
