"""How often Triton would compile each kernel over batches of many sizes; nothing is compiled or launched.

python -m ptxemu.compilations 90
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ptxemu import driver

driver.install(int(sys.argv[1]), lambda launch: None)

import dil_kernels.ops.linear  # noqa: E402
import dil_kernels.ops.logps  # noqa: E402, F401  registers the ops

compilations: Counter[str] = Counter()


class Compiled:
    """What stands for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        """None, as without a profiler."""

    def run(self, *arguments: Any) -> None:
        """Nothing."""


def compile_nothing(self: JITFunction, key: str, signature: Any, device: Any, *rest: Any) -> Compiled:
    compilations[self.fn.__name__] += 1
    self.device_caches[device][0][key] = compiled = Compiled()
    return compiled


JITFunction._do_compile = compile_nothing

ops = torch.ops.dil_kernels
how = (-100, True, 0.0, 1.0)
for V in (1009, 8192):  # rows of the second are split where they are few
    for B in (1, 2, 16):
        for T in range(2, 34):
            logits, labels = torch.empty(B, T, V, dtype=torch.bfloat16), torch.empty(B, T, dtype=torch.int64)
            logps, row_max, log_sum, _ = ops.logps_fwd.triton(logits, labels, *how, False)
            for grad in (logps, logps.new_empty(()).expand_as(logps)):
                ops.logps_bwd_.triton(grad, logits, labels, row_max, log_sum, *how)
    print(json.dumps({"V": V} | compilations))
    compilations.clear()

V, D = 1024, 64
weight, head = torch.empty(V, D, dtype=torch.bfloat16), (1.0, 0.0, 1.0, 4096, 512)
for N in range(1, 40):
    hidden, targets = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(N, dtype=torch.int64)
    for rows in (N, N + 7):
        for kept in (0, rows):
            out = ops.linear_logps_fwd.triton(hidden, weight, None, targets, rows, kept, -100, True, False, *head)
            saved, wanted = (torch.zeros_like(out[2]), *out[3:]), (True, True, False)  # nobody wrote the index
            ops.linear_logps_bwd.triton(out[0], hidden, weight, None, targets, *saved, *wanted, *head)
print(json.dumps({"V": V} | compilations))
