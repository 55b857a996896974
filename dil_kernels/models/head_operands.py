"""Which modules an output head is made of, and the product that it is; the only part that knows PEFT."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.functional.vocab_parallel import is_dtensor
from dil_kernels.models.head_requests import UnsupportedHeadError, is_answering, replaced_forward
from dil_kernels.models.tensor_parallel import is_forward_of

__all__ = ["head_sizes", "is_of_fsdp2", "operands", "site_problem", "sites_of", "unwrapped"]

LINEAR_FORWARD = nn.Linear.forward


def unwrapped(model: Any) -> nn.Module:
    """The model in a `PeftModel`, or the model itself."""
    return model.get_base_model() if _is(model, "peft.peft_model", "PeftModel") else model


def _is(module: nn.Module, library: str, name: str) -> bool:
    """Whether the module is of a class of a library that may not be imported."""
    return library in sys.modules and isinstance(module, getattr(sys.modules[library], name))


def is_of_fsdp2(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the weights of the module when it is called."""
    return _is(module, "torch.distributed.fsdp", "FSDPModule")


def _is_lora(module: nn.Module) -> bool:
    return _is(module, "peft.tuners.lora.layer", "Linear")


def sites_of(head: Any) -> list[nn.Module]:
    """The modules of which one is called for the logits."""
    if _is(head, "peft.utils.other", "ModulesToSaveWrapper"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def head_sizes(head: Any) -> tuple[int, int] | None:
    """Vocabulary and hidden size of a linear head; None of another.

    The head that PEFT ties to saved embeddings says them the other way round than its weight.
    """
    V, D = getattr(head, "out_features", None), getattr(head, "in_features", None)
    if not (isinstance(V, int) and isinstance(D, int)):
        return None
    swapped = tuple(getattr(getattr(head, "weight", None), "shape", ())) == (D, V)
    return (D, V) if swapped else (V, D)


def site_problem(site: Any) -> str | None:
    """Why `operands` would be wrong for the module, whatever adapter is active; None if they would be right."""
    replaced = replaced_forward(site) is not None and not is_forward_of(replaced_forward(site), site)
    problem = "the forward of its output head was replaced (by device_map, or another library)" if replaced else None
    return problem or _problem(site) or (_adapter_problem(site, list(site.lora_B)) if _is_lora(site) else None)


def _problem(site: Any) -> str | None:
    """Of the product without adapters."""
    linear = site
    if _is_lora(site):
        linear = site.base_layer
        if type(site).forward is not sys.modules["peft.tuners.lora.layer"].Linear.forward:
            return f"its output head is a {_name(site)}, whose forward is not that of PEFT's LoRA"
        problem = _uncalled_problem("base_layer", linear)
        if problem is not None:
            return problem
    elif _is(site, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        return f"its output head is a {_name(site)}, an adapter other than plain LoRA on an nn.Linear"
    if type(linear).forward is not LINEAR_FORWARD:
        return f"its output head is a {_name(linear)}, not an nn.Linear"
    if not linear.weight.is_floating_point():
        return f"the weight of its output head is {linear.weight.dtype}"
    return None


def _name(module: nn.Module) -> str:
    """Of its class; whose, if it is a namesake of PyTorch's."""
    name = type(module).__qualname__
    return f"{type(module).__module__}.{name}" if name == "Linear" else name


def _adapter_problem(site: Any, adapters: list[str]) -> str | None:
    for adapter in adapters:
        lora_B = site.lora_B[adapter]
        if adapter in site.lora_variant or lora_B.bias is not None:
            return "its output head has an adapter other than plain LoRA"
        problem = _uncalled_problem("lora_B", lora_B)
        if problem is not None:
            return problem
    return None


def _uncalled_problem(name: str, part: Any) -> str | None:
    """Of a part of the head whose weight is taken without calling it."""
    # torch.compile guards the lookup of an attribute, but not of a key in __dict__.
    if part.forward != LINEAR_FORWARD.__get__(part) and not is_answering(part.forward):
        return f"{name} of its output head is a {_name(part)}, not an nn.Linear, or its forward was replaced"
    if part._forward_hooks or part._forward_pre_hooks:
        return f"{name} of its output head has forward hooks"
    return None


def operands(site: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [B, T, D], weight [V, D] and bias of the product that the head is, as it is now.

    Raises:
        UnsupportedHeadError: it is none.
    """
    is_lora = _is_lora(site)
    adapters: list[str] = []
    if is_lora:
        if site.merged and site.disable_adapters:
            site.unmerge()
        if not site.merged and not site.disable_adapters:
            adapters = [name for name in site.active_adapters if name in site.lora_A]
    problem = _problem(site) or _adapter_problem(site, adapters)
    if problem is not None:
        raise UnsupportedHeadError(problem)
    linear = site.base_layer if is_lora else site
    weight = linear.weight
    if is_dtensor(weight) and not adapters and is_forward_of(replaced_forward(site), site):
        if is_dtensor(hidden_states):
            raise UnsupportedHeadError("its hidden states are split over processes, as those of sequence parallelism")
        return hidden_states, weight, linear.bias
    if type(weight) not in (Tensor, nn.Parameter):
        raise UnsupportedHeadError(f"the weight of the output head is a {type(weight).__name__}, split over devices")
    if not adapters:
        return hidden_states, weight, linear.bias
    # W h + s B (A h) is one product of [W, s B] and [h, A h].
    inputs, weights = [hidden_states], [weight]
    for name in adapters:
        lora_A, lora_B, dropout = site.lora_A[name], site.lora_B[name], site.lora_dropout[name]
        inputs.append(lora_A(dropout(hidden_states.to(lora_A.weight.dtype))).to(hidden_states.dtype))
        weights.append((lora_B.weight * site.scaling[name]).to(weight.dtype))
    return torch.cat(inputs, dim=-1), torch.cat(weights, dim=-1), linear.bias
