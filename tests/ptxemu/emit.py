"""The Python code of a basic block while it is written: operands become expressions, results become assignments."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ptxemu.arithmetic import BITS, NP, U, UnsupportedError
from ptxemu.layout import Layout
from ptxemu.ptx import Instr

SPECIALS = ("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid", "%warpid")


class Code:
    """The lines of a block, and the constants that they name."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}

    def read(self, operand: str, ty: str) -> str:
        """Expression of an operand as type `ty`."""
        operand = operand.strip()
        if ty == "pred":
            if self.layout.is_reg(operand):
                return self.get(operand)
            return {"0": "np.False_", "1": "np.True_", "-1": "np.True_"}[operand]
        dtype = NP[ty]
        m = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand)
        if m:
            return self._const(np.uint32(int(m[1], 16)), ty)
        m = re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand)
        if m:
            return self._const(np.uint64(int(m[1], 16)), ty)
        m = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", operand)
        if m:
            value = int(m[2], 0) * (-1 if m[1] else 1)
            bits = BITS[ty]
            return self._const(U[bits](value & ((1 << bits) - 1)), ty)
        if operand.split(".")[0] in SPECIALS:
            return f"S.special({operand!r}).astype('{dtype}')"
        if operand in self.layout.symbols:
            return self._const(U[BITS[ty]](self.layout.symbols[operand]), ty)
        if not self.layout.is_reg(operand):
            raise UnsupportedError(f"operand {operand}")
        bits, expr = self.layout.reg_bits(operand), self.get(operand)
        if bits == BITS[ty]:
            return expr if dtype[0] == "u" else f"{expr}.view('{dtype}')"
        if bits > BITS[ty]:
            return f"{expr}.astype('u{BITS[ty] // 8}').view('{dtype}')"
        raise UnsupportedError(f"{operand} as {ty}")

    def _const(self, value, ty: str) -> str:
        value = np.asarray(value).view(NP[ty])[()]
        key = f"K{len(self.constants)}"
        self.constants[key] = value
        return key

    def get(self, name: str) -> str:
        """Expression of a register."""
        if name in self.layout.local_regs:
            return "v_" + re.sub(r"\W", "_", name.replace("%", ""))
        return f"R[{self.layout.register_index[name]}]"

    def set(self, name: str, expr: str, guard: str | None, ty: str | None = None) -> None:
        """Assign an expression whose value has the width of the register, or as type `ty` to be widened."""
        if name == "_":
            self.lines.append(f"({expr})")
            return
        if self.layout.reg_type(name) != "pred":
            bits = self.layout.reg_bits(name)
            if ty is not None and BITS[ty] < bits:
                # loads and conversions to a wider register: extended by sign or zero
                signed = ty[0] == "s"
                expr = f"np.asarray({expr}).view('{NP[ty]}').astype('{'i' if signed else 'u'}{bits // 8}')"
            expr = f"np.asarray({expr}).view('u{bits // 8}')"
        target = self.get(name)
        if name in self.layout.local_regs:
            self.lines.append(f"{target} = {expr if guard is None else f'merge({guard}, {expr}, {target})'}")
        elif guard is None:
            self.lines.append(f"{target} = {expr} if M is None else merge(M, {expr}, {target})")
        else:
            self.lines.append(f"{target} = merge({guard} if M is None else M & {guard}, {expr}, {target})")

    def guard(self, instr: Instr) -> str | None:
        """Expression of the predicate under which an instruction is executed."""
        if not instr.pred:
            return None
        predicate = self.read(instr.pred, "pred")
        return f"(~{predicate})" if instr.negate else predicate


class Operation:
    """One instruction: its parts, and its operands by number; 0 is the result of most."""

    def __init__(self, code: Code, instr: Instr) -> None:
        self.code, self._operands = code, instr.operands
        self.op = instr.op.replace(".shared::cta", ".shared")  # which is what .shared alone means
        self.parts = self.op.split(".")
        self.root, self.ty = self.parts[0], self.parts[-1]
        self.where = repr(instr.where)
        self._guard = code.guard(instr)

    def __len__(self) -> int:
        return len(self._operands)

    def __getitem__(self, index: int) -> str:
        return self._operands[index]

    @property
    def mask(self) -> str:
        """Expression of the threads that execute it."""
        return "M" if self._guard is None else f"({self._guard} if M is None else M & {self._guard})"

    def read(self, index: int, ty: str | None = None) -> str:
        """Expression of an operand, as the instruction's own type unless told."""
        return self.code.read(self._operands[index], ty or self.ty)

    def set(self, expr: str, ty: str | None = None, to: str | None = None) -> None:
        """Assign to operand 0, or to a register by name."""
        self.code.set(self._operands[0] if to is None else to, expr, self._guard, ty)

    def line(self, line: str) -> None:
        self.code.lines.append(line)

    def list(self, index: int) -> list[str]:
        """The members of an operand such as {a, b}."""
        return [t.strip() for t in self._operands[index].strip("{} ").split(",")]

    def place(self, index: int) -> tuple[str, int]:
        """Base and offset of an operand such as [a + 4]."""
        m = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", self._operands[index].replace("+-", "+ -"))
        return m[1], int(m[2] or 0)

    def address(self, index: int) -> str:
        """Expression of the address that such an operand names."""
        base, offset = self.place(index)
        if self.code.layout.is_reg(base):
            return f"({self.code.get(base)}.astype('i8') + {offset})"
        return f"np.int64({self.code.layout.symbols[base] + offset})"
