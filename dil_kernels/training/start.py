"""Whether a run can begin: there is a step to make, and a checkpoint to go on from is whole and of the same run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from dil_kernels.data.json_text import parse_json
from dil_kernels.data.token_columns import GIVEN_REFERENCE
from dil_kernels.training.agreement import done_by_all, told_by_all
from dil_kernels.training.checkpoints import changed_file, last_complete_checkpoint, step_of, where_to_resume
from dil_kernels.training.ref_cache import dataset_fingerprint
from dil_kernels.training.reference_sync import REFERENCE_NAME
from dil_kernels.training.run_lock import OutputDirError, only_run
from dil_kernels.training.sharding import processes_of_a_batch, share_of_batches

logger = logging.getLogger(__name__)

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


TO_SHARE = (
    "every process reads the checkpoint: let output_dir be on a file system that all machines share, or copy the "
    "checkpoint to the same path on each of them"
)


class CannotStartError(ValueError):
    """A run that there is nothing to do in, or a checkpoint that it cannot go on from; the message says why."""


def refuse_no_step(trainer: Any) -> None:
    """Refuse to train on data from which not one batch comes, or a model of which no weight would change.

    Raises:
        CannotStartError: names the numbers.
    """
    args = trainer.args
    if trainer.train_dataset is None:
        raise CannotStartError("train_dataset must be given to train, got None")
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise CannotStartError(
            "no weight of the model takes a gradient, so that nothing would be trained; was it loaded from the "
            "directory of an adapter?"
        )
    rows, (processes, _) = len(trainer.train_dataset), share_of_batches(trainer.accelerator)
    batches = rows // args.per_device_train_batch_size // processes if args.dataloader_drop_last else rows
    if not batches:
        raise CannotStartError(
            f"there would be no step: dataloader_drop_last={args.dataloader_drop_last} and {rows} rows of training "
            f"data, with per_device_train_batch_size={args.per_device_train_batch_size} on {processes} "
            f"process{'es' * (processes > 1)}"
        )


def options_record(args: Any, together: int = 1) -> dict[str, Any]:
    """The options of a `DILConfig` that decide what is learned, as JSON has them.

    Args:
        args: the options.
        together: processes of a batch.
    """
    options = {name: value for name, value in args.to_dict().items() if not FREE.fullmatch(name)}
    batch = args.gradient_accumulation_steps * args.world_size // together
    if args.max_tokens_per_batch is None:
        batch *= args.per_device_train_batch_size
    else:
        options["prefix_sharing"] = args.prefix_sharing  # by which the tokens of a row are counted
    return _as_json({**options, "global batch": batch})


def given_to_learn_from(args: Any, dataset: datasets.Dataset | None, reference: nn.Module) -> dict[str, str]:
    """Hashes of what decides, beside options and token ids, what a `DILTrainer` learns, before it adds log-probs.

    Args:
        args: its options.
        dataset: tokenised; its labels count, and its own reference log-probs where they are used.
        reference: whose weights count, where they are here whole.
    """
    found = {"reference weights": fingerprint_of_weights(reference)}
    present = [] if dataset is None else dataset.column_names
    columns = {
        "labels": ["label"] if "completion_ids" in present else [],  # pairs may have a column of that name, too
        "reference log-probs of the data": GIVEN_REFERENCE if args.precompute_ref_log_probs else (),
    }
    for what, names in columns.items():
        given = [name for name in names if name in present]
        if dataset is not None and given:
            rows = dataset.with_format("numpy")
            values = np.stack([np.asarray(rows[name][:], dtype=np.float32) for name in given])
            found[what] = xxhash.xxh3_64(values.tobytes()).hexdigest()
    return {what: value for what, value in found.items() if value is not None}


def run_record(trainer: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """What decides what a `DILTrainer` learns, as JSON has it.

    Args:
        trainer: about to train.
        given: what it was given, of `given_to_learn_from`.
    """
    configs = getattr(trainer.model, "peft_config", {})
    data: datasets.Dataset = trainer.train_dataset
    content = {
        "training data": f"{len(data)} rows, {dataset_fingerprint(data)[:12]}",
        "names of adapters": sorted(configs),
        **{
            f"{option} of adapter {name}": value
            for name, config in configs.items()
            for option, value in config.to_dict().items()
            if option not in FREE_OF_ADAPTERS
        },
        **given,
    }
    return {**options_record(trainer.args, processes_of_a_batch(trainer.accelerator)), **_as_json(content)}


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    return json.loads(json.dumps(values, default=plain))


def fingerprint_of_weights(model: nn.Module) -> str | None:
    """A hash of some values of every frozen parameter, or of every one if none is; None where they are not here whole.

    Enough to tell models apart; unlike `ref_cache.model_fingerprint` it does not read all of them.
    """
    named = list(model.named_parameters())
    frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
    digest = xxhash.xxh3_64()
    for name, parameter in frozen or named:
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "to_local"):
            return None
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, len(values) // SAMPLES)].double().cpu()
        digest.update(f"{name.replace('.base_layer', '')} {list(parameter.shape)} {values.tolist()}\n".encode())
    return digest.hexdigest()


def find_checkpoint(asked: str | Literal[True], output_dir: str | os.PathLike[str]) -> Path:
    """The checkpoint to go on from, of which nothing is missing or cut off.

    Args:
        asked: a checkpoint, or true for the last complete one.
        output_dir: of the run.

    Raises:
        FileNotFoundError: there is none.
        CannotStartError: it is no directory, or names the file.
    """
    checkpoint = last_complete_checkpoint(output_dir) if asked is True else Path(asked)
    if not checkpoint.is_dir():
        raise CannotStartError(f"{checkpoint}: no such directory")
    problem = _missing(checkpoint) or next(filter(None, map(_damage, sorted(checkpoint.iterdir()))), None)
    if problem is not None:
        raise CannotStartError(f"{checkpoint} cannot be resumed from: {problem}")
    return checkpoint


def _missing(checkpoint: Path) -> str | None:
    if step_of(checkpoint) is None:
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or broken"
    names = [path.name for path in checkpoint.iterdir()]
    if any(name.startswith(("global_step", "pytorch_model_fsdp", "optimizer_")) for name in names):
        return None  # in the parts of DeepSpeed or FSDP
    weights = (path for pattern in ("*.safetensors", "*.bin") for path in checkpoint.rglob(pattern))
    if all(path.name in (TRAINING_ARGS_NAME, REFERENCE_NAME) for path in weights):
        return "it holds no weights"
    for name in ("optimizer.pt", "scheduler.pt"):
        if name not in names:
            return f"{name} is missing (was it saved with save_only_model=True?)"
    return None


def _damage(path: Path) -> str | None:
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        return f"{path.name} is damaged"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is damaged ({error})"
    return None


def check_same_run(checkpoint: Path, record: Mapping[str, Any], allowed: bool) -> None:
    """Refuse to go on with other options or data than a checkpoint was trained with, or warn of them.

    Args:
        checkpoint: whole.
        record: of the run as it is asked for now, or a part of it.
        allowed: warn instead.

    Raises:
        CannotStartError: names everything that differs, or the record of it is damaged.
    """
    path = checkpoint / RECORD_NAME
    try:
        before = parse_json(path.read_text())
    except FileNotFoundError:
        logger.warning("%s: no record of what it was trained with; nothing can be compared", checkpoint)
        return
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise CannotStartError(f"{checkpoint} cannot be resumed from: {RECORD_NAME} is damaged")
    names = [name for name in record if name in before and record[name] != before[name]]
    if all(isinstance(steps, int) and steps > 0 for steps in (before.get("max_steps"), record.get("max_steps"))):
        names = [name for name in names if name != "num_train_epochs"]  # which max_steps overrides
    if not names:
        return
    changes = [f"{name}{'=' if name.isidentifier() else ': '}{before[name]}, now {record[name]}" for name in names]
    message = f"{checkpoint} was trained with {'; '.join(changes)}"
    if not allowed:
        raise CannotStartError(f"{message}: give what it was trained with, or resume_with_changes=True")
    logger.warning("%s", message)


def checkpoint_to_resume(trainer: Any, asked: str | bool | None, record: Mapping[str, Any]) -> str | None:
    """The checkpoint that a `DILTrainer` is to go on from, checked; None for none.

    Args:
        trainer: about to train.
        asked: a checkpoint, or true for the last complete one in the output directory.
        record: `run_record` of the trainer.

    Raises:
        FileNotFoundError: there is none.
        CannotStartError: it is not whole, or of another run.
    """
    if not asked:
        return None
    checkpoint = agreed_checkpoint(asked, trainer.args.output_dir)

    def check() -> None:
        if trainer.args.sync_ref_model and not (checkpoint / REFERENCE_NAME).is_file():
            raise CannotStartError(f"{checkpoint} has no reference that follows the policy (sync_ref_model=True)")
        changed = changed_file(checkpoint) if trainer.is_local_process_zero() else None
        if changed is not None:
            raise CannotStartError(
                f"{checkpoint} cannot be resumed from: {changed} is not as it was written (its checksum differs, or it "
                f"is gone); {where_to_resume(checkpoint.parent, step_of(checkpoint) or 0)}"
            )
        if trainer.is_world_process_zero():  # which may be the only one that has loaded the weights
            check_same_run(checkpoint, record, allowed=trainer.args.resume_with_changes)

    done_by_all(check, CannotStartError)
    return str(checkpoint)


def agreed_checkpoint(asked: Any, output_dir: str | os.PathLike[str]) -> Path:
    """As `find_checkpoint`, by every process on its own file system.

    Raises:
        CannotStartError: one has none, or another one; the same on every process.
    """
    checkpoint = done_by_all(
        lambda: find_checkpoint(asked, output_dir), lambda message: CannotStartError(f"{message}; {TO_SHARE}")
    )
    state = (checkpoint / TRAINER_STATE_NAME).read_bytes()
    told = told_by_all((socket.gethostname(), str(checkpoint), xxhash.xxh3_128_hexdigest(state)))
    for rank, (host, path, digest) in enumerate(told):
        if digest != told[0][2]:
            raise CannotStartError(
                f"process 0 on {told[0][0]} would resume from {told[0][1]}, but process {rank} on {host} from {path}, "
                f"which is another one; {TO_SHARE}"
            )
    return checkpoint


def only_run_of_all(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """The lock on the output directory of a `DILTrainer`, which its main process has.

    Raises:
        OutputDirError: another run is in it; the same on every process.
    """
    lock = contextlib.ExitStack()
    if trainer.is_world_process_zero():
        done_by_all(lambda: lock.enter_context(only_run(trainer.args.output_dir)), OutputDirError)
    else:
        done_by_all(lambda: None, OutputDirError)
    return lock


class AtEveryStart(TrainerCallback):
    """Calls a function when training begins, and where it begins anew (auto_find_batch_size)."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call it."""
        self.function()


class StopWhenFinished(TrainerCallback):
    """Keeps a run that is resumed at its last step from going beyond it, and from saving and evaluating again.

    Attributes:
        finished: whether the run had made all of its steps when training began.
    """

    def __init__(self) -> None:
        self.finished = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the steps made with those to be made."""
        self.finished = state.global_step >= state.max_steps
        if not self.finished:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            print(f"finished: step {state.global_step} of {state.max_steps} was the last; there is nothing to train")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an epoch without a step."""
        if self.finished:
            control.should_save = control.should_evaluate = control.should_log = False
