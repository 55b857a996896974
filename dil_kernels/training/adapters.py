"""Adapters of PEFT in training: adding one, telling what it changes, and looking past it; only this knows PEFT."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.wording import needs_extra

try:
    from transformers import TrainingArguments, set_seed
except ImportError as error:
    raise ImportError(needs_extra("training", "train", error)) from error

from dil_kernels.models.tensor_parallel import tensor_parallel_size

REFERENCE_COPY = "dil_reference"  # how names of frozen copies of adapters that came trained begin
# In the config of an adapter that becomes a copy: otherwise weights of the base, or its layers, could change again.
AS_COPIED = {"init_lora_weights": True, "layer_replication": None}
ZERO_AT_FIRST = ("lora_B", "lora_embedding_A")  # the factors that peft initialises with zeros


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is a `PeftModel`; peft is not imported for it."""
    return "peft.peft_model" in sys.modules and isinstance(model, sys.modules["peft.peft_model"].PeftModel)


def with_adapter(model: Any, peft_config: Any, args: TrainingArguments) -> Any:
    """The model with a new adapter if one is asked for; ready for recomputing activations if it has one.

    Args:
        model: changed in place; loaded in 4 or 8 bits, it is prepared for a new adapter as peft asks for it.
        peft_config: a `peft.PeftConfig`, or None for the model as it is.
        args: seed and activation checkpointing.

    Raises:
        ImportError: peft is not installed.
        TypeError: another kind of configuration.
        ValueError: the model has an adapter already.
        NotImplementedError: the adapter would copy layers of a model that is split over processes, or be on its
            embeddings or its head.
    """
    if peft_config is not None:
        model = _with_new_adapter(model, peft_config, args)
    if has_adapters(model) and tensor_parallel_size(model) > 1:
        _refuse_split_vocabulary(model)
    if has_adapters(model) and _checkpointing(args)[0]:
        # Reentrant checkpoints pass gradients on only if an input, here that of frozen embeddings, needs one.
        model.enable_input_require_grads()
    return model


def _with_new_adapter(model: Any, peft_config: Any, args: TrainingArguments) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("peft_config needs peft: pip install peft") from error
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if has_adapters(model):
        raise ValueError("peft_config was given, but model has an adapter already: give the one or the other")
    whole_layers = getattr(peft_config, "modules_to_save", None)
    if whole_layers and tensor_parallel_size(model) > 1:
        raise NotImplementedError(
            f"modules_to_save={whole_layers} was given, but peft cannot copy layers of a model that is split over "
            "processes: leave it out, or load the model whole"
        )
    set_seed(args.seed)  # the adapter starts from random numbers
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        wanted, options = _checkpointing(args)
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=wanted, gradient_checkpointing_kwargs=options
        )
    return peft.get_peft_model(model, peft_config)


