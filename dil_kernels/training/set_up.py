"""What a trainer does once, before it trains: refuse what would be inexact, switch off dropout, install fused heads."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from dil_kernels.data.collators import PackedCollator, SharedPrefixCollator
from dil_kernels.models.fused_head import install_fused_heads
from dil_kernels.models.packed_attention import UnsupportedPackingError, attention_of, install_packed_attention
from dil_kernels.models.prefix_sharing import install_prefix_sharing
from dil_kernels.models.probes import is_rounding
from dil_kernels.models.tensor_parallel import (
    data_parallel_size,
    is_loaded_in_parts,
    tensor_parallel_size,
    uneven_tied_rows,
)
from dil_kernels.training.adapters import has_adapters
from dil_kernels.training.agreement import refuse_lone_processes
from dil_kernels.training.config import JOINED_ROWS
from dil_kernels.training.model_checks import check_causal_lm, keep_gradients_of_4_bits, training_mode_difference

logger = logging.getLogger(__name__)


def policy_and_reference(model: Any, ref_model: Any, parallelism_config: Any) -> tuple[Any, Any]:
    """The models to train and to refer to, loaded with weights in fp32 if they are given by their names.

    Args:
        model: or its name.
        ref_model: or its name; None for none.
        parallelism_config: that the user gave, or None.

    Raises:
        OSError: there is no model of this name.
        TypeError: it is no causal language model.
        ValueError: they are one.
        NotImplementedError: weights take no gradients, or are split over other processes than parallelism_config says,
            or those of ref_model over processes that have different batches.
    """
    model, ref_model = _causal_lm(model, "model"), _causal_lm(ref_model, "ref_model")
    if ref_model is model:
        raise ValueError("ref_model is the model that training changes; leave it out for a frozen copy")
    if ref_model is not None:
        _refuse_another_reference_split(ref_model, model)
    if parallelism_config is not None:
        _refuse_another_split(parallelism_config, model)
    return model, ref_model


def _refuse_another_reference_split(ref_model: Any, model: Any) -> None:
    """Refuse a reference whose parts lie on processes that take different batches."""
    own, others = tensor_parallel_size(model), tensor_parallel_size(ref_model)
    if own % others:
        raise NotImplementedError(
            f"ref_model was loaded with tp_size={others}, but model with {own}: the processes that have the parts of "
            "ref_model would take different batches; load ref_model as model, or whole"
        )


def _causal_lm(model: Any, name: str) -> Any:
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    if model is not None or name == "model":
        check_causal_lm(model, name)
        keep_gradients_of_4_bits(model, name)
    return model


def tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """The tokenizer that was given, or that of the model if this was given by its name.

    Raises:
        OSError: there is none of this name.
        ValueError: neither was given.
    """
    if tokenizer is None and not isinstance(model, str):
        raise ValueError("processing_class must be the tokenizer of the model, got None")
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False) if tokenizer is None else tokenizer


def refuse_inexact_setups(trainer: Trainer) -> None:
    """Refuse set-ups in which the loss would not be the one that is stated, or the pairs of a step be miscounted.

    Raises:
        NotImplementedError: the message is the reason.
    """
    refuse_split_batches(trainer, tensor_parallelism=True)
    accelerator: Any = trainer.accelerator
    loading: Any = trainer.args.accelerator_config
    if not loading.use_seedable_sampler:
        raise NotImplementedError(
            "accelerator_config with use_seedable_sampler=False: a run that is resumed within an epoch would take the "
            "rows of this epoch in another order; leave it out"
        )
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise NotImplementedError("FSDP 1 is not supported; set fsdp_version: 2 in the config of accelerate")
    _refuse_router_loss(trainer.model, tell=trainer.is_world_process_zero())


def refuse_split_batches(trainer: Trainer, *, tensor_parallelism: bool = False) -> None:
    """Refuse set-ups that take a batch apart, or processes that do not know of each other.

    Args:
        trainer: under construction.
        tensor_parallelism: whether it can train a model that is split over processes.

    Raises:
        NotImplementedError: the message is the reason.
    """
    accelerator: Any = trainer.accelerator
    refuse_lone_processes(accelerator.num_processes)
    refuse_streams(trainer.eval_dataset, accelerator.num_processes)
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            f"{trainer.args.n_gpu} GPUs in one process would split a batch across its pairs; use torchrun, or make "
            "one GPU visible with CUDA_VISIBLE_DEVICES"
        )
    loading: Any = trainer.args.accelerator_config
    if loading.dispatch_batches or loading.split_batches:
        raise NotImplementedError(
            "accelerator_config with dispatch_batches or split_batches cuts batches apart, in which the rejected "
            "responses follow the chosen ones; leave both out: every process loads batches of its own"
        )
    _refuse_parallelism(trainer, tensor_parallelism)
    if is_loaded_in_parts(trainer.model):
        _refuse_parts(trainer)


def refuse_streams(dataset: Any, num_processes: int) -> None:
    """Refuse data without a length to evaluate on, where several processes share them.

    accelerate has one process read for all and cuts its batches apart, which are pairs; or it fills their last batches
    with rows of the beginning, and cannot take these out of what is gathered.

    Args:
        dataset: or several, by name; None for none.
        num_processes: that evaluate.
    """
    parts = dataset.values() if isinstance(dataset, Mapping) else [dataset]
    if num_processes > 1 and not all(isinstance(part, Sized) for part in parts if part is not None):
        raise NotImplementedError(
            f"evaluation on a stream in {num_processes} processes: its batches would be cut apart, or rows counted "
            "twice; take a part: Dataset.from_list(list(stream.take(n)))"
        )


def _refuse_parallelism(trainer: Any, tensor_parallelism: bool) -> None:
    """Refuse ways to split a model, or a sequence, that the trainer does not know."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if not tensor_parallelism and (
        parallelism is not None or any(map(is_loaded_in_parts, (trainer.model, trainer.ref_model)))
    ):
        raise NotImplementedError(
            "the trainer on TRL supports data parallelism only: leave out parallelism_config, and load models whole"
        )
    if parallelism is None:
        return
    if parallelism.cp_size > 1 or parallelism.sp_size > 1:
        raise NotImplementedError(
            "parallelism_config with cp_size or sp_size > 1 cuts sequences apart: the log-prob of a response would be "
            "in pieces on several processes, its first label on another one than its logits; use tp_size"
        )
    _refuse_another_split(parallelism, trainer.model)
    # transformers shares its batches out over all processes.
    if parallelism.tp_size > 1 and getattr(trainer.args, "train_sampling_strategy", None) == "batch_rebalance":
        raise NotImplementedError(
            "train_sampling_strategy='batch_rebalance' was given, but it deals out batches to the processes of tensor "
            "parallelism, which must take the same ones: take 'group_by_length' or 'random'"
        )


