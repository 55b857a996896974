"""Models without a trainer's optimizer under FSDP2 and DeepSpeed: copied, and sharded for forward passes only."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dil_kernels.wording import needs_extra

try:
    from accelerate.utils import broadcast_object_list
    from transformers.utils.quantization_config import QuantizationMethod
except ImportError as error:
    raise ImportError(needs_extra("training", "train", error)) from error

from dil_kernels.functional.vocab_parallel import is_dtensor
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.probes import weights_are_whole
from dil_kernels.models.tensor_parallel import copied, is_loaded_in_parts, tensor_parallel_size
from dil_kernels.training.adapters import has_adapters


def zero_stage(accelerator: Any) -> int | None:
    """The stage of DeepSpeed's ZeRO, None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.zero_stage)


def is_wrapped_late(accelerator: Any) -> bool:
    """Whether a model cannot be called as it will be trained before its training begins, with an optimizer."""
    return bool(accelerator.is_fsdp2) or zero_stage(accelerator) is not None


def processes_of_a_batch(accelerator: Any) -> int:
    """How many processes compute the same rows together: those of tensor parallelism."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else int(parallelism.tp_size)


def share_of_batches(accelerator: Any) -> tuple[int, int]:
    """Over how many the batches are shared out, those that compute the same rows being one, and which this one is."""
    together = processes_of_a_batch(accelerator)
    return accelerator.num_processes // together, accelerator.process_index // together


def gather_batches(accelerator: Any, values: torch.Tensor) -> torch.Tensor:
    """Values [rows, ...] of the batches of all processes, each batch once."""
    every_process = accelerator.gather(values).unflatten(0, (-1, len(values)))
    return every_process[:: processes_of_a_batch(accelerator)].flatten(0, 1)


def gather_rows(accelerator: Any, values: torch.Tensor) -> torch.Tensor:
    """Likewise in an evaluation, without the rows that fill up its last batches."""
    if processes_of_a_batch(accelerator) == 1:
        return accelerator.gather_for_metrics(values)
    state, rows = accelerator.gradient_state, gather_batches(accelerator, values)
    return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows


def gather_each_once(trainer: Any) -> None:
    """Let the next evaluation of a `transformers.Trainer` gather as `gather_rows` does."""
    if processes_of_a_batch(trainer.accelerator) > 1:
        trainer.gather_function = functools.partial(gather_rows, trainer.accelerator)


def agree_on_whole_weights(model: nn.Module) -> None:
    """Of a model that was loaded in parts, what every process has whole (a new adapter) becomes that of the first."""
    if not is_loaded_in_parts(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and not is_dtensor(parameter):
            torch.distributed.broadcast(parameter.detach(), 0)


def is_sharded(model: Any) -> bool:
    """Whether FSDP2 has taken the model over, or the one in a `PeftModel`."""
    base = model.get_base_model() if has_adapters(model) else model
    return isinstance(model, FSDPModule) or isinstance(base, FSDPModule)


def shard_again(model: Any) -> None:
    """Let FSDP2 give the parameters in parts, as an optimizer must have them; a forward alone leaves some whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def as_on_main_process(decide: Callable[..., bool], *args: Any) -> bool:
    """What `decide(*args)` is on the main process, which may be the only one that has loaded the weights."""
    if not torch.distributed.is_initialized():
        return decide(*args)
    decision = [decide(*args) if torch.distributed.get_rank() == 0 else None]
    return bool(broadcast_object_list(decision)[0])


