"""Each basic block of a PTX kernel as a Python function over NumPy vectors.

The function takes the run S, its registers R and the threads M that are here, and returns what ends the block. What an
instruction becomes stands in `exchange`, `values` and `calculations`, by its first word; what ends a block, here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ptxemu.arithmetic import HELPERS, Noise, UnsupportedError, merge
from ptxemu.calculations import CALCULATIONS
from ptxemu.emit import Code, Operation
from ptxemu.exchange import EXCHANGE
from ptxemu.layout import Layout
from ptxemu.ptx import Instr, Kernel
from ptxemu.values import VALUES

INSTRUCTIONS = {**EXCHANGE, **VALUES, **CALCULATIONS}


class Machine(Layout):
    """A kernel made ready to run."""

    def __init__(self, kernel: Kernel, noise: Noise | None = None) -> None:
        super().__init__(kernel)
        self.noise = noise or Noise(None)
        self.code: dict[int, Any] = {}
        self.executed: Counter[str] = Counter()

    def compile(self, index: int):
        """The function of a block, made on first use."""
        if index in self.code:
            return self.code[index]
        code, end = Code(self), "None"
        for instr in self.kernel.blocks[index].instrs:
            root = instr.op.split(".")[0]
            if root in ("bra", "ret", "exit"):
                block = self.kernel.labels[instr.operands[-1]] if root == "bra" else -1
                end = f"('bra', {code.guard(instr)}, {block})"
            elif instr.op.startswith("bar.warp"):
                code.lines.append("pass")
            elif root in ("bar", "barrier"):
                end = self._barrier(instr, code)
            elif root in INSTRUCTIONS:
                INSTRUCTIONS[root](Operation(code, instr))
            else:
                raise UnsupportedError(instr.op)
        source = "def run(S, R, M):\n" + "".join(f"    {line}\n" for line in code.lines) + f"    return {end}\n"
        scope: dict[str, Any] = {"np": np, "merge": merge, "N": self.noise, **HELPERS, **code.constants}
        exec(compile(source, f"<block {index} of {self.kernel.name}>", "exec"), scope)
        self.code[index] = scope["run"]
        return scope["run"]

    def _barrier(self, instr: Instr, code: Code) -> str:
        if instr.pred:
            raise UnsupportedError("predicated barrier")
        if ".red" in instr.op:
            register, value = self.register_index[instr.operands[0]], code.read(instr.operands[2], "pred")
            return f"('red', {register}, {value}, {instr.op!r}, {instr.where!r})"
        count = code.read(instr.operands[1], "u32") if len(instr.operands) > 1 else "None"
        barrier = code.read(instr.operands[0], "u32") if instr.operands else "np.uint32(0)"
        return f"('bar', {barrier}, {count}, {instr.where!r})"
