"""A directory has one run at a time, whoever started it and however it ended."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from file_modes import modes_hold

from dil_kernels.training.run_lock import LOCK_NAME, OutputDirError, only_run


def test_a_child_neither_has_the_lock_nor_keeps_it(tmp_path: Path) -> None:
    """As a worker of a loader would that outlives a killed run."""
    asks, answers = os.pipe(), os.pipe()
    with only_run(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                with only_run(tmp_path):
                    os.write(answers[1], b"in")
            except OutputDirError:
                os.write(answers[1], b"refused")
            os.read(asks[0], 1)  # stays until the parent has left
            os._exit(0)
        assert os.read(answers[0], 9) == b"refused"
    other = [
        sys.executable,
        "-c",
        f"from {only_run.__module__} import only_run\nwith only_run({str(tmp_path)!r}): pass",
    ]
    try:
        assert subprocess.run(other, capture_output=True, text=True).stderr == ""
    finally:
        os.write(asks[1], b".")
        os.waitpid(child, 0)


def free(folder: Path) -> bool:
    """Whether another process may train in a folder."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=enter, args=(folder,))
    child.start()
    child.join()
    return child.exitcode == 0


def enter(folder: Path) -> None:
    with only_run(folder):
        pass


def hold(folder: Path, here: Any, go_on: Any) -> None:
    with only_run(folder):
        here.set()
        go_on.wait(60)


@pytest.mark.parametrize("readable", [True, False])
def test_the_lock_of_another_user_is_seen(readable: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    here, go_on = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, here, go_on))
    other.start()
    assert here.wait(60)
    lock = tmp_path / LOCK_NAME
    lock.chmod(0o444 if readable else 0)  # as its owner's alone is for others
    try:
        with modes_hold():
            if readable:
                with (
                    pytest.raises(OutputDirError, match=f"process {other.pid} on .* is training in it"),
                    only_run(tmp_path),
                ):
                    pass
            else:
                with only_run(tmp_path):
                    pass
    finally:
        go_on.set()
        other.join()
    warning = (
        f"output_dir={tmp_path}: whether another run is in it cannot be seen ([Errno 13] Permission denied: '{lock}')"
    )
    assert caplog.messages == ([] if readable else [warning])


def test_the_lock_that_a_killed_run_of_another_user_left_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("process 1 on elsewhere")
    (tmp_path / LOCK_NAME).chmod(0o444)
    with modes_hold(), only_run(tmp_path):
        assert not free(tmp_path), "it is locked all the same"
