"""Small causal language models of many architectures, and their log-probs with and without the fused head."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from dil_kernels.models.fused_head import FusedHeadOutput

IGNORE = -100
RELATIVE = 1e-5  # fp32 against fp32, of the largest entry: two layers, a few hundred terms a sum
V = 211

COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
EXPERTS["experts_implementation"] = "eager"  # the grouped product has no fp64
MINICPM = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FREE = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # of dropout

# model class: config, logit scale, softcap
ARCHITECTURES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "LlamaForCausalLM": (COMMON, 1.0, None),  # also SmolLM and SmolLM2
    "MistralForCausalLM": (COMMON, 1.0, None),
    "Qwen2ForCausalLM": (COMMON | {"tie_word_embeddings": True}, 1.0, None),
    "Qwen3ForCausalLM": (COMMON | {"head_dim": 8}, 1.0, None),
    "GemmaForCausalLM": (COMMON | {"head_dim": 8, "tie_word_embeddings": True}, 1.0, None),
    "Gemma2ForCausalLM": (COMMON | {"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0),
    "Gemma3ForCausalLM": (COMMON | {"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0),
    "GraniteForCausalLM": (COMMON | {"logits_scaling": 0.7}, 1 / 0.7, None),
    "CohereForCausalLM": (COMMON | {"logit_scale": 0.25, "tie_word_embeddings": True}, 0.25, None),
    "Cohere2ForCausalLM": (COMMON | {"logit_scale": 0.25, "head_dim": 8}, 0.25, None),
    "PhiForCausalLM": (COMMON, 1.0, None),  # bias
    "Phi3ForCausalLM": (COMMON, 1.0, None),
    "SmolLM3ForCausalLM": (COMMON, 1.0, None),
    "Olmo2ForCausalLM": (COMMON, 1.0, None),
    "StableLmForCausalLM": (COMMON, 1.0, None),
    "Starcoder2ForCausalLM": (COMMON | {"embedding_dropout": 0.0, "residual_dropout": 0.0}, 1.0, None),
    "GPTNeoXForCausalLM": (COMMON, 1.0, None),  # Pythia
    "GPT2LMHeadModel": (GPT | FREE, 1.0, None),
    "GPTJForCausalLM": (GPT | FREE | {"rotary_dim": 4}, 1.0, None),  # bias
    "OPTForCausalLM": (COMMON | {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 16, "init_std": 0.2}, 1.0, None),
    "MixtralForCausalLM": (COMMON | EXPERTS, 1.0, None),
    "MiniCPM3ForCausalLM": (COMMON | MINICPM | {"dim_model_base": 16}, 1.0, None),  # scales before the head
    "HyperCLOVAXForCausalLM": (COMMON | {"logits_scaling": 0.7}, 0.7, None),  # multiplies where Granite divides
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**copy.deepcopy(ARCHITECTURES[name][0]), **options})
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            nn.init.normal_(parameter)
    return model.to(dtype)


def batch(T: int = 9, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs of a right-padded batch [3, T], labels that score a part of it, an upstream gradient [3, T - 1]."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (3, T), generator=gen)
    mask = (torch.arange(T) < torch.tensor([[T], [T - 2], [T - 4]])).long()
    labels = torch.where(mask.bool() & (torch.arange(T) > 2), ids, IGNORE)
    return {"input_ids": ids, "attention_mask": mask}, labels, torch.randn(3, T - 1, generator=gen)


def logps_of_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    logps = (logits[:, :-1] / temperature).log_softmax(-1)
    targets = labels[:, 1:]
    return torch.where(targets == IGNORE, 0.0, logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1))


def own(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, **options: Any) -> Tensor:
    return logps_of_logits(model(**inputs).logits, labels, **options)


def fused(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, **options: Any) -> Tensor:
    output = model(**inputs, score_labels=labels, score_options=options)
    assert isinstance(output, FusedHeadOutput)
    return output.token_logps


def gradients(model: nn.Module, logps: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logps.backward(upstream.to(logps.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def assert_close(actual: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    assert error <= allowed, f"{what}: {error:.2e} off, {allowed:.2e} allowed"


def assert_same(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, upstream: Tensor, **options: Any) -> None:
    """Log-probs and every gradient of the fused head are those of the model's logits, in fp32."""
    expected = own(model, inputs, labels, **options)
    expected_grads = gradients(model, expected, upstream)
    actual = fused(model, inputs, labels, **options)
    assert_close(actual, expected, RELATIVE * largest(expected), "log-probs")
    assert_same_gradients(gradients(model, actual, upstream), expected_grads)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    noise = 1e-7 * max(map(largest, expected.values()))  # of gradients that cancel to zero, as a key's bias
    for name, grad in expected.items():
        assert_close(actual[name], grad, RELATIVE * largest(grad) + noise, name)


def with_lora(base: PreTrainedModel, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=7, lora_dropout=0.0, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:  # not as at the start of training
            nn.init.normal_(parameter, std=0.3)
    return model
