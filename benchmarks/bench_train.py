"""Time one training step on preference pairs beside TRL and the authors' way.

    python benchmarks/bench_train.py                   # the full grid of this machine's device
    python benchmarks/bench_train.py --quick           # a tiny model, seconds; to see that it works
    python benchmarks/bench_train.py --cases equal --providers dil_kernels,trl

Every provider takes the same step: the same weights, the same token ids, the same loss. Loss and gradients are first
checked against fp64, those of a bf16 model in fp32, too; one that is wrong is reported and not timed. Peak memory is
beside weights and optimizer; it holds the gradients. Real pairs are those of the package, or of the file that
DIL_PREFERENCE_DATA names.
Exits with 1 if dil_kernels is wrong or fails.
"""

from __future__ import annotations

import sys

from families.train import TRAIN
from harness.command import main

if __name__ == "__main__":
    sys.exit(main(TRAIN, description=__doc__))
