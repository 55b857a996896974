"""Files that cannot be written, for root, too."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

RIGHTS = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def make_read_only(*folders: Path) -> None:
    for path in sorted((each for folder in folders for each in (folder, *folder.rglob("*"))), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)


@contextlib.contextmanager
def modes_hold() -> Iterator[None]:
    """Modes of files hold for root, too, in this thread."""
    rights = set_rights(0)
    try:
        yield
    finally:
        set_rights(rights)


@contextlib.contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """Nothing in some folders can be written meanwhile."""
    make_read_only(*folders)
    try:
        with modes_hold():
            yield
    finally:
        for folder in folders:
            folder.chmod(0o755)
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)


def set_rights(rights: int) -> int:
    """Let this thread have these of RIGHTS; returns those that it had. For others than root it has none anyway."""
    if os.geteuid() != 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    before = data[0] & RIGHTS
    data[0] = data[0] & ~RIGHTS | rights
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")
    return before
