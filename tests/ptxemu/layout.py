"""Where a kernel's parameters, variables and registers lie."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ptxemu.arithmetic import BITS, U
from ptxemu.ptx import Instr, Kernel

WITHOUT_RESULT = ("st", "bra", "bar", "barrier", "ret", "membar", "fence", "red", "cp")


class Layout:
    """Offsets of parameters and of shared and local variables; which registers outlive a block."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.symbols: dict[str, int] = {}
        self.static_shared = self._place(kernel.shared.items())
        self.local_bytes = self._place(kernel.local.items())
        self.param_offset: dict[str, int] = {}
        offset = 0
        for name, _, size in kernel.params:
            align = 8 if size % 8 == 0 or size > 8 else size
            offset = -(-offset // align) * align
            self.param_offset[name] = offset
            offset += size
        self.param_bytes = offset
        uses: dict[str, set[int]] = {}
        first_def: dict[tuple[str, int], bool] = {}
        for block in kernel.blocks:
            for instr in block.instrs:
                writes, reads = self._registers(instr)
                for r in reads:
                    uses.setdefault(r, set()).add(block.index)
                    first_def.setdefault((r, block.index), False)
                for r in writes:
                    uses.setdefault(r, set()).add(block.index)
                    first_def.setdefault((r, block.index), instr.pred is None)
        self.local_regs = {r for r, bs in uses.items() if len(bs) == 1 and first_def[r, next(iter(bs))]}
        outliving = (r for r in uses if r not in self.local_regs)
        self.register_index: dict[str, int] = {r: index for index, r in enumerate(outliving)}

    def _place(self, variables: Iterable[tuple[str, int]]) -> int:
        """Give variables their addresses, aligned to 16 bytes; the bytes of all."""
        offset = 0
        for name, size in variables:
            offset = -(-offset // 16) * 16
            self.symbols[name] = offset
            offset += size
        return offset

    def reg_type(self, name: str) -> str:
        if name in self.kernel.regs:
            return self.kernel.regs[name]
        return self.kernel.regs[re.sub(r"\d+$", "", name) + "#"]

    def zero(self, name: str):
        bits = self.reg_bits(name)
        return np.zeros((), bool if bits == 1 else U[bits])

    def is_reg(self, name: str) -> bool:
        if name in self.kernel.regs:
            return True
        if "@" in name:
            return False
        return name.startswith("%") and re.sub(r"\d+$", "", name) + "#" in self.kernel.regs

    def reg_bits(self, name: str) -> int:
        t = self.reg_type(name)
        return 1 if t == "pred" else BITS[t]

    def _registers(self, instr: Instr) -> tuple[list[str], list[str]]:
        """Those that an instruction writes, and those that it reads."""
        names = [re.findall(r"%?[\w$@]+", o) for o in instr.operands]
        names = [[n for n in group if self.is_reg(n)] for group in names]
        reads = [instr.pred] if instr.pred else []
        if instr.op.split(".")[0] in WITHOUT_RESULT:
            if instr.op.startswith(("bar.red", "barrier.red")):
                return names[0], reads + [n for g in names[1:] for n in g]
            return [], reads + [n for g in names for n in g]
        return (names[0] if names else []), reads + [n for g in names[1:] for n in g]
