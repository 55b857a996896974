"""Parse PTX text into kernels of basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Instr:
    op: str
    operands: list[str]
    pred: str | None
    negate: bool
    where: str


@dataclass
class Block:
    index: int
    instrs: list[Instr] = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, str, int]]  # name, type, bytes
    regs: dict[str, str]  # prefix or name -> type
    blocks: list[Block]
    labels: dict[str, int]
    shared: dict[str, int]  # symbol -> bytes
    local: dict[str, int]

    def new_block(self) -> Block:
        if self.blocks[-1].instrs:
            self.blocks.append(Block(len(self.blocks)))
        return self.blocks[-1]


TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def split_operands(text: str) -> list[str]:
    out, depth, current = [], 0, ""
    for c in text:
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        if c == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        out.append(current.strip())
    return out


def renamed(operand: str, scopes: list[dict[str, str]]) -> str:
    """Registers that a { } scope declares, under the name that is theirs alone."""
    for scope in reversed(scopes):
        for old, new in scope.items():
            operand = re.sub(rf"(?<![\w%$]){re.escape(old)}(?![\w@])", new, operand)
    return operand


def parse(text: str) -> dict[str, Kernel]:
    files = {m[1]: m[2].split("/")[-1] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    lines = [re.sub(r"//.*", "", line) for line in text.splitlines()]
    module_shared: dict[str, int] = {}
    kernels: dict[str, Kernel] = {}
    i = 0
    while i < len(lines):
        line = lines[i].strip()
        m = re.match(r"(?:\.extern\s+)?\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", line)
        if m:
            module_shared[m[1]] = int(m[2] or 0)
        m = re.match(r"(?:\.visible\s+)?\.entry\s+([\w$]+)", line)
        if not m:
            i += 1
            continue
        name = m[1]
        header = ""
        while "{" not in lines[i]:
            header += lines[i] + "\n"
            i += 1
        params = []
        for m in re.finditer(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?",
            header,
        ):
            size = int(m[3]) if m[3] else TYPE_BYTES[re.sub(r"\D", "", m[1])]
            params.append((m[2], m[1], size))
        kernel = Kernel(name, params, {}, [], {}, dict(module_shared), {})
        i += 1
        depth = 1
        where = ""
        block = Block(0)
        kernel.blocks.append(block)
        scopes: list[dict[str, str]] = []
        scope_count = 0
        buffer = ""

        while depth:
            line = lines[i].strip()
            i += 1
            if not line:
                continue
            m = re.match(r"\.loc\s+(\d+)\s+(\d+)", line)
            if m:
                if m[2] != "0":
                    where = f"{files.get(m[1], '?')}:{m[2]}"
                continue
            if re.match(r"\.(pragma|file|section|branchtargets|noreturn)", line):
                continue
            buffer += " " + line
            # consume as many statements as there are
            while True:
                buffer = buffer.strip()
                if not buffer:
                    break
                m = re.match(r"([$\w]+):(?!:)", buffer)
                if m:
                    block = kernel.new_block()
                    kernel.labels[m[1]] = block.index
                    buffer = buffer[m.end() :]
                    continue
                if buffer[0] == "{":
                    depth += 1
                    scopes.append({})
                    scope_count += 1
                    buffer = buffer[1:]
                    continue
                if buffer[0] == "}":
                    depth -= 1
                    if scopes:
                        scopes.pop()
                    buffer = buffer[1:]
                    if depth == 0:
                        break
                    continue
                end = buffer.find(";")
                if end < 0:
                    break
                statement, buffer = buffer[:end].strip(), buffer[end + 1 :]
                if not statement:
                    continue
                m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
                if m:
                    for item in m[2].split(","):
                        item = item.strip()
                        n = re.match(r"(%?[\w$]+)(<\d+>)?$", item)
                        if scopes and not n[2]:
                            fresh = f"{n[1]}@{scope_count}"
                            scopes[-1][n[1]] = fresh
                            kernel.regs[fresh] = m[1]
                        else:
                            kernel.regs[n[1] + ("#" if n[2] else "")] = m[1]
                    continue
                m = re.match(r"\.(shared|local)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", statement)
                if m:
                    size = (int(m[4]) if m[4] else 1) * TYPE_BYTES[re.sub(r"\D", "", m[2])]
                    getattr(kernel, m[1])[m[3]] = size
                    continue
                if statement.startswith("."):
                    raise NotImplementedError(statement)
                m = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
                operands = split_operands(m[4])
                operands = [renamed(o, scopes) for o in operands]
                pred = m[2] and renamed(m[2], scopes)
                instr = Instr(m[3], operands, pred, m[1] == "!", where)
                block = kernel.blocks[-1]
                block.instrs.append(instr)
                root = instr.op.split(".")[0]
                if root in ("bra", "ret", "exit", "bar", "barrier"):
                    kernel.blocks.append(Block(len(kernel.blocks)))
        kernels[name] = kernel
    return kernels
