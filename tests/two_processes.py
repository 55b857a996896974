"""Run a script on two CPU processes that can reduce and gather."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = f"""import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
"""


def run_on_two_processes(source: str, tmp_path: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with torchrun, one thread a process; its failure is this test's.

    Args:
        source: of the script, after `IMPORTS`.
        tmp_path: where the script is written.
        directory: its one argument.
    """
    script = tmp_path / "run.py"
    script.write_text(IMPORTS + "torch.set_num_threads(1)\n" + source)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(directory)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result
