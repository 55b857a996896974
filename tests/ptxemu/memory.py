"""Memory of the emulated device: registered host buffers, shared and local memory, with checks on every access.

Checked: bounds (of the allocation, and of the elements that the tensor argument names), alignment to the whole
vector, reads of shared memory that nobody wrote, and races: accesses of two warps of a block to the same bytes without
a barrier between them, and of two blocks in one launch, at least one of them a plain store.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Problem:
    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.detail}"


class Problems:
    def __init__(self) -> None:
        self.items: list[Problem] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, where: str, detail: str) -> None:
        self.counts[kind, where] += 1
        if self.counts[kind, where] <= 2:
            self.items.append(Problem(kind, where, detail))

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.counts}


class Shadow:
    """Who last read and wrote each granule, to find races. Warps are numbered over the grid."""

    def __init__(self, granules: int, warps_per_cta: int) -> None:
        self.nw = warps_per_cta
        self.w_warp = np.full(granules, -1, np.int32)
        self.w_epoch = np.full(granules, -1, np.int32)
        self.r_min = np.full(granules, -1, np.int32)
        self.r_max = np.full(granules, -1, np.int32)
        self.r_epoch = np.full(granules, -1, np.int32)
        self.rc_min = np.full(granules, np.iinfo(np.int32).max, np.int32)
        self.rc_max = np.full(granules, -1, np.int32)

    def read(self, g, warp, epoch, cross_cta: bool):
        """Granules g, one for each access. Returns a mask of conflicts."""
        w = self.w_warp[g]
        cta = warp // self.nw
        other_cta = w // self.nw != cta
        bad = (w >= 0) & (w != warp) & np.where(other_cta, cross_cta, self.w_epoch[g] == epoch)
        same = (self.r_epoch[g] == epoch) & (self.r_min[g] // self.nw == cta) & (self.r_min[g] >= 0)
        lo = np.where(same, np.minimum(self.r_min[g], warp), warp)
        hi = np.where(same, np.maximum(self.r_max[g], warp), warp)
        self.r_min[g[::-1]] = lo[::-1]
        self.r_max[g] = hi
        self.r_epoch[g] = epoch
        lo_c, hi_c = np.minimum(self.rc_min[g], cta), np.maximum(self.rc_max[g], cta)
        self.rc_min[g[::-1]] = lo_c[::-1]
        self.rc_max[g] = hi_c
        return bad

    def write(self, g, warp, epoch, cross_cta: bool):
        """Returns masks of write-write and read-write conflicts."""
        w = self.w_warp[g]
        cta = warp // self.nw
        other_cta = w // self.nw != cta
        waw = (w >= 0) & (w != warp) & np.where(other_cta, cross_cta, self.w_epoch[g] == epoch)
        war = (self.r_epoch[g] == epoch) & (self.r_min[g] >= 0) & (self.r_min[g] // self.nw == cta)
        war &= (self.r_min[g] != warp) | (self.r_max[g] != warp)
        if cross_cta:
            war |= (self.rc_max[g] >= 0) & ((self.rc_min[g] != cta) | (self.rc_max[g] != cta))
        self.w_warp[g] = warp
        self.w_epoch[g] = epoch
        return waw, war


@dataclass
class Region:
    name: str
    base: int
    buffer: np.ndarray  # uint8
    allowed: np.ndarray | None = None  # bool a byte: what the argument names
    writable: bool = True
    views: dict[int, np.ndarray] = field(default_factory=dict)
    shadow: Shadow | None = None
    written: np.ndarray | None = None

    def __post_init__(self) -> None:
        for size, dtype in UINT.items():
            n = self.buffer.size // size * size
            self.views[size] = self.buffer[:n].view(dtype)

    @property
    def end(self) -> int:
        return self.base + self.buffer.size


class Global:
    """Registered buffers at their host addresses."""

    GRANULE = 2

    def __init__(self, problems: Problems, check_races: bool = True) -> None:
        self.problems = problems
        self.regions: list[Region] = []
        self.check_races = check_races

    def add(self, region: Region) -> None:
        for other in self.regions:
            if region.base == other.base and region.buffer.size == other.buffer.size:
                if other.allowed is not None:
                    other.allowed = None if region.allowed is None else other.allowed | region.allowed
                other.name += "=" + region.name
                return
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.base)

    def groups(self, addr: np.ndarray, nbytes: int, where: str, what: str):
        """(region, indices into addr) of accesses within a region; the rest is reported."""
        if addr.size == 0:
            return
        todo = np.ones(addr.size, bool)
        for region in self.regions:
            inside = (addr >= region.base) & (addr < region.end) & todo
            if not inside.any():
                continue
            todo &= ~inside
            over = inside & (addr + nbytes > region.end)
            if over.any():
                i = int(np.flatnonzero(over)[0])
                self.problems.add(
                    "out of bounds",
                    where,
                    f"{what} of {nbytes} bytes at {region.name}+{int(addr[i]) - region.base}"
                    f" of {region.buffer.size}, {int(over.sum())} lanes",
                )
                inside &= ~over
            index = np.flatnonzero(inside)
            if index.size:
                yield region, index
        if todo.any():
            i = int(np.flatnonzero(todo)[0])
            near = min(
                self.regions, key=lambda r: min(abs(int(addr[i]) - r.base), abs(int(addr[i]) - r.end)), default=None
            )
            detail = f"{what} of {nbytes} bytes at {int(addr[i]):#x}, {int(todo.sum())} lanes"
            if near is not None:
                detail += f"; nearest {near.name}+{int(addr[i]) - near.base} of {near.buffer.size}"
            self.problems.add("out of bounds", where, detail)

    def check(self, region: Region, addr: np.ndarray, nbytes: int, where: str, what: str) -> None:
        if region.allowed is not None:
            off = (addr - np.uint64(region.base)).astype(np.int64)
            ok = np.ones(off.size, bool)
            for k in range(0, nbytes, 2) if nbytes > 1 else (0,):
                ok &= region.allowed[off + k]
            if not ok.all():
                i = int(np.flatnonzero(~ok)[0])
                self.problems.add(
                    "outside the tensor",
                    where,
                    f"{what} of {nbytes} bytes at {region.name}+{int(off[i])}, {int((~ok).sum())} lanes",
                )

    def shadow(self, region: Region, warps_per_cta: int) -> Shadow:
        if region.shadow is None:
            region.shadow = Shadow(region.buffer.size // self.GRANULE + 8, warps_per_cta)
        return region.shadow

    def granules(self, region: Region, addr: np.ndarray, nbytes: int):
        off = (addr - np.uint64(region.base)).astype(np.int64) // self.GRANULE
        return [off + k for k in range(max(1, nbytes // self.GRANULE))]

    def load(self, addr, size: int, vec: int, where: str, warp, epoch, nw: int, racy: bool = True) -> list[np.ndarray]:
        nbytes = size * vec
        out = [np.zeros(addr.size, UINT[size]) for _ in range(vec)]
        self.align(addr, nbytes, where, "load")
        for region, index in self.groups(addr, nbytes, where, "load"):
            a = addr[index]
            self.check(region, a, nbytes, where, "load")
            pos = ((a - np.uint64(region.base)) // np.uint64(size)).astype(np.int64)
            for k in range(vec):
                out[k][index] = region.views[size][pos + k]
            if self.check_races and racy:
                shadow = self.shadow(region, nw)
                for g in self.granules(region, a, nbytes):
                    bad = shadow.read(g, warp[index], epoch[index], True)
                    if bad.any():
                        i = int(np.flatnonzero(bad)[0])
                        self.problems.add(
                            "race (read after write)",
                            where,
                            f"{region.name}+{int(g[i]) * self.GRANULE}: warp {int(warp[index][i])} reads what warp "
                            f"{int(shadow.w_warp[g[i]])} wrote, no barrier between; {int(bad.sum())} lanes",
                        )
        return out

    def store(self, addr, values, size: int, where: str, warp, epoch, nw: int) -> None:
        vec = len(values)
        nbytes = size * vec
        self.align(addr, nbytes, where, "store")
        for region, index in self.groups(addr, nbytes, where, "store"):
            a = addr[index]
            self.check(region, a, nbytes, where, "store")
            if not region.writable:
                self.problems.add("store to an input", where, f"{region.name}+{int(a[0]) - region.base}")
            pos = ((a - np.uint64(region.base)) // np.uint64(size)).astype(np.int64)
            if self.check_races:
                shadow = self.shadow(region, nw)
                unique = np.unique(pos)
                if unique.size != pos.size:
                    order = np.argsort(pos, kind="stable")
                    same = pos[order][1:] == pos[order][:-1]
                    differ = np.zeros(same.size, bool)
                    for v in values:
                        differ |= v[index][order][1:] != v[index][order][:-1]
                    if (same & differ).any():
                        self.problems.add("lanes store different values to one address", where, region.name)
                    else:
                        self.problems.add("note: lanes store the same value to one address", where, region.name)
                for g in self.granules(region, a, nbytes):
                    waw, war = shadow.write(g, warp[index], epoch[index], True)
                    for bad, kind in ((waw, "race (write after write)"), (war, "race (write after read)")):
                        if bad.any():
                            i = int(np.flatnonzero(bad)[0])
                            self.problems.add(
                                kind,
                                where,
                                f"{region.name}+{int(g[i]) * self.GRANULE} by warp {int(warp[index][i])}"
                                f", {int(bad.sum())} lanes",
                            )
            for k in range(vec):
                region.views[size][pos + k] = values[k][index]

    def align(self, addr, nbytes: int, where: str, what: str) -> None:
        bad = (addr & np.uint64(nbytes - 1)) != 0
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self.problems.add(
                "misaligned", where, f"{what} of {nbytes} bytes at {int(addr[i]):#x}, {int(bad.sum())} lanes"
            )

    def new_launch(self) -> None:
        for region in self.regions:
            region.shadow = None


class PerOwner:
    """Shared memory of each block, or local memory of each thread: `size` bytes for each owner."""

    def __init__(self, problems: Problems, name: str, owners: int, size: int, warps_per_cta: int, races: bool) -> None:
        self.problems, self.name, self.size = problems, name, size
        self.stride = max(16, -(-size // 16) * 16)
        self.data = np.zeros(owners * self.stride, np.uint8)
        self.init = np.zeros(owners * self.stride, bool)
        self.views = {s: self.data.view(t) for s, t in UINT.items()}
        self.shadow = Shadow(owners * self.stride, warps_per_cta) if races else None

    def _check(self, addr, nbytes, where, what):
        bad = (addr & (nbytes - 1)) != 0
        if bad.any():
            self.problems.add("misaligned", where, f"{what} of {nbytes} bytes of {self.name} at {int(addr[bad][0])}")
        bad = (addr < 0) | (addr + nbytes > self.size)
        if bad.any():
            self.problems.add(
                "out of bounds", where, f"{what} of {nbytes} bytes of {self.name} at {int(addr[bad][0])} of {self.size}"
            )
        return np.clip(addr, 0, self.stride - nbytes) & ~(nbytes - 1)

    def load(self, owner, addr, size, vec, where, warp, epoch):
        nbytes = size * vec
        addr = self._check(addr.astype(np.int64), nbytes, where, "load")
        off = owner * self.stride + addr
        for k in range(nbytes):
            if not self.init[off + k].all():
                self.problems.add(
                    "read of uninitialised memory", where, f"{self.name} at {int(addr[~self.init[off + k]][0]) + k}"
                )
                break
        if self.shadow is not None:
            for k in range(nbytes):
                bad = self.shadow.read(off + k, warp, epoch, False)
                if bad.any():
                    self.problems.add("race (read after write)", where, f"{self.name} at {int(addr[bad][0])}")
                    break
        return [self.views[size][off // size + k] for k in range(vec)]

    def store(self, owner, addr, values, size, where, warp, epoch):
        nbytes = size * len(values)
        addr = self._check(addr.astype(np.int64), nbytes, where, "store")
        off = owner * self.stride + addr
        if np.unique(off).size != off.size:
            order = np.argsort(off, kind="stable")
            same = off[order][1:] == off[order][:-1]
            differ = np.zeros(same.size, bool)
            for v in values:
                differ |= v[order][1:] != v[order][:-1]
            if (same & differ).any():
                self.problems.add("lanes store different values to one address", where, self.name)
        if self.shadow is not None:
            for k in range(nbytes):
                waw, war = self.shadow.write(off + k, warp, epoch, False)
                if waw.any():
                    self.problems.add("race (write after write)", where, f"{self.name} at {int(addr[waw][0])}")
                if war.any():
                    self.problems.add("race (write after read)", where, f"{self.name} at {int(addr[war][0])}")
        for k, v in enumerate(values):
            self.views[size][off // size + k] = v
        for k in range(nbytes):
            self.init[off + k] = True
