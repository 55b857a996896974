"""Run PTX kernels on the CPU: all threads of several blocks at a time, as NumPy vectors.

Threads have a program counter each; of those that can run, the ones at the lowest block of the text go first, all
together. Barriers hold threads until all of their block that have not exited wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptxemu.arithmetic import UnsupportedError, merge
from ptxemu.memory import Global, PerOwner, Problems
from ptxemu.translate import Machine


class Run:
    """Some blocks of a grid, run together."""

    def __init__(
        self, machine: Machine, params: bytes, ctas, block_dim, grid, shared: int, memory: Global, problems: Problems
    ):
        self.machine, self.params = machine, params
        self.problems, self.memory = problems, memory
        self.n_threads = int(np.prod(block_dim))
        self.nw = -(-self.n_threads // 32)
        ctas = np.asarray(ctas)
        self.ctas, self.grid, self.block_dim = ctas, grid, block_dim
        self.n = ctas.size * self.n_threads
        thread = np.tile(np.arange(self.n_threads), ctas.size)
        cta = np.repeat(ctas, self.n_threads)
        self.slot = np.repeat(np.arange(ctas.size), self.n_threads)
        self.lane = thread % 32
        self.warp_in_cta = thread // 32
        self.schedule: str | None = None  # "first" or "last": lets the first or last warp run ahead of the others
        self.warp = (cta * self.nw + thread // 32).astype(np.int32)
        # Shared memory's shadow numbers warps by slot.
        self.slot_warp = (self.slot * self.nw + thread // 32).astype(np.int32)
        x, y, z = block_dim
        gx, gy, gz = grid
        self.specials = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%ctaid.x": cta % gx,
            "%ctaid.y": cta // gx % gy,
            "%ctaid.z": cta // (gx * gy),
            "%ntid.x": np.int64(x),
            "%ntid.y": np.int64(y),
            "%ntid.z": np.int64(z),
            "%nctaid.x": np.int64(gx),
            "%nctaid.y": np.int64(gy),
            "%nctaid.z": np.int64(gz),
            "%laneid": self.lane,
        }
        self.epoch = np.zeros(self.n, np.int32)
        races = memory.check_races
        self.shared = PerOwner(problems, "shared", ctas.size, max(shared, machine.static_shared), self.nw, races)
        self.local = PerOwner(problems, "local", self.n, machine.local_bytes, 1, False) if machine.local_bytes else None

    # ---- what the code of blocks calls

    def special(self, name):
        return self.specials[name]

    def param(self, name, offset, dtype):
        start = self.machine.param_offset[name] + offset
        return np.frombuffer(self.params, dtype, 1, start)[0]

    def _active(self, mask):
        return None if mask is None else np.flatnonzero(np.broadcast_to(mask, (self.n,)))

    def load(self, space, address, size, vec, mask, where, op):
        index = self._active(mask)
        address = np.broadcast_to(address, (self.n,))
        if index is None:
            index = slice(None)
        a = address[index]
        warp, epoch = self.warp[index], self.epoch[index]
        if space == "global":
            got = self.memory.load(
                a.view(np.uint64),
                size,
                vec,
                where,
                warp,
                epoch,
                self.nw,
                racy=".cg" not in op and ".volatile" not in op,
            )
        elif space == "shared":
            got = self.shared.load(self.slot[index], a, size, vec, where, self.slot_warp[index], epoch)
        elif space == "local":
            got = self.local.load(np.arange(self.n)[index], a, size, vec, where, warp, epoch)
        else:
            raise UnsupportedError(f"ld.{space}")
        if isinstance(index, slice):
            return got
        out = []
        for g in got:
            full = np.zeros(self.n, g.dtype)
            full[index] = g
            out.append(full)
        return out

    def copy(self, to, source, size, read_bytes, mask, where, op):
        """cp.async, at once: a wait that is missing goes unnoticed, a barrier that is missing does not."""
        read_bytes = np.broadcast_to(read_bytes, (self.n,))
        if not np.isin(read_bytes, (0, size)).all():
            raise UnsupportedError(f"{op} of part of {size} bytes")
        active = np.ones(self.n, bool) if mask is None else np.broadcast_to(mask, (self.n,))
        words = self.load("global", source, 4, size // 4, active & (read_bytes > 0), where, "cp.async")
        self.store(
            "shared", to, [np.zeros(self.n, np.uint32)] * (size // 4) if words is None else words, 4, mask, where, op
        )

    def store(self, space, address, values, size, mask, where, op):
        index = self._active(mask)
        if index is None:
            index = slice(None)
        elif index.size == 0:
            return
        a = np.broadcast_to(address, (self.n,))[index]
        values = [np.broadcast_to(v, (self.n,))[index] for v in values]
        warp, epoch = self.warp[index], self.epoch[index]
        if space == "global":
            self.memory.store(a.view(np.uint64), values, size, where, warp, epoch, self.nw)
        elif space == "shared":
            self.shared.store(self.slot[index], a, values, size, where, self.slot_warp[index], epoch)
        elif space == "local":
            self.local.store(np.arange(self.n)[index], a, values, size, where, warp, epoch)
        else:
            raise UnsupportedError(f"st.{space}")

    def atomic(self, kind, address, value, size, mask, where):
        index = self._active(mask)
        index = np.arange(self.n) if index is None else index
        a = np.broadcast_to(address, (self.n,))[index].view(np.uint64)
        value = np.broadcast_to(value, (self.n,))[index]
        out = np.zeros(self.n, value.dtype)
        self.memory.align(a, size, where, "atomic")
        for region, where_in in self.memory.groups(a, size, where, "atomic"):
            pos = ((a[where_in] - np.uint64(region.base)) // np.uint64(size)).astype(np.int64)
            view = region.views[size]
            for p, v, i in zip(pos, value[where_in], index[where_in], strict=True):
                old = view[p]
                out[i] = old
                view[p] = {"add": old + v, "max": max(old, v), "min": min(old, v), "exch": v}[kind]
        return out

    def redux(self, kind, value, members, mask, where, nan, absolute):
        value = np.broadcast_to(value, (self.n,)).reshape(-1, 32)
        members = np.broadcast_to(members, (self.n,)).astype(np.int64).reshape(-1, 32)
        if mask is not None:
            warps = np.broadcast_to(mask, (self.n,)).reshape(-1, 32)
            have = (warps * (1 << np.arange(32))).sum(axis=1)
            need = np.bitwise_or.reduce(np.where(warps, members, 0), axis=1)
            if (need & ~have).any():
                self.problems.add(
                    "redux with lanes that are not here", where, f"{int(((need & ~have) != 0).sum())} warps"
                )
        if not ((members == 0xFFFFFFFF) | (mask is not None)).all():
            raise UnsupportedError("redux of part of a warp")
        if absolute:
            value = np.abs(value)
        if value.dtype.kind == "f":
            f = {"max": (np.maximum if nan else np.fmax), "min": (np.minimum if nan else np.fmin)}[kind]
        else:
            f = {
                "max": np.maximum,
                "min": np.minimum,
                "add": np.add,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[kind]
        return np.repeat(f.reduce(value, axis=1).astype(value.dtype), 32)  # sums of integers come back wider

    def ldmatrix(self, address, count, mask, where):
        if mask is not None and not np.broadcast_to(mask, (self.n,)).reshape(-1, 32).any(axis=1).any():
            return [np.zeros(self.n, np.uint32)] * count
        address = np.broadcast_to(address, (self.n,)).reshape(-1, 32)
        lane, out = np.arange(32), []
        for m in range(count):
            a = (address[:, 8 * m + lane // 4] + 4 * (lane % 4)).reshape(-1)
            out.append(self.load("shared", a, 4, 1, mask, where, "ldmatrix")[0])
        return out

    def fence(self):
        pass

    def shuffle(self, mode, value, b, c, members, mask, where):
        value = np.broadcast_to(value, (self.n,))
        b, c = np.broadcast_to(b, (self.n,)).astype(np.int64), np.broadcast_to(c, (self.n,)).astype(np.int64)
        if self.n_threads % 32:
            raise UnsupportedError("shuffles in partial warps")
        cap, seg = c & 31, (c >> 8) & 31
        lane = self.lane
        lo, hi = lane & seg, (lane & seg) | (cap & ~seg)
        if mode == "bfly":
            j = lane ^ (b & 31)
            ok = j <= hi
        elif mode == "down":
            j = lane + (b & 31)
            ok = j <= hi
        elif mode == "up":
            j = lane - (b & 31)
            ok = j >= lo
        else:
            j = lo | (b & 31 & ~seg)
            ok = j <= hi
        j = np.where(ok, j, lane)
        source = np.arange(self.n) - lane + j
        members = np.broadcast_to(members, (self.n,)).astype(np.int64)
        if mask is not None:
            active = np.broadcast_to(mask, (self.n,))
            named = (members >> lane) & 1
            # every lane that an active one names must be active here too
            warps = active.reshape(-1, 32)
            need = np.bitwise_or.reduce(np.where(warps, members.reshape(-1, 32), 0), axis=1)
            have = (warps * (1 << np.arange(32))).sum(axis=1)
            if (need & ~have).any():
                self.problems.add(
                    "shuffle with lanes that are not here", where, f"{int(((need & ~have) != 0).sum())} warps"
                )
            if (active & ~active[source]).any():
                self.problems.add("shuffle from an inactive lane", where, "")
            del named
        return value[source], ok

    # ---- scheduling

    def run(self, max_steps: int = 1_000_000) -> None:
        n, threads = self.n, self.n_threads
        pc = np.zeros(n, np.int32)
        waiting = np.zeros(n, bool)
        barrier_at = np.full(n, -1, np.int32)
        R: list[Any] = [self.machine.zero(name) for name in self.machine.register_index]
        reds: list[tuple] = []
        blocks = self.machine.kernel.blocks
        last = len(blocks)
        for _ in range(max_steps):
            runnable = (pc >= 0) & ~waiting
            if not runnable.any():
                if not waiting.any():
                    return
                raise RuntimeError("deadlock")
            if self.schedule is not None:  # one warp of each block at a time, until it waits or ends
                w = np.where(runnable, self.warp_in_cta, self.nw if self.schedule == "first" else -1).reshape(
                    -1, threads
                )
                chosen = w.min(axis=1) if self.schedule == "first" else w.max(axis=1)
                runnable &= self.warp_in_cta == np.repeat(chosen, threads)
            b = int(pc[runnable].min())
            here = runnable & (pc == b)
            everyone = bool(here.all())
            mask = None if everyone else here
            if b >= last:
                pc[here] = -1
                continue
            self.machine.executed[b] += int(here.reshape(-1, 32).any(axis=1).sum()) if n % 32 == 0 else 0
            end = self.machine.compile(b)(self, R, mask)
            if end is None:
                pc[here] = b + 1
            elif end[0] in ("bar", "red"):
                pc[here] = b + 1
                waiting |= here
                barrier_at[here] = b
                if end[0] == "red":
                    reds.append((end[1], np.broadcast_to(end[2], (n,)) & here, here, end[3]))
                self._release(pc, waiting, barrier_at, reds, R, end[-1])
            else:
                _, guard, target = end
                if guard is None:
                    pc[here] = target
                else:
                    taken = here & np.broadcast_to(guard, (n,))
                    pc[here] = b + 1
                    pc[taken] = target
            # threads that exit may complete a barrier that others wait at
            if waiting.any() and (pc[here] == -1).any():
                self._release(pc, waiting, barrier_at, reds, R, "exit")
        raise RuntimeError("too many steps")

    def _release(self, pc, waiting, barrier_at, reds, R, where) -> None:
        threads = self.n_threads
        w, gone = waiting.reshape(-1, threads), (pc == -1).reshape(-1, threads)
        ready = (w | gone).all(axis=1) & w.any(axis=1)
        if not ready.any():
            return
        if gone[ready].any():
            self.problems.add(
                "note: barrier after some threads of the block have exited",
                where,
                f"{int(gone[ready].any(axis=1).sum())} blocks",
            )
        at = barrier_at.reshape(-1, threads)
        lo = np.where(w, at, np.iinfo(np.int32).max).min(axis=1)
        hi = np.where(w, at, -1).max(axis=1)
        if (ready & (lo != hi)).any():
            self.problems.add("divergent barrier: threads wait at different instructions", where, "")
        lanes = np.repeat(ready, threads) & waiting
        for register, value, who, op in reds:
            involved = (who & lanes).reshape(-1, threads).any(axis=1)
            v = value.reshape(-1, threads)
            if ".and" in op:
                result = (v | ~who.reshape(-1, threads)).all(axis=1)
            elif ".or" in op:
                result = (v & who.reshape(-1, threads)).any(axis=1)
            else:
                raise UnsupportedError(op)
            R[register] = merge(np.repeat(involved, threads), np.repeat(result, threads), R[register])
        if not (waiting & ~lanes).any():
            reds.clear()
        self.epoch[lanes] += 1
        # everyone of the block is past the barrier, those that exited too
        waiting[lanes] = False
        barrier_at[lanes] = -1


def launch(
    machine: Machine,
    params: bytes,
    grid,
    block_dim,
    shared: int,
    memory: Global,
    problems: Problems,
    lanes_at_once: int = 8192,
    reverse: bool = False,
    schedule: str | None = None,
) -> None:
    """Run every block of a grid."""
    memory.new_launch()
    total = int(np.prod(grid))
    at_once = max(1, lanes_at_once // int(np.prod(block_dim)))
    starts = list(range(0, total, at_once))
    with np.errstate(all="ignore"):
        for start in reversed(starts) if reverse else starts:
            run = Run(
                machine,
                params,
                np.arange(start, min(start + at_once, total)),
                block_dim,
                grid,
                shared,
                memory,
                problems,
            )
            run.schedule = schedule
            run.run()
