"""Run a script on two CPU processes that can reduce and gather."""

from __future__ import annotations

import os
import runpy
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
from forked import PATHS, forking, write_into

IMPORTS = f"""import sys
from pathlib import Path
sys.path[:0] = {[*reversed(PATHS)]!r}
import torch
"""


class Printed(NamedTuple):
    """By both processes together."""

    stdout: str
    stderr: str


def run_on_two_processes(source: str, tmp_path: Path, directory: Path) -> Printed:
    """Run a script on two processes of one thread; its failure is this test's.

    Args:
        source: of the script, after `IMPORTS`.
        tmp_path: where the script is written.
        directory: its one argument.
    """
    script, out, err = (tmp_path / name for name in ("run.py", "run.out", "run.err"))
    script.write_text(IMPORTS + "torch.set_num_threads(1)\n" + source)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, as under torchrun
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    for path in (out, err):
        path.write_text("")
    context, processes = forking(), []
    try:
        for rank in "01":
            of_rank = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            process = context.Process(target=_run, args=([str(script), str(directory)], of_rank, out, err))
            process.start()
            processes.append(process)
        end = time.monotonic() + 300
        while (running := [process for process in processes if process.is_alive()]) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                break  # the other one waits for it
            wait([process.sentinel for process in running], end - time.monotonic())
    finally:
        for process in processes:
            process.kill()
            process.join()
    printed = Printed(out.read_text(), err.read_text())
    assert [process.exitcode for process in processes] == [0, 0], printed.stderr[-3000:]
    return printed


def _run(argv: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """In a process of its own."""
    os.environ.clear()
    os.environ.update(environment)
    write_into(out, err)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
