"""Time the density-ratio loss from token log-probs: device time, launches and the host's time, beside eager PyTorch.

    python benchmarks/bench_loss.py                      # the full grid of this machine's device
    python benchmarks/bench_loss.py --quick              # seconds; to see that it works

Every provider is first checked against fp64 on the inputs that are timed; one that is wrong is reported and not timed.
Exits with 1 if dil_kernels is wrong or fails.
"""

from __future__ import annotations

import sys

from families.loss import LOSS
from harness.command import main

if __name__ == "__main__":
    sys.exit(main(LOSS, description=__doc__))
