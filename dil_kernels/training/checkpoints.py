"""Which checkpoints of a run can be resumed from."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dil_kernels.wording import describe_error

logger = logging.getLogger(__name__)

NO_CHECKPOINT = "no checkpoint had been written before it"


def checkpoint_directories(output_dir: str | os.PathLike[str]) -> list[Path]:
    """What a run has written as checkpoints, and nothing that only begins as their names do."""
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted(path for path in paths if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) and path.is_dir())


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint that was written to its end, where the trainer state, which comes last, is whole."""
    try:
        step: int = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step


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
