"""Which checkpoints of a run can be resumed from."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dil_kernels.data.cache_key import file_digest
from dil_kernels.data.json_text import parse_json
from dil_kernels.wording import describe_error

logger = logging.getLogger(__name__)

NO_CHECKPOINT = "no checkpoint had been written before it"
CHECKSUMS_NAME = "dil_checksums.json"  # in every checkpoint
# What is read on resuming; the parts of FSDP and DeepSpeed are in directories of their own, and left out.
CHECKED = re.compile(rf".*\.(safetensors|bin|pt|pth)|{re.escape(TRAINER_STATE_NAME)}")


def checkpoint_directories(output_dir: str | os.PathLike[str]) -> list[Path]:
    """What a run has written as checkpoints, by their steps, and nothing that only begins as their names do."""
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = (path for path in paths if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint that was written to its end, where the trainer state, which comes last, is whole."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    step = state.global_step  # 0 where the file has none
    return step if type(step) is int and step > 0 and isinstance(state.log_history, list) else None


def last_complete_checkpoint(output_dir: str | os.PathLike[str], before: float = math.inf) -> Path:
    """The checkpoint of the highest step that was written to its end.

    Args:
        output_dir: of the run.
        before: a step; checkpoints of this one and later ones are left out.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = {}
    for path in checkpoint_directories(output_dir):
        step = step_of(path)
        if step is None:
            logger.warning("%s was not written to its end; it is left out", path)
        elif step < before:
            checkpoints[step] = path
    if not checkpoints:
        raise FileNotFoundError(f"{output_dir}: no complete checkpoint to resume from")
    return checkpoints[max(checkpoints)]


def where_to_resume(output_dir: str | os.PathLike[str], step: float = math.inf) -> str:
    """What to tell after a run that ended early, or a step that failed: the last checkpoint before, if there is one."""
    try:
        return f"the last good checkpoint is {last_complete_checkpoint(output_dir, before=step)}"
    except FileNotFoundError:
        return NO_CHECKPOINT


@contextlib.contextmanager
def writing_checkpoint(directory: Path, wait_for_everyone: Callable[[], None], *, main: bool) -> Iterator[None]:
    """While all processes write a checkpoint: last the trainer state, without which it is not whole, then checksums.

    Args:
        directory: of the checkpoint; it may be left from a run that did not write it to its end.
        wait_for_everyone: returns when every process has called it.
        main: whether this process writes what there is one of.

    Raises:
        SavingError: as of `saving`.
    """
    with saving(str(directory), directory.parent):
        if main:
            directory.mkdir(parents=True, exist_ok=True)
            for name in (TRAINER_STATE_NAME, CHECKSUMS_NAME):
                (directory / name).unlink(missing_ok=True)
            _order_by_step(directory.parent)
        yield
        wait_for_everyone()
        if main:
            checksums = {path.name: file_digest(path) for path in _files(directory)}
            (directory / CHECKSUMS_NAME).write_text(json.dumps(checksums, indent=2) + "\n")


def _order_by_step(output_dir: Path) -> None:
    """Let checkpoints be as old as their steps say: transformers removes the oldest first.

    A clock may be set back, and a copy is as old as its copying.
    """
    now = time.time()
    directories = checkpoint_directories(output_dir)
    times = [*(path.stat().st_mtime for path in directories), now]
    if any(later < earlier for earlier, later in itertools.pairwise(times)):
        for age, path in enumerate(reversed(directories), start=1):
            os.utime(path, (now - 10 * age, now - 10 * age))


def changed_file(checkpoint: Path) -> str | None:
    """A file of a checkpoint that is not as it was written, or gone; None if there is none, or no checksums."""
    try:
        checksums = parse_json((checkpoint / CHECKSUMS_NAME).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        checksums = None
    if not isinstance(checksums, dict):
        return CHECKSUMS_NAME
    files = {path.name: path for path in _files(checkpoint)}
    changed = (name for name, value in checksums.items() if name not in files or file_digest(files[name]) != value)
    return next(changed, None)


def _files(checkpoint: Path) -> list[Path]:
    files = (path for path in checkpoint.iterdir() if CHECKED.fullmatch(path.name) and path.is_file())
    return sorted(path for path in files if path.name != TRAINING_ARGS_NAME)  # a pickle, which nothing reads


class SavingError(OSError):
    """What was trained could not be written; the message says why, and where to go on from."""


@contextlib.contextmanager
def saving(what: str, output_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """While files of a run are written.

    Args:
        what: is written.
        output_dir: where the checkpoints are.

    Raises:
        SavingError: names the last good checkpoint.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SavingError(
            f"{what} could not be written: {describe_error(error)}; {where_to_resume(str(output_dir))}"
        ) from error


def check_weights(model: Any, step: int, gather: Callable[[Tensor], Tensor]) -> None:
    """Refuse to write weights that a step with a finite loss made non-finite: its gradients had overflowed.

    Args:
        model: a module, looked at in the parts that this process holds, whoever shards it.
        step: the last one.
        gather: concatenates a tensor over all processes.

    Raises:
        FloatingPointError: a trainable weight is not finite, on any process.
    """
    parts = [_local(parameter) for parameter in model.parameters() if parameter.requires_grad]
    finite = [part.isfinite().all() for part in parts if part.numel()]
    device = parts[0].device if parts else torch.device("cpu")
    found = torch.stack(finite).all() if finite else torch.tensor(True, device=device)
    if not gather(found.reshape(1)).all():
        raise FloatingPointError(
            f"the weights are not finite after step {step}, whose loss was: its gradients overflowed. Lower the "
            "learning rate or bound the log ratios (max_log_ratio)"
        )


def _local(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter on this process: FSDP2 has it in a DTensor, ZeRO-3 beside an empty tensor."""
    part = getattr(parameter, "ds_tensor", parameter).detach()
    return part.to_local() if hasattr(part, "to_local") else part