def keep_outputs_exact(accelerator: Any) -> None:
    """Stop FSDP2 from rounding what the model returns: log-probs in bf16 are 0.03 off at 8 nats."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_processes(trainer: Any) -> None:
    """What a `DILTrainer` of several processes needs before its models are looked at and wrapped."""
    agree_on_whole_weights(trainer.model)
    keep_outputs_exact(trainer.accelerator)
    expect_all_gradients(trainer.model, trainer.accelerator, trainer.args.ddp_find_unused_parameters)


def expect_all_gradients(model: nn.Module, accelerator: Any, given: bool | None) -> None:
    """Spare DDP the search for parameters without a gradient, in every step, where there can be none.

    It warns of such a search. Left to it are mixtures of experts, models that skip layers and those that are not of
    transformers, in which it depends on the data what is used.

    Args:
        model: the policy, not yet wrapped.
        accelerator: of the trainer.
        given: `ddp_find_unused_parameters`.
    """
    handler = getattr(accelerator, "ddp_handler", None)
    others = accelerator.num_processes == 1 or is_wrapped_late(accelerator) or is_loaded_in_parts(model)
    if handler is not None and not others and given is None and _uses_all_parameters(model):
        handler.find_unused_parameters = False


def _uses_all_parameters(model: Any) -> bool:
    base: Any = model.get_base_model() if has_adapters(model) else model
    config: Any = getattr(base, "config", None)
    if not type(base).__module__.startswith("transformers.models.") or not weights_are_whole(model):
        return False
    options = config.get_text_config().to_dict()
    if any(re.search("expert|moe", name) or ("layerdrop" in name and value) for name, value in options.items()):
        return False
    ids = torch.ones(1, 2, dtype=torch.int64, device=base.device)
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=ids, use_cache=False).logits
    except Exception:  # whatever a model's own code may raise: training raises it, too
        return False
    used = _leaves(logits)
    return all(id(parameter) in used for parameter in model.parameters() if parameter.requires_grad)


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the parameters that a tensor was computed from."""
    found: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [function for function, _ in node.next_functions]
    return found


def frozen_copy(model: nn.Module, accelerator: Any) -> nn.Module:
    """A copy of a model, without gradients and in evaluation mode; sharded where the model was loaded sharded.

    Raises:
        NotImplementedError: FSDP2 has it, which allows no copies; or it has weights that are computed from others.
    """
    if is_sharded(model):
        raise NotImplementedError(
            "the reference would be a copy of model, but FSDP2, with which it was loaded, allows none: give ref_model, "
            "loaded likewise, or precompute_ref_log_probs=True"
        )
    memo: dict[int, Any] = {}
    if zero_stage(accelerator) == 3:
        for parameter in model.parameters():
            if hasattr(parameter, "ds_id"):
                memo[id(parameter)] = _copied_partition(parameter, accelerator)
    if tensor_parallel_size(model) > 1:
        return copied(model, memo).requires_grad_(False).eval()
    try:
        return copy.deepcopy(model, memo).requires_grad_(False).eval()
    except RuntimeError as error:
        if "deepcopy" not in str(error):
            raise
        raise NotImplementedError(
            "the reference would be a copy of model, whose weights cannot be copied, as some are computed from others "
            "(an adapter with ensure_weight_tying, say): give ref_model, or precompute_ref_log_probs=True"
        ) from error


def _copied_partition(parameter: nn.Parameter, accelerator: Any) -> nn.Parameter:
    """A copy of a parameter that DeepSpeed has partitioned, partitioned likewise; one is whole at a time."""
    import deepspeed

    holder = nn.Module()
    with deepspeed.zero.GatheredParameters([parameter]):
        holder.weight = nn.Parameter(parameter.data.clone(), requires_grad=False)
    deepspeed.zero.Init(module=holder, config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config)
    return holder.weight


def place_frozen(model: nn.Module, accelerator: Any) -> nn.Module:
    """The model, frozen, in evaluation mode, ready to be called; sharded as the accelerator shards what it trains."""
    model.requires_grad_(False).eval()
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        model = fsdp2_prepare_model(accelerator, model)
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(True)  # the backward that would shard the head again never comes
        return model
    if zero_stage(accelerator) is not None:
        return _inference_engine(model, accelerator)
    move(model, accelerator.device)
    return model


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless it was quantised to one, or loaded in parts."""
    if getattr(model, "quantization_method", None) != QuantizationMethod.BITS_AND_BYTES and not is_sharded(model):
        model.to(device)


def _inference_engine(model: nn.Module, accelerator: Any) -> nn.Module:
    """A DeepSpeed engine without an optimizer: in the policy's precision, partitioned under ZeRO-3 only."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for training_only in ("optimizer", "scheduler"):
        config.pop(training_only, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # which returns nothing
    return engine
