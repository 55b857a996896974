"""Time per-sequence log-probs from logits, forward and forward+backward, beside the other ways to compute them.

    python benchmarks/bench_logprob.py                   # the full grid of this machine's device
    python benchmarks/bench_logprob.py --quick           # seconds; to see that it works
    python benchmarks/bench_logprob.py --cases bf16 --providers dil_kernels,authors

Every provider is first checked against an fp64 oracle on the inputs that are timed; one that is wrong is reported and
not timed. Exits with 1 if dil_kernels is wrong or fails.
"""

from __future__ import annotations

import sys

from families.logprob import LOGPROB
from harness.command import main

if __name__ == "__main__":
    sys.exit(main(LOGPROB, description=__doc__))
