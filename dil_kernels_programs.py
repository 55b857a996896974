"""`dil-train` and `dil-env` as programs, beside the package: importing that imports torch, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def train() -> int:
    """Run `dil-train`."""
    return _run("dil-train", "main")


def env() -> int:
    """Run `dil-env`."""
    return _run("dil-env", "env_main")


def _run(program: str, name: str) -> int:
    """A function of `dil_kernels.cli.programs`; an interrupt before it or in it is one line.

    While modules are imported an interrupt ends the process: as an exception it might get lost in the initialisation of
    an extension module, or come out as another one.
    """
    message = f"{program}: error: interrupted before it began\n"

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, message.encode())
        os._exit(INTERRUPTED)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as under nohup
    try:
        if ours:
            signal.signal(signal.SIGINT, end)
        from dil_kernels.cli import programs

        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status: int = getattr(programs, name)()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write(message)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, as head does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status
