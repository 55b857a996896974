"""Processes that are forked of one that has imported what their runs need: importing takes longer than running."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

PATHS = (str(Path(__file__).parent), str(Path(__file__).parents[1]))


def forking() -> Any:
    """What starts them, as `multiprocessing.Process` does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_imports"])
    with pytest.MonkeyPatch.context() as patch:  # by which it finds the module
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [*PATHS, os.environ.get("PYTHONPATH")])))
        forkserver.ensure_running()
    return context


def write_into(out: Path, err: Path) -> None:
    """Let this process print into files."""
    for number, path in ((1, out), (2, err)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
