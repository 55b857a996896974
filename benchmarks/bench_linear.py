"""Time a preference loss from hidden states and the head, forward and forward+backward, beside the other ways.

    python benchmarks/bench_linear.py                   # the full grid of this machine's device
    python benchmarks/bench_linear.py --quick           # seconds; to see that it works
    python benchmarks/bench_linear.py --cases policy-4x2048 --providers dil_kernels,eager
    python benchmarks/bench_linear.py --ranks 2         # the vocabulary split over processes or GPUs; --ranks 2 --help

Every provider is first checked against fp64 on the inputs that are timed; one that is wrong is reported and not timed.
Exits with 1 if dil_kernels is wrong or fails.
"""

from __future__ import annotations

import sys

from families import linear_ranks
from families.linear import LINEAR
from harness.command import main

if __name__ == "__main__":
    split = any(argument.split("=")[0] == "--ranks" for argument in sys.argv[1:])
    sys.exit(linear_ranks.main() if split else main(LINEAR, description=__doc__))
