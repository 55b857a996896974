"""Whether a run can begin: there is a step to make, and a checkpoint to go on from is whole and of the same run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from dil_kernels.data.json_text import parse_json
from dil_kernels.training.agreement import done_by_all, told_by_all
from dil_kernels.training.checkpoints import changed_file, last_complete_checkpoint, step_of, where_to_resume
from dil_kernels.training.reference_sync import REFERENCE_NAME
from dil_kernels.training.run_lock import OutputDirError, only_run
from dil_kernels.training.run_record import RECORD_NAME, with_sizes
from dil_kernels.training.sharding import share_of_batches

logger = logging.getLogger(__name__)

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
        record: `run_record` of the trainer; to it comes how large a batch will be.

    Raises:
        FileNotFoundError: there is none.
        CannotStartError: it is not whole, or of another run.
    """
    if not asked:
        return None
    checkpoint = agreed_checkpoint(asked, trainer.args.output_dir)
    args = trainer.args

    def check() -> None:
        if args.sync_ref_model and not (checkpoint / REFERENCE_NAME).is_file():
            raise CannotStartError(f"{checkpoint} has no reference that follows the policy (sync_ref_model=True)")
        changed = changed_file(checkpoint) if trainer.is_local_process_zero() else None
        if changed is not None:
            raise CannotStartError(
                f"{checkpoint} cannot be resumed from: {changed} is not as it was written (its checksum differs, or it "
                f"is gone); {where_to_resume(checkpoint.parent, step_of(checkpoint) or 0)}"
            )
        if trainer.is_world_process_zero():  # which may be the only one that has loaded the weights
            resumed = with_sizes(record, trainer, rows_to_resume_with(checkpoint, args))
            check_same_run(checkpoint, resumed, allowed=args.resume_with_changes)

    done_by_all(check, CannotStartError)
    return str(checkpoint)


def rows_to_resume_with(checkpoint: Path, args: TrainingArguments) -> int | None:
    """The rows of a micro-batch where transformers takes them from the checkpoint; None where the options say them."""
    if not args.auto_find_batch_size:
        return None
    rows: int | None = parse_json((checkpoint / TRAINER_STATE_NAME).read_text()).get("train_batch_size")
    return rows


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

    One that goes on logs, saves and evaluates as often as its own options say, not those of the run before.

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
        state.compute_steps(args, state.max_steps)  # the checkpoint has those of the run before
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
