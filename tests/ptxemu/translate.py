"""Each basic block of a PTX kernel as a Python function over NumPy vectors.

Over 400 lines: one method an instruction family, in one class.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from ptxemu.arithmetic import BITS, HELPERS, NP, Noise, U, UnsupportedError, merge
from ptxemu.ptx import Instr, Kernel

BITWISE = {"and": "&", "or": "|", "xor": "^"}
SIGNS = {"add": "+", "sub": "-", "mul": "*"}


class Machine:
    """A kernel made ready to run."""

    def __init__(self, kernel: Kernel, noise: Noise | None = None) -> None:
        self.kernel = kernel
        self.noise = noise or Noise(None)
        self.register_index: dict[str, int] = {}
        self.symbols: dict[str, int] = {}
        offset = 0
        for name, size in kernel.shared.items():
            offset = -(-offset // 16) * 16
            self.symbols[name] = offset
            offset += size
        self.static_shared = offset
        offset = 0
        for name, size in kernel.local.items():
            offset = -(-offset // 16) * 16
            self.symbols[name] = offset
            offset += size
        self.local_bytes = offset
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
        for r in uses:
            if r not in self.local_regs:
                self.register_index[r] = len(self.register_index)
        self.code: dict[int, Any] = {}
        self.executed: Counter[str] = Counter()

    # ---- names

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
            return name in self.kernel.regs
        return name.startswith("%") and re.sub(r"\d+$", "", name) + "#" in self.kernel.regs

    def reg_bits(self, name: str) -> int:
        t = self.reg_type(name)
        return 1 if t == "pred" else BITS[t]

    def _registers(self, instr: Instr) -> tuple[list[str], list[str]]:
        names = [re.findall(r"%?[\w$@]+", o) for o in instr.operands]
        names = [[n for n in group if self.is_reg(n)] for group in names]
        root = instr.op.split(".")[0]
        reads = [instr.pred] if instr.pred else []
        if root in ("st", "bra", "bar", "barrier", "ret", "membar", "fence", "red", "cp"):
            if instr.op.startswith(("bar.red", "barrier.red")):
                return names[0], reads + [n for g in names[1:] for n in g]
            return [], reads + [n for g in names for n in g]
        return (names[0] if names else []), reads + [n for g in names[1:] for n in g]

    # ---- code of a block

    def _local(self, name: str) -> str:
        return "v_" + re.sub(r"\W", "_", name.replace("%", ""))

    def _read(self, operand: str, ty: str) -> str:
        """Expression of an operand as type `ty`."""
        operand = operand.strip()
        if ty == "pred":
            if self.is_reg(operand):
                return self._get(operand)
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
        if operand.startswith("%") and operand.split(".")[0] in (
            "%tid",
            "%ctaid",
            "%ntid",
            "%nctaid",
            "%laneid",
            "%warpid",
        ):
            return f"S.special({operand!r}).astype('{dtype}')"
        if operand in self.symbols:
            return self._const(U[BITS[ty]](self.symbols[operand]), ty)
        if not self.is_reg(operand):
            raise UnsupportedError(f"operand {operand}")
        bits, expr = self.reg_bits(operand), self._get(operand)
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

    def _get(self, name: str) -> str:
        if name in self.local_regs:
            return self._local(name)
        if name in ("%SP", "%SPL"):
            pass
        return f"R[{self.register_index[name]}]"

    def _set(self, name: str, expr: str, guard: str | None, lines: list[str], ty: str | None = None) -> None:
        """Assign an expression whose value has the width of the register, or as type `ty` to be widened."""
        if name == "_":
            lines.append(f"({expr})")
            return
        if self.reg_type(name) != "pred":
            bits = self.reg_bits(name)
            if ty is not None and BITS[ty] < bits:
                # loads and conversions to a wider register: extended by sign or zero
                signed = ty[0] == "s"
                expr = f"np.asarray({expr}).view('{NP[ty]}').astype('{'i' if signed else 'u'}{bits // 8}')"
            expr = f"np.asarray({expr}).view('u{bits // 8}')"
        target = self._get(name)
        if name in self.local_regs:
            if guard is None:
                lines.append(f"{target} = {expr}")
            else:
                lines.append(f"{target} = merge({guard}, {expr}, {target})")
        else:
            mask = guard if guard is not None else None
            if mask is None:
                lines.append(f"{target} = {expr} if M is None else merge(M, {expr}, {target})")
            else:
                lines.append(f"{target} = merge({mask} if M is None else M & {mask}, {expr}, {target})")

    def compile(self, index: int):
        if index in self.code:
            return self.code[index]
        self.constants: dict[str, Any] = {}
        lines: list[str] = []
        block = self.kernel.blocks[index]
        terminator = "None"
        for instr in block.instrs:
            guard = None
            if instr.pred:
                guard = f"(~{self._read(instr.pred, 'pred')})" if instr.negate else self._read(instr.pred, "pred")
            root = instr.op.split(".")[0]
            if root == "bra":
                terminator = f"('bra', {guard}, {self.kernel.labels[instr.operands[-1]]})"
            elif root in ("ret", "exit"):
                terminator = f"('bra', {guard}, -1)"
            elif root in ("bar", "barrier"):
                if instr.op.startswith("bar.warp"):
                    lines.append("pass")
                    continue
                if guard:
                    raise UnsupportedError("predicated barrier")
                if ".red" in instr.op:
                    register, value = self.register_index[instr.operands[0]], self._read(instr.operands[2], "pred")
                    terminator = f"('red', {register}, {value}, {instr.op!r}, {instr.where!r})"
                else:
                    count = self._read(instr.operands[1], "u32") if len(instr.operands) > 1 else "None"
                    barrier = self._read(instr.operands[0], "u32") if instr.operands else "np.uint32(0)"
                    terminator = f"('bar', {barrier}, {count}, {instr.where!r})"
            else:
                self._instr(instr, guard, lines)
        source = "def run(S, R, M):\n" + "".join(f"    {line}\n" for line in lines) + f"    return {terminator}\n"
        scope: dict[str, Any] = {"np": np, "merge": merge, "N": self.noise, **HELPERS, **self.constants}
        exec(compile(source, f"<block {index} of {self.kernel.name}>", "exec"), scope)
        self.code[index] = scope["run"]
        return scope["run"]

    def _instr(self, instr: Instr, guard: str | None, lines: list[str]) -> None:
        op, o = instr.op.replace(".shared::cta", ".shared"), instr.operands  # which is what .shared alone means
        parts = op.split(".")
        root, ty = parts[0], parts[-1]
        read, setr = self._read, lambda name, expr, t=None: self._set(name, expr, guard, lines, t)
        where = repr(instr.where)

        def full_mask() -> str:
            if guard is None:
                return "M"
            return f"({guard} if M is None else M & {guard})"

        if op.startswith("cp.async."):
            if parts[2] in ("commit_group", "wait_group", "wait_all"):
                lines.append("pass")
                return
            places = [re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", x) for x in o[:2]]
            to, source = (f"({self._get(m[1])}.astype('i8') + {int(m[2] or 0)})" for m in places)
            size = int(o[2], 0)
            read_bytes = read(o[3], "u32") if len(o) > 3 else f"np.uint32({size})"
            lines.append(f"S.copy({to}, {source}, {size}, {read_bytes}, {full_mask()}, {where}, {op!r})")
            return
        if root in ("ld", "ldu"):
            vec = int(next((p[1:] for p in parts if re.fullmatch(r"v\d", p)), "1"))
            space = parts[1]
            m = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", o[1].replace("+-", "+ -"))
            base, offset = m[1], int(m[2] or 0)
            targets = [t.strip() for t in o[0].strip("{} ").split(",")]
            bits = BITS[ty]
            if space == "param":
                for k, t in enumerate(targets):
                    setr(t, f"S.param({base!r}, {offset + k * bits // 8}, 'u{bits // 8}')", ty)
                return
            if self.is_reg(base):
                address = f"({self._get(base)}.astype('i8') + {offset})"
            else:
                address = f"np.int64({self.symbols[base] + offset})"
            lines.append(f"L = S.load('{space}', {address}, {bits // 8}, {vec}, {full_mask()}, {where}, {op!r})")
            for k, t in enumerate(targets):
                setr(t, f"L[{k}]", ty)
            return
        if root == "st":
            vec = int(next((p[1:] for p in parts if re.fullmatch(r"v\d", p)), "1"))
            space = parts[1]
            m = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", o[0].replace("+-", "+ -"))
            base, offset = m[1], int(m[2] or 0)
            values = [t.strip() for t in o[1].strip("{} ").split(",")]
            bits = BITS[ty]
            address = (
                f"({self._get(base)}.astype('i8') + {offset})"
                if self.is_reg(base)
                else f"np.int64({self.symbols[base] + offset})"
            )
            vs = ", ".join(read(v, f"b{bits}") for v in values)
            lines.append(f"S.store('{space}', {address}, [{vs}], {bits // 8}, {full_mask()}, {where}, {op!r})")
            return
        if root in ("atom", "red"):
            m = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", o[1 if root == "atom" else 0])
            base, offset = m[1], int(m[2] or 0)
            kind = next(p for p in parts if p in ("add", "max", "min", "exch", "cas", "or", "and"))
            value = read(o[2 if root == "atom" else 1], f"u{BITS[ty]}")
            lines.append(
                f"L = S.atomic({kind!r}, ({self._get(base)}.astype('i8') + {offset}), {value}, {BITS[ty] // 8}, "
                f"{full_mask()}, {where})"
            )
            if root == "atom":
                setr(o[0], "L")
            return
        if root == "shfl":
            target, _, p = o[0].partition("|")
            mode = parts[2]
            lines.append(
                f"L = S.shuffle('{mode}', {read(o[1], 'b32')}, {read(o[2], 'u32')}, {read(o[3], 'u32')}, "
                f"{read(o[4], 'u32')}, {full_mask()}, {where})"
            )
            setr(target.strip(), "L[0]")
            if p:
                setr(p.strip(), "L[1]")
            return
        if root == "redux":
            lines.append(
                f"L = S.redux({parts[2]!r}, {read(o[1], ty)}, {read(o[2], 'u32')}, {full_mask()}, {where}, "
                f"{'NaN' in parts}, {'abs' in parts})"
            )
            setr(o[0], "L")
            return
        if root == "ldmatrix":
            m = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\d+))?\s*\]", o[1])
            targets = [t.strip() for t in o[0].strip("{} ").split(",")]
            base = self._get(m[1]) + ".astype('i8')" if self.is_reg(m[1]) else f"np.int64({self.symbols[m[1]]})"
            if "trans" in parts:
                raise UnsupportedError(op)
            lines.append(f"L = S.ldmatrix({base} + {int(m[2] or 0)}, {len(targets)}, {full_mask()}, {where})")
            for k, t in enumerate(targets):
                setr(t, f"L[{k}]")
            return
        if root in ("membar", "fence", "nanosleep", "prefetch"):
            lines.append("S.fence()")
            return
        if root == "mov":
            if o[0].startswith("{"):
                bits, ts = BITS[ty], [t.strip() for t in o[0].strip("{} ").split(",")]
                part = bits // len(ts)
                lines.append(f"L = {read(o[1], f'b{bits}')}")
                for k, t in enumerate(ts):
                    if t != "_":
                        setr(
                            t,
                            f"(L >> np.{'uint64' if bits == 64 else f'uint{bits}'}({k * part})).astype('u{part // 8}')",
                        )
            elif o[1].startswith("{"):
                bits, vs = BITS[ty], [t.strip() for t in o[1].strip("{} ").split(",")]
                part = bits // len(vs)
                terms = [
                    f"({read(v, f'b{part}')}.astype('u{bits // 8}') << np.uint{bits}({k * part}))"
                    for k, v in enumerate(vs)
                ]
                setr(o[0], " | ".join(terms))
            elif ty == "pred":
                setr(o[0], read(o[1], "pred"))
            else:
                setr(o[0], read(o[1], f"b{BITS[ty]}"))
            return
        if root == "cvta":
            setr(o[0], read(o[1], "b64"))
            return
        if root == "setp":
            self._setp(parts, o, read, setr)
            return
        if root == "selp":
            t = ty if ty[0] in "fb" else f"b{BITS[ty]}"
            setr(o[0], f"np.where({read(o[3], 'pred')}, {read(o[1], f'b{BITS[t]}')}, {read(o[2], f'b{BITS[t]}')})")
            return
        if root == "cvt":
            setr(o[0], *self._cvt(parts, o, read))
            return
        ftz = "ftz" in parts
        if ty == "pred":
            a = read(o[1], "pred")
            b = read(o[2], "pred") if len(o) > 2 else None
            setr(o[0], {"and": f"({a} & {b})", "or": f"({a} | {b})", "xor": f"({a} ^ {b})", "not": f"(~{a})"}[root])
            return
        if root in ("and", "or", "xor", "not", "cnot"):
            a = read(o[1], ty)
            setr(
                o[0],
                f"(~{a})" if root == "not" else f"({a} {BITWISE[root]} {read(o[2], ty)})",
            )
            return
        if root == "lop3":
            a, b, c = (read(x, "b32") for x in o[1:4])
            setr(o[0], f"lop3({a}, {b}, {c}, {int(o[4], 0)})")
            return
        if root == "prmt":
            setr(o[0], f"prmt({read(o[1], 'b32')}, {read(o[2], 'b32')}, {read(o[3], 'b32')})")
            return
        if root in ("shl", "shr"):
            n = read(o[2], "u32")
            if root == "shl":
                setr(o[0], f"shl({read(o[1], f'u{BITS[ty]}')}, {n}, {BITS[ty]})")
            else:
                t = ty if ty[0] != "b" else f"u{BITS[ty]}"
                setr(o[0], f"shr({read(o[1], t)}, {n}, {BITS[ty]}, {ty[0] == 's'})")
            return
        if root == "bfe":
            setr(o[0], f"bfe({read(o[1], ty)}, {read(o[2], 'u32')}, {read(o[3], 'u32')}, {BITS[ty]}, {ty[0] == 's'})")
            return
        if root == "shf":
            lo, hi, n = read(o[1], "u32"), read(o[2], "u32"), read(o[3], "u32")
            setr(o[0], f"shf({lo}, {hi}, {n}, {parts[1] == 'l'}, {parts[2] == 'wrap'})")
            return
        if root in ("popc", "clz", "brev"):
            setr(o[0], f"{root}({read(o[1], ty)}, {BITS[ty]})")
            return
        if ty == "f32x2":
            setr(o[0], f"pair_op({root!r}, {', '.join(read(x, 'b64') for x in o[1:])})")
            return
        if ty in ("bf16", "f16") and "f32" in parts:  # mixed: a is half, the rest fp32
            up = f"bf16_to_f32({read(o[1], 'b16')})" if ty == "bf16" else f"{read(o[1], 'b16')}.view('f2').astype('f4')"
            rest = [read(x, "f32") for x in o[2:]]
            if root == "fma":
                upb = (
                    f"bf16_to_f32({read(o[2], 'b16')})"
                    if ty == "bf16"
                    else f"{read(o[2], 'b16')}.view('f2').astype('f4')"
                )
                setr(o[0], f"fma32({up}, {upb}, {read(o[3], 'f32')})")
            else:
                setr(o[0], f"({up} {SIGNS[root]} {rest[0]})")
            return
        if ty in ("bf16", "bf16x2", "f16", "f16x2"):
            wide = "b32" if ty.endswith("x2") else "b16"
            setr(o[0], f"half_op({root!r}, {ty!r}, {', '.join(read(x, wide) for x in o[1:])})")
            return
        fl = ty[0] == "f"
        limit = {"fma": 4, "mad": 4, "min": 4, "max": 4}.get(root, 3)
        if len(o) > limit:
            raise UnsupportedError(f"{op} with {len(o)} operands")
        if root == "fma":
            a, b, c = (read(x, ty) for x in o[1:4])
            if ftz:
                a, b, c = f"ftz32({a})", f"ftz32({b})", f"ftz32({c})"
            e = f"fma{BITS[ty]}({a}, {b}, {c})"
            setr(o[0], f"ftz32({e})" if ftz else e)
            return
        if root in ("add", "sub", "mul", "div", "min", "max", "rem") and fl:
            a, b = read(o[1], ty), read(o[2], ty)
            if ftz:
                a, b = f"ftz32({a})", f"ftz32({b})"
            if root == "div":
                if "rn" in parts:
                    e = f"({a} / {b})"
                else:
                    e = f"N.relative({a}.astype('f8') / {b}.astype('f8'), 2.0 ** -22.5).astype('f4')"
            elif root in ("min", "max"):
                f = f"np.f{root}" if "NaN" not in parts else f"np.{root}imum"
                e = f"{f}({a}, {b})"
                if len(o) > 3:  # sm_100 has three operands
                    e = f"{f}({e}, {read(o[3], ty)})"
            else:
                e = f"({a} {SIGNS[root]} {b})"
            if "sat" in parts:
                e = f"np.clip({e}, np.float32(0), np.float32(1))"
            setr(o[0], f"ftz32({e})" if ftz else e)
            return
        if root in ("abs", "neg") and fl:
            a = read(o[1], ty)
            setr(o[0], f"np.abs({a})" if root == "abs" else f"(-{a})")
            return
        if root == "copysign":
            setr(o[0], f"np.copysign({read(o[2], ty)}, {read(o[1], ty)})")
            return
        if root == "ex2":
            a = read(o[1], ty)
            setr(o[0], f"ex2(N, {a}, {ftz})")
            return
        if root == "lg2":
            setr(o[0], f"np.log2({read(o[1], ty)}.astype('f8')).astype('f4')")
            return
        if root == "tanh":
            setr(o[0], f"N.relative(np.tanh({read(o[1], ty)}.astype('f8')), 2.0 ** -11).astype('f4')")
            return
        if root in ("rcp", "sqrt", "rsqrt"):
            a = read(o[1], ty)
            f = {
                "rcp": f"(1.0 / {a}.astype('f8'))",
                "sqrt": f"np.sqrt({a}.astype('f8'))",
                "rsqrt": f"(1.0 / np.sqrt({a}.astype('f8')))",
            }[root]
            if ty == "f64" and "approx" in parts:  # 20 bits of mantissa
                setr(o[0], f"rcp_approx64({a})")
                return
            setr(o[0], f"N.relative({f}, {2.0**-23 if 'approx' in parts else 0.0}).astype('f{BITS[ty] // 8}')")
            return
        # integers
        if root in ("add", "sub"):
            t = f"u{BITS[ty]}"
            setr(o[0], f"({read(o[1], t)} {'+' if root == 'add' else '-'} {read(o[2], t)})")
            return
        if root == "neg":
            setr(o[0], f"(-{read(o[1], ty)})")
            return
        if root == "abs":
            setr(o[0], f"np.abs({read(o[1], ty)})")
            return
        if root in ("min", "max"):
            setr(o[0], f"np.{root}imum({read(o[1], ty)}, {read(o[2], ty)})")
            return
        if root in ("div", "rem"):
            if ty[0] == "u":
                b = read(o[2], ty)
                setr(
                    o[0],
                    f"({read(o[1], ty)} {'//' if root == 'div' else '%'} np.where({b} == 0, np.ones_like({b}), {b}))",
                )
            else:
                setr(o[0], f"{'cdiv' if root == 'div' else 'crem'}({read(o[1], ty)}, {read(o[2], ty)})")
            return
        if root in ("mul", "mad"):
            a, b, bits, sign = read(o[1], ty), read(o[2], ty), BITS[ty], ty[0] == "s"
            if "wide" in parts:
                wide = f"{'i' if sign else 'u'}{bits // 4}"
                e = f"({a}.astype('{wide}') * {b}.astype('{wide}'))"
                if root == "mad":
                    e = f"({e}.view('u{bits // 4}') + {read(o[3], f'u{bits * 2}')})"
                setr(o[0], e)
            elif "lo" in parts:
                e = f"({read(o[1], f'u{bits}')} * {read(o[2], f'u{bits}')})"
                if root == "mad":
                    e = f"({e} + {read(o[3], f'u{bits}')})"
                setr(o[0], e)
            else:
                e = f"mulhi{bits}({a}, {b}, {sign})"
                if root == "mad":
                    e = f"({e}.view('u{bits // 8}') + {read(o[3], f'u{bits}')})"
                setr(o[0], e)
            return
        raise UnsupportedError(op)

    def _setp(self, parts, o, read, setr) -> None:
        cmp, ty = parts[1], parts[-1]
        target, _, second = o[0].partition("|")
        a, b = read(o[1], ty if ty[0] != "b" else f"u{BITS[ty]}"), read(o[2], ty if ty[0] != "b" else f"u{BITS[ty]}")
        signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        if ty[0] == "f":
            nan = f"(np.isnan({a}) | np.isnan({b}))"
            if cmp in signs:
                e = f"({a} {signs[cmp]} {b})" if cmp != "ne" else f"(({a} != {b}) & ~{nan})"
            elif cmp == "num":
                e = f"(~{nan})"
            elif cmp == "nan":
                e = nan
            else:
                e = f"(({a} {signs[cmp[:2]]} {b}) | {nan})"
        else:
            unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
            e = f"({a} {signs[unsigned.get(cmp, cmp)]} {b})"
        boolean = next((p for p in parts[2:-1] if p in ("and", "or", "xor")), None)
        if second:
            setr(second.strip(), f"(~{e})")
        if boolean:
            c = o[3]
            other = f"(~{read(c[1:], 'pred')})" if c.startswith("!") else read(c, "pred")
            e = f"({e} {BITWISE[boolean]} {other})"
        setr(target.strip(), e)

    def _cvt(self, parts, o, read):
        dst, src = parts[-2], parts[-1]
        how = next((p for p in parts if p in ("rn", "rz", "rm", "rp", "rzi", "rni", "rmi", "rpi")), None)
        if dst in ("bf16x2", "f16x2"):
            f = "f32_to_bf16" if dst[0] == "b" else "f32_to_f16"
            hi, lo = read(o[1], "f32"), read(o[2], "f32")
            return f"((np.asarray({f}({hi})).astype('u4') << np.uint32(16)) | np.asarray({f}({lo})).astype('u4'))", None
        if dst == "bf16":
            return f"f32_to_bf16({read(o[1], 'f32')})", None
        if dst == "f16":
            return f"f32_to_f16({read(o[1], 'f32')})", None
        if src == "bf16":
            return f"bf16_to_f32({read(o[1], 'b16')})", None
        if src == "f16" and dst == "f32":
            return f"{read(o[1], 'b16')}.view('f2').astype('f4')", None
        a = read(o[1], src)
        if dst[0] == "f" and src[0] == "f":
            if how and how.endswith("i"):
                f = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[how]
                return f"np.{f}({a})", None
            return f"{a}.astype('{NP[dst]}')", None
        if dst[0] == "f":
            return f"{a}.astype('{NP[dst]}')", None
        if src[0] == "f":
            return f"to_int({a}, '{NP[dst]}', '{how}')", dst
        if BITS[dst] >= BITS[src]:
            return f"{a}.astype('{'i' if src[0] == 's' else 'u'}{BITS[dst] // 8}')", dst
        return f"{a}.astype('{NP[dst]}')", dst
