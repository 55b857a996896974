"""What decides what a run learns, kept with every checkpoint, so that a run that is resumed can be compared with it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from torch import nn

from dil_kernels.data.token_columns import GIVEN_REFERENCE
from dil_kernels.models.probes import weights_are_whole
from dil_kernels.training.adapters import REFERENCE_COPY, parameters_of
from dil_kernels.training.ref_cache import dataset_fingerprint
from dil_kernels.training.reference_policy import ReferencePolicy
from dil_kernels.training.sharding import processes_of_a_batch

RECORD_NAME = "dil_run.json"  # in every checkpoint
SAMPLES = 64  # values of a parameter that its fingerprint looks at
# Options that say what is written, evaluated and reported, where and how fast a run goes; any other one changes what is
# learned. The sizes of batches are compared as their product.
FREE = re.compile(
    r"output_dir|do_.*|resume_.*|overwrite_output_dir|logging_.*|log_.*|report_to|run_name|project|trackio_.*|disable_tqdm"
    r"|save_.*|eval_.*|per_device_.*|gradient_accumulation_steps|auto_find_batch_size|prediction_loss_only|batch_eval.*"
    r"|include_.*|label_names|load_best_model_at_end|metric_for_best_model|greater_is_better|hub_.*|push_to_hub.*"
    r"|dataloader_(?!drop_last).*|dataset_num_proc|ddp_.*|fsdp.*|deepspeed|accelerator_config|parallelism_config"
    r"|local_rank|use_cpu|no_cuda|tf32|full_determinism|average_tokens_across_devices|debug|skip_memory_metrics"
    r"|torch_compile.*|torch_empty_cache_steps|activation_checkpointing.*|gradient_checkpointing.*|use_cache"
    r"|use_liger_kernel|liger_kernel_config|backend|fused_head|stash_bytes|padding_free|prefix_sharing|precompute_ref_log_probs"
    r"|ref_cache_dir|num_generations_at_eval|generate_max_new_tokens|ignore_data_skip|restore_callback_states.*"
    r"|enable_jit_checkpoint|precompute_ref_batch_size|pad_to_multiple_of|activation_offloading"
)
# Likewise: where an adapter came from, and how it begins, which a run that is resumed does not.
FREE_OF_ADAPTERS = (
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "init_ia3_weights",
    "lora_ga_config",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "task_type",
)
# Of a model's configuration: where it came from, and what it writes, returns or is called.
FREE_OF_MODELS = re.compile(
    r"_.*|architectures|transformers_version|(torch_)?dtype|use_cache|.*_token_id|id2label|label2id|problem_type|output_.*"
    r"|return_dict|initializer_range|distributed_config"
)


def options_record(args: Any) -> dict[str, Any]:
    """The options of a `DILConfig` that decide what is learned, but for the sizes of batches, as JSON has them."""
    options = {name: value for name, value in args.to_dict().items() if not FREE.fullmatch(name)}
    if args.max_tokens_per_batch is not None:
        options["prefix_sharing"] = args.prefix_sharing  # by which the tokens of a row are counted
    return _as_json(options)


def batch_record(args: Any, together: int = 1, rows: int | None = None) -> dict[str, int]:
    """How large a batch is, and the parts of it where they decide which rows are in it.

    Args:
        args: the options.
        together: processes of a batch.
        rows: of a micro-batch, where it is not as the options say (auto_find_batch_size).
    """
    batches = args.world_size // together
    if args.max_tokens_per_batch is not None:
        return {"global batch": args.gradient_accumulation_steps * batches}
    batches *= rows or args.per_device_train_batch_size
    record = {"global batch": args.gradient_accumulation_steps * batches}
    rebalanced = getattr(args, "train_sampling_strategy", None) == "batch_rebalance"
    return {**record, "micro-batch": batches} if args.dataloader_drop_last or rebalanced else record


def given_to_learn_from(
    args: Any, dataset: datasets.Dataset | None, policy: nn.Module, reference: ReferencePolicy
) -> dict[str, Any]:
    """What decides, beside options and token ids, what a `DILTrainer` learns, before it adds log-probs.

    Args:
        args: its options.
        dataset: tokenised; its labels count, and its own reference log-probs where they are used.
        policy: whose configuration and dtypes count.
        reference: likewise, and its weights, where they are used and here whole.
    """
    present = [] if dataset is None else dataset.column_names
    columns = {
        "labels": ["label"] if "completion_ids" in present else [],  # pairs may have a column of that name, too
        "reference log-probs of the data": GIVEN_REFERENCE if args.precompute_ref_log_probs else (),
    }
    found: dict[str, Any] = {}
    for what, names in columns.items():
        given = [name for name in names if name in present]
        found[what] = None
        if dataset is not None and given:
            rows = dataset.with_format("numpy")
            values = np.stack([np.asarray(rows[name][:], dtype=np.float32) for name in given])
            found[what] = xxhash.xxh3_64(values.tobytes()).hexdigest()
    models = {"the model": policy}
    if reference.model is not None:
        models["the reference"] = reference.model
    for what, model in models.items():
        config: Any = getattr(model, "config", None)
        options = _what_computes(config.to_dict()) if hasattr(config, "to_dict") else {}
        found |= {f"{name} of {what}": value for name, value in options.items()}
        if weights_are_whole(model):
            found[f"dtypes of {what}"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
    *_, model = models.values()
    if found["reference log-probs of the data"] is None and _can_be_read(model):
        found["weights of the reference"] = fingerprint_of_weights(model, reference.adapters_that_count())
    return found


def _what_computes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what its model computes the same with."""
    return {
        str(name): _what_computes(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not FREE_OF_MODELS.fullmatch(str(name))
    }


def run_record(trainer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what a `DILTrainer` learns, but for the sizes of batches, as JSON has it.

    Args:
        trainer: about to train.
        given: what it was given, of `given_to_learn_from`.
    """
    configs = {
        name: config
        for name, config in getattr(trainer.model, "peft_config", {}).items()
        if not name.startswith(REFERENCE_COPY)
    }
    data: datasets.Dataset = trainer.train_dataset
    content = {
        "training data": f"{len(data)} rows, {dataset_fingerprint(data)[:12]}",
        "names of the adapters": sorted(configs),
        **{
            f"{option} of adapter {name}": value
            for name, config in configs.items()
            for option, value in config.to_dict().items()
            if option not in FREE_OF_ADAPTERS
        },
        **given,
    }
    return {**options_record(trainer.args), **_as_json(content)}


def with_sizes(record: Mapping[str, Any], trainer: Any, rows: int | None) -> dict[str, Any]:
    """A record with the sizes of batches as they are, or will be.

    Args:
        record: of `run_record`.
        trainer: whose record it is.
        rows: as of `batch_record`.
    """
    return {**record, **batch_record(trainer.args, processes_of_a_batch(trainer.accelerator), rows)}


def write_record(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Put a record into a checkpoint."""
    (checkpoint / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    return json.loads(json.dumps(values, default=plain))


def fingerprint_of_weights(model: nn.Module, adapters: Iterable[str]) -> str:
    """A hash of some values of every parameter that a model computes with.

    Enough to tell models apart; unlike `ref_cache.model_fingerprint` it does not read all of them.

    Args:
        model: whose weights can be read.
        adapters: with which it computes, whatever their names; its other ones do not count.
    """
    own = [parameters_of(model, name) for name in adapters]
    of_any = [parameters_of(model, name) for name in getattr(model, "peft_config", {})]
    left_out = {id(parameter) for parameters in of_any for parameter in parameters.values()}
    base = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in left_out}
    digest = xxhash.xxh3_64()
    for name, parameter in itertools.chain.from_iterable(part.items() for part in (base, *own)):
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, len(values) // SAMPLES)].double().cpu()
        of_base = name.removeprefix("base_model.model.").replace(".base_layer", "")
        digest.update(f"{of_base} {list(parameter.shape)} {values.tolist()}\n".encode())
    return digest.hexdigest()


def _can_be_read(model: nn.Module) -> bool:
    return weights_are_whole(model) and not any(hasattr(parameter, "to_local") for parameter in model.parameters())
