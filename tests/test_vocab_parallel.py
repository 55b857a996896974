"""A vocabulary split over processes: log-probs, losses and gradients of 2 and 4 of them are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vocab_parallel_runs import RUNS

TESTS = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("vocabulary parallelism")  # whose runs are made once, not once a worker
# Slow to start, or the same with any number of processes: on two alone.
ON_TWO = ("compiled", "triton", "another_group")


@pytest.fixture(scope="module", params=[2, 4])
def passed(request: pytest.FixtureRequest) -> str:
    """What `RUNS` have printed, on so many processes."""
    names = [name for name in RUNS if request.param == 2 or name not in ON_TWO]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)}
    result = subprocess.run(
        [*launch, str(TESTS / "vocab_parallel_runs.py"), *names],
        capture_output=True, text=True, timeout=600, env={**os.environ, **environment},
    )  # fmt: skip
    return "\n".join([*(f"{name}: left out" for name in ON_TWO if name not in names), result.stdout, result.stderr])


@pytest.mark.parametrize("run", RUNS)
def test_processes_compute_as_one(passed: str, run: str) -> None:
    if f"{run}: left out" in passed:
        pytest.skip("on two processes")
    assert f"{run}: passed" in passed, passed[-6000:]
