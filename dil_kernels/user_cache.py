"""Directories in which something is kept for a user between runs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from pathlib import Path

SCRATCH = re.compile(r"\.[0-9a-f]{32}-[0-9a-f]{32}")  # names of `scratch_beside`, of paths that are named by a digest
ABANDONED = 86400  # seconds without a write, after which nobody is taken to be writing any more


def make_private(directory: Path) -> None:
    """Make a directory, and those above it that are missing, for this user alone (mode 0700).

    One that is there stays as it is: whoever wants to share it makes it first.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def scratch_beside(path: Path) -> Path:
    """Where to write what is then moved to a path in one step; of this writer alone."""
    return path.with_name(f".{path.stem}-{uuid.uuid4().hex}")


def remove_abandoned(directory: Path, names: re.Pattern[str] = SCRATCH) -> None:
    """Remove files and directories that writers which were killed have left in a directory.

    Only what nobody has written to for a day: a writer that is at work writes all the time. A directory that cannot be
    listed, one of another user in a shared cache, say, stays as it is.

    Args:
        directory: of a cache.
        names: of what is written there before it is moved to its place.
    """
    found: list[str] = []
    with contextlib.suppress(OSError):
        found = os.listdir(directory)
    for name in found:
        with contextlib.suppress(OSError):  # another process removes it, or has a right to it that this one has not
            path = directory / name
            if names.fullmatch(name) and time.time() - _last_written(path) > ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _last_written(path: Path) -> float:
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