def _refuse_another_split(parallelism: Any, model: Any) -> None:
    """Refuse a model that is not split over processes as a ParallelismConfig with tensor parallelism says."""
    if parallelism.tp_size == 1 and parallelism.data_parallel_size > 1:
        raise NotImplementedError(
            "parallelism_config with dp_shard_size or dp_replicate_size, but no tp_size: leave it out"
        )
    asked = parallelism.tp_size, parallelism.data_parallel_size
    found = tensor_parallel_size(model), data_parallel_size(model)
    if parallelism.tp_size > 1 and asked != found:
        raise NotImplementedError(
            f"parallelism_config has tp_size={asked[0]} and {asked[1]} for data parallelism, but model was loaded with "
            f"{found[0]} and {found[1]}: load it with from_pretrained(..., distributed_config=DistributedConfig("
            "tp_size=...)), with dp_replicate_size or fsdp_size for data parallelism, and leave parallelism_config out"
        )


def _refuse_parts(trainer: Any) -> None:
    """Refuse what would train a model that was loaded in parts inexactly."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "the model was loaded in parts, and accelerate was asked for FSDP or DeepSpeed: launch with torchrun, and "
            "let DistributedConfig(fsdp_size=...) or (dp_replicate_size=...) say how it is loaded"
        )
    if has_adapters(trainer.model) and tensor_parallel_size(trainer.model) > 1 < data_parallel_size(trainer.model):
        raise NotImplementedError(
            "adapters on a model that is split for tensor parallelism and for data parallelism, too: nobody brings the "
            "gradients of adapters on split layers together; take one of the two"
        )
    rows = uneven_tied_rows(trainer.model)
    if rows is not None:
        raise NotImplementedError(
            f"the {rows} rows of the tied embeddings cannot be dealt out evenly: as transformers hands them to FSDP2, "
            "the head would keep some as they were; take a multiple of fsdp_size * tp_size, or dp_replicate_size"
        )


def _refuse_router_loss(model: Any, *, tell: bool) -> None:
    """Refuse a model whose config asks for the loss of its router; of other mixtures of experts, say it is left out."""
    config = model.config.get_text_config() if hasattr(getattr(model, "config", None), "get_text_config") else None
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(
            "model.config.output_router_logits is true, but DILTrainer adds no router_aux_loss to its loss: set it to "
            "False, or take the trainer of dil_kernels.integrations.trl, which adds it"
        )
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if tell and coefficient and hasattr(config, "output_router_logits"):
        logger.warning(
            "%s can balance its experts by a loss of their router (router_aux_loss_coef=%g), which DILTrainer does not "
            "add; the trainer of dil_kernels.integrations.trl does",
            type(model).__name__,
            coefficient,
        )


def choose_heads(models: Sequence[nn.Module], wanted: bool | None, *, tell: bool) -> bool:
    """`install_fused_heads`, and whether they are; with `tell`, print which way log-probs are taken, and why."""
    problem = install_fused_heads(models, wanted)
    if tell:
        how = "from the fused head, without logits" if problem is None else f"from logits, since {problem}"
        print(f"DILTrainer takes log-probs {how}.")
    return problem is None


def join_rows(trainer: Any, data_collator: Any, models: Sequence[nn.Module]) -> None:
    """Let a `DILTrainer` make batches without padding, or with each prompt once, if its models compute the same.

    Args:
        trainer: under construction.
        data_collator: the one that the user gave.
        models: the policy and, if it is another model, the reference.

    Raises:
        UnsupportedPackingError: they do not.
        ValueError: there is a data collator.
    """
    option = joined_rows_of(trainer.args)
    if data_collator is not None:
        raise ValueError(f"{option}=True makes the rows of batches itself; give no data_collator, or {option}=False")
    install_joined_rows(models, option, trainer.accelerator)
    trainer.data_collator = SharedPrefixCollator() if option == "prefix_sharing" else PackedCollator()


def joined_rows_of(args: Any) -> str | None:
    """The option that joins the sequences of a batch to one row, prefix_sharing or padding_free; None if neither."""
    return next((option for option in JOINED_ROWS if getattr(args, option)), None)


def install_joined_rows(models: Sequence[nn.Module], option: str | None, accelerator: Any) -> None:
    """Prepare models for batches in one row, if they compute the same on it.

    Args:
        models: not yet wrapped.
        option: as of `joined_rows_of`; None for nothing.
        accelerator: of the trainer.

    Raises:
        UnsupportedPackingError: they do not.
    """
    if option is None:
        return
    # FlashAttention has no fp32, in which all else is checked most closely.
    flash = any("flash" in attention_of(model) for model in models)
    try:
        with accelerator.autocast() if flash else contextlib.nullcontext():
            (install_prefix_sharing if option == "prefix_sharing" else install_packed_attention)(*models)
    except UnsupportedPackingError as error:
        raise UnsupportedPackingError(f"{option}=True was given, but {error}") from error


def disable_noise(model: nn.Module, *, tell: bool) -> None:
    """Disable dropout, and say so where training mode is still not evaluation mode, in which a reference is.

    Args:
        model: the policy, not yet wrapped.
        tell: whether this process is the one to say it.
    """
    disable_dropout(model)
    changed = training_mode_difference(model)
    if tell and not is_rounding(changed, model):
        logger.warning(
            "%s computes other logits in training mode than in evaluation mode (relative difference %.1e), though its "
            "dropout is off: the log ratios of a policy that equals its reference are not 0",
            type(model).__name__,
            changed,
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: the modules, and the rates that modules hand to functions.

    So is the noise that routers of experts multiply with in training ("jitter"); not where evaluation goes by it, too,
    as in Phi-3.5-MoE. Rates that a module looks up in its config whenever it runs, as Falcon's do, become 0 there, and
    in what is saved.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates(module, "drop"):
            setattr(module, name, 0.0)
        for name in _rates(module, "jitter"):
            if re.search(rf"self\.training and self\.{name}\b", _source(type(module).forward)):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name, rate in _rates(config, "drop").items():
            if rate and re.search(rf"config\.{name}\b", _source(type(module).forward)):
                setattr(config, name, 0.0)


def _rates(owner: Any, kind: str) -> dict[str, float]:
    return {
        name: value
        for name, value in getattr(owner, "__dict__", {}).items()
        if kind in name and isinstance(value, float)
    }


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made at run time, or compiled
        return ""
