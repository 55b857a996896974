"""What all processes of a run do, or none: an error of one alone would leave the others waiting for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

Result = TypeVar("Result")


def told_by_all(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def done_by_all(do: Callable[[], Result], as_error: Callable[[str], Exception]) -> Result:
    """What `do` returns, where it succeeds on every process; else every process raises.

    Args:
        do: waits for no other process.
        as_error: makes the error, of a message that names the process; where all of them failed alike, as on an option,
            each raises its own error.
    """
    error: Exception | None = None
    try:
        result = do()
    except Exception as raised:  # whatever it is, the others must not wait
        error = raised
    told = told_by_all((socket.gethostname(), None if error is None else str(error)))
    messages = [message for _, message in told]
    if error is not None and len({*messages}) == 1:
        raise error
    for rank, (host, message) in enumerate(told):
        if message is not None:
            raise as_error(f"process {rank} on {host}: {message}") from error
    return result


def refuse_lone_processes(processes: int) -> None:
    """Refuse processes that were launched together but do not know of each other.

    Args:
        processes: that train together.

    Raises:
        NotImplementedError: there are more.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if processes < launched:
        raise NotImplementedError(
            f"{launched} processes were launched, but each would train alone, on all of the data: give "
            "use_cpu=True (--use-cpu) if they are to train together on CPUs"
        )
