"""A directory has one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = "_dil_run.lock"  # what begins so is not uploaded to the hub
_held: dict[Path, int] = {}  # by this process, with the descriptor

logger = logging.getLogger(__name__)


def _forget_what_the_parent_holds() -> None:
    """A child that is forked, a worker of a loader, say, neither has the lock nor keeps it when its parent is gone."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget_what_the_parent_holds)


class OutputDirError(ValueError):
    """A directory that a run must not or cannot write into; the message says why, and what can be done."""


@contextlib.contextmanager
def only_run(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a directory that exists; within this process it may be nested.

    The lock ends with the process, however that ends. On a file system without locks it keeps nobody out.

    Raises:
        OutputDirError: another process has it.
    """
    path = Path(output_dir).resolve() / LOCK_NAME
    file = None if path in _held else _lock(path, output_dir)
    if file is None:
        yield
        return
    _held[path] = file
    try:
        yield
    finally:
        del _held[path]
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked
        os.close(file)


def _lock(path: Path, output_dir: str | os.PathLike[str]) -> int | None:
    """A descriptor of the locked file; None where there are no locks."""
    while True:
        file = _open(path, output_dir)
        if file is None:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise OutputDirError(
                f"output_dir={output_dir}: {holder} is training in it: wait for its end, or name another directory"
            ) from None
        except OSError:
            os.close(file)
            return None
        if os.fstat(file).st_nlink:
            with contextlib.suppress(OSError):  # on a full disk, or of a file of another user
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".ljust(200).encode(), 0)
            return file
        os.close(file)  # of a run that has just ended


def _open(path: Path, output_dir: str | os.PathLike[str]) -> int | None:
    """A descriptor of the file; None where it can be neither made nor read."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        pass
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # of another user, whose lock holds all the same
    except PermissionError as error:
        logger.warning("output_dir=%s: whether another run is in it cannot be seen (%s)", output_dir, error)
    except OSError:  # a directory that cannot be written is refused elsewhere
        pass
    return None