def _refuse_split_vocabulary(model: Any) -> None:
    for name, module in (("embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        if hasattr(module, "base_layer"):
            raise NotImplementedError(
                f"the adapter is on the {name}, whose vocabulary is split over processes, where peft takes one part "
                "for the whole: leave it out of target_modules, or load the model whole"
            )


def _checkpointing(args: TrainingArguments) -> tuple[bool, dict[str, Any] | None]:
    """Whether activations are recomputed, and how; the first versions of transformers 5 name it after gradients."""
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    return bool(getattr(args, name)), getattr(args, f"{name}_kwargs")


def trained_adapter(model: Any) -> str:
    """The name of the adapter that training changes.

    Raises:
        NotImplementedError: a kind of adapter that changes the sequence, or several adapters at once.
        ValueError: no parameter is trainable, or the adapter is merged into the weights.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise NotImplementedError(f"one adapter must be active, got {active}; call model.set_adapter(name)")
    config = model.peft_config[active[0]]
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise NotImplementedError(
            f"adapter {active[0]!r} is of peft_type {config.peft_type.value}: its virtual tokens are no part of the "
            "labels; train LoRA or another adapter of weights"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no trainable parameter; load its adapter with is_trainable=True")
    if any(active[0] in merged for *_, merged in adapters_in_use(model)):
        raise ValueError(
            f"adapter {active[0]!r} is merged into the weights of model, where no gradient reaches it; call "
            "model.unmerge_adapter()"
        )
    return active[0]


def parameters_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by names that do not contain the adapter's."""
    found = {}
    for path, module in model.named_modules():
        for kind in getattr(module, "adapter_layer_names", ()):
            if not _holds(module, kind, adapter):
                continue
            part = getattr(module, kind)[adapter]
            named = part.named_parameters() if isinstance(part, nn.Module) else [("", part)]
            found.update({f"{path}.{kind}.{name}": parameter for name, parameter in named})
    return found


def adapters_in_use(model: nn.Module) -> list[tuple[str, bool, list[str], dict[str, Any], list[str]]]:
    """What the state of a model does not say of its adapters: in each layer, which are active, and how they count.

    Returns:
        Of every layer with adapters: its path, whether they are switched off, those that are active, their scalings,
        and those that are merged into its weight.
    """
    return [
        (
            path,
            bool(module.disable_adapters),
            list(module.active_adapters),
            dict(getattr(module, "scaling", {})),
            list(getattr(module, "merged_adapters", [])),
        )
        for path, module in model.named_modules()
        if hasattr(module, "adapter_layer_names")
    ]


def trains_base_weights(model: nn.Module, adapter: str) -> bool:
    """Whether training changes more than the adapter, so that the base is not the reference for long."""
    own = {id(parameter) for parameter in parameters_of(model, adapter).values()}
    return any(parameter.requires_grad and id(parameter) not in own for parameter in model.parameters())


def changes_nothing(model: Any, adapter: str) -> bool:
    """Whether the model computes what its base computes: LoRA as initialised, all products B A zero.

    Adapters other than LoRA, and those initialised out of the base weights (PiSSA, OLoRA), count as changing.
    """
    if not _is_lora(model, adapter):
        return False
    for module in model.modules():
        if _holds(module, "modules_to_save", adapter):
            if not _equal(module.original_module, module.modules_to_save[adapter]):
                return False
        elif hasattr(module, "lora_B"):
            zero = [getattr(module, kind)[adapter] for kind in ZERO_AT_FIRST if _holds(module, kind, adapter)]
            if any(bool(value.any()) for part in zero for value in _values(part)):
                return False
        elif any(_holds(module, kind, adapter) for kind in getattr(module, "adapter_layer_names", ())):
            return False
    return True


def can_be_copied(model: Any, adapter: str) -> bool:
    """Whether `freeze_copy` holds for the adapter: LoRA without a variant such as DoRA, on weights that are not tied.

    Of adapters that train biases a model has one.
    """
    if not _is_lora(model, adapter):
        return False
    config = model.peft_config[adapter]
    if config.bias != "none" or getattr(config, "ensure_weight_tying", False):
        return False
    return not any(_holds(module, "lora_variant", adapter) for module in model.modules())


def freeze_copy(model: Any, adapter: str) -> str:
    """Add a frozen copy of an adapter, as it is now, to the model; the active adapter stays active.

    Returns:
        The name of the copy.
    """
    config = copy.deepcopy(model.peft_config[adapter])
    vars(config).update(AS_COPIED)
    config.inference_mode = True
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    names = (f"{REFERENCE_COPY}{number or ''}" for number in itertools.count())  # those of earlier trainers stay
    copied = next(name for name in names if name not in model.peft_config)
    model.add_adapter(copied, config)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    copy_adapter(model, adapter, copied)
    return copied


def copy_adapter(model: Any, adapter: str, copied: str) -> None:
    """Give an adapter the parameters and scalings of another one, and freeze it."""
    originals, copies = parameters_of(model, adapter), parameters_of(model, copied)
    assert originals.keys() == copies.keys()
    for name, parameter in copies.items():
        parameter.data = originals[name].data.clone()
        parameter.requires_grad_(False)
    for module in model.modules():
        if _holds(module, "scaling", adapter):
            module.scaling[copied] = module.scaling[adapter]


def freeze_adapter(model: Any, adapter: str, trained: str) -> None:
    """Check that the reference adapter exists, and freeze it.

    Raises:
        ValueError: it is not there, or is the one that is trained.
    """
    if adapter not in model.peft_config:
        raise ValueError(
            f"ref_adapter_name={adapter!r} is not an adapter of model, which has {list(model.peft_config)}"
        )
    if adapter == trained:
        raise ValueError(f"ref_adapter_name={adapter!r} is the adapter that training changes")
    for parameter in parameters_of(model, adapter).values():
        parameter.requires_grad_(False)


@contextlib.contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Let the model compute with another adapter, or with none, and then as before.

    Which parameters require gradients stays as it is, within, too: peft changes it, and wrappers go by it.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter
    if adapter is None:
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter(adapter)
    _restore(flags)
    try:
        yield
    finally:
        if adapter is None:
            model.base_model.enable_adapter_layers()
        else:
            model.set_adapter(active)
        _restore(flags)


@contextlib.contextmanager
def hidden(model: Any, adapter: str | None) -> Iterator[None]:
    """Keep an adapter, and copies that earlier trainers left, out of what `save_pretrained` writes."""
    adapters = model.peft_config if has_adapters(model) else {}
    names = [name for name in adapters if name == adapter or name.startswith(REFERENCE_COPY)]
    configs = {name: adapters.pop(name) for name in names}
    try:
        yield
    finally:
        adapters.update(configs)


@contextlib.contextmanager
def best_is_adapter(trainer: Any) -> Iterator[None]:
    """Let a trainer find the adapter in its best checkpoint, where peft gives it a directory unless it is "default"."""
    state, checkpoint = trainer.state, trainer.state.best_model_checkpoint
    if has_adapters(trainer.model) and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        own = Path(checkpoint, trained_adapter(trainer.model))
        state.best_model_checkpoint = str(own) if own.is_dir() else checkpoint
    try:
        yield
    finally:
        state.best_model_checkpoint = checkpoint


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def _is_lora(model: Any, adapter: str) -> bool:
    return model.peft_config[adapter].peft_type.value == "LORA"


def _holds(module: nn.Module, kind: str, adapter: str) -> bool:
    """Whether the module has something of the kind for the adapter."""
    held: Any = getattr(module, kind, None)
    return hasattr(held, "keys") and adapter in held


def _values(part: nn.Module | Tensor) -> list[Tensor]:
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


def _equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
