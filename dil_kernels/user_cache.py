"""Directories in which something is kept for a user between runs."""

from __future__ import annotations

import errno
import os
from pathlib import Path


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
