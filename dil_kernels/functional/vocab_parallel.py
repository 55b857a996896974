"""A vocabulary split over processes, as the public functions meet it: who has which part, and checks made together.

What the processes of a group would find out one by one - a label out of range, shapes that do not fit - would leave the
others waiting in a collective. So on the CPU each tells the others how its checks went and what it was given, in one
all-gather of a few numbers before anything is computed. On CUDA, where reading them would wait for the device, they are
compared when a process meets new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dil_kernels.backends import constant_in_graphs
from dil_kernels.checks import has_values, readable
from dil_kernels.ops.vocab_parallel import Shard, gathered
from dil_kernels.options import ScoringOptions

FIRST_USE_SECONDS = 300.0  # how long a process waits for the others of a group when it first uses it
HEADER_NUMBERS = 12
OPTIONS = "options"
OWN_OPTIONS = ("backend", "process_group", "inplace_backward", "stash_bytes", "max_scored_tokens")  # may differ
_met: set[str] = set()  # names of groups whose processes have found each other
_compared: set[tuple[Any, ...]] = set()  # what was found to be the same everywhere, on CUDA


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module may not be imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Any:
    """What this process has of a tensor, or None."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def check_whole(name: str, tensor: Any) -> None:
    """A tensor that every process has whole, if it is a DTensor."""
    if is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements):
        raise TypeError(
            f"{name} is a DTensor with placements {tuple(tensor.placements)}; every process must have all of it"
        )


def group_of(process_group: Any, split: Mapping[str, tuple[Any, int]]) -> Any:
    """The process group over which a vocabulary is split; None if it is not.

    Args:
        process_group: that the caller gave.
        split: tensors, or None, by name, each with its dimension of the vocabulary.

    Raises:
        TypeError: process_group is none; a DTensor is split otherwise.
        ValueError: the tensors say different groups.
    """
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup of which this process is a member, got "
            f"{type(process_group).__name__}"
        )
    groups = {"process_group": process_group}
    groups |= {name: _group_of_dtensor(name, x, dim) for name, (x, dim) in split.items() if is_dtensor(x)}
    named = {name: group for name, group in groups.items() if group is not None}
    if len({group.group_name for group in named.values()}) > 1:
        raise ValueError(f"{' and '.join(named)} say different process groups for one vocabulary")
    return next(iter(named.values()), None)


def _group_of_dtensor(name: str, tensor: Any, dim: int) -> Any:
    over = [number for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    placement: Any = tensor.placements[over[0]] if len(over) == 1 else None
    if type(placement).__name__ != "Shard" or placement.dim % tensor.ndim != dim % tensor.ndim:
        raise TypeError(
            f"{name} is a DTensor with placements {tuple(tensor.placements)}; over one dimension of its mesh it must "
            f"be Shard({dim}), the vocabulary, and Replicate() over all others"
        )
    return tensor.device_mesh.get_group(over[0])


@constant_in_graphs
def _place_in(group_name: str) -> tuple[int, int]:
    """Rank of this process in a group, and how many there are."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    return group.rank(), group.size()


class Checks:
    """What the checks of one call have found on this process.

    Args:
        process_group: over which the vocabulary is split; None if it is not.
        options: of scoring.
        statistics: whether they are asked for.

    Attributes:
        group: name of the process group; None for a vocabulary that is not split.
    """

    def __init__(self, process_group: Any, options: ScoringOptions, statistics: bool) -> None:
        self.group: str | None = None if process_group is None else process_group.group_name
        self.options, self._statistics = options, statistics
        self.numbers: dict[str, int] = {}
        self.fingerprint = 0
        self._part: Tensor | None = None
        self._entries = 0
        self._known: tuple[int, int] | None = None  # offset and total

    def _shared_options(self) -> str:
        """Options that must be the same on all processes, as text, in which 1 is 1.0 and true."""
        names = [name for name in self.options.__dataclass_fields__ if name not in OWN_OPTIONS]
        values = {name: getattr(self.options, name) for name in names} | {"return_statistics": self._statistics}
        whole = {name: int(value) for name, value in values.items() if value is not None and value == int(value)}
        return ", ".join(f"{name}={value}" for name, value in (values | whole).items())

    def found(self, part: Tensor, whole: Any, dim: int, labels: Tensor, **numbers: int) -> None:
        """What was given here, after the checks that each process can make alone.

        Args:
            part: of weight or logits.
            whole: the DTensor that it is of, else the same.
            dim: of the vocabulary.
            labels: of scored positions [...].
            numbers: by names for errors; they must be the same on all processes.

        Raises:
            ValueError: not the entries that a DTensor has here.
        """
        if self.group is None:
            return
        self._part, self._entries, self.numbers = part, part.shape[dim], numbers
        if not torch.compiler.is_compiling():
            self.numbers[OPTIONS] = zlib.crc32(self._shared_options().encode())
        if is_dtensor(whole):
            rank, processes = _place_in(self.group)
            chunk = -(-whole.shape[dim] // processes)
            self._known = rank * chunk, whole.shape[dim]
            if self._entries != min(chunk, max(0, whole.shape[dim] - rank * chunk)):
                raise ValueError(
                    f"the DTensor {list(whole.shape)} has not the usual parts, but {list(part.shape)} here"
                )
        if readable(labels):
            scored = labels[labels != self.options.ignore_index]
            least, most = (int(x) for x in scored.aminmax()) if scored.numel() else (0, 0)
            of_labels = {
                "the least label": least,
                "the largest label": most,
                "the sum of the labels": int(scored.sum()),
            }
            self.numbers |= {"the number of scored positions": scored.numel(), **of_labels}
            self.fingerprint = _fingerprint(part.detach().movedim(dim, 0).flatten(1)[:, 0])

    def shard(self) -> Shard | None:
        """The part of this process; None for a vocabulary that is not split."""
        if self.group is None:
            return None
        assert self._part is not None
        if self._known is not None:
            return Shard(self.group, self._entries, *self._known)
        # Sizes go around on the device: where a part begins is known there, and nobody waits.
        rank, processes = _place_in(self.group)
        eager = has_values(self._part)
        header = (self._entries, self.fingerprint, *self.numbers.values()) if eager else (self._entries,)
        numbers = [self._part.new_full((), number, dtype=torch.int64) for number in header]
        headers = gathered(torch.stack(numbers), processes, self.group)
        if eager and (self.group, *header) not in _compared:
            self.compare(headers.tolist())
            _compared.add((self.group, *header))
        sizes = headers[:, 0]
        return Shard(self.group, self._entries, sizes[:rank].sum(), sizes.sum())

    def compare(self, headers: list[list[int]]) -> None:
        """Raise where processes were given what does not fit together, on each of them alike.

        Args:
            headers: entries, fingerprint and numbers of every process.

        Raises:
            ValueError: says what differs.
        """
        entries, fingerprints, *columns = zip(*headers, strict=True)
        for name, values in zip(self.numbers, columns, strict=False):
            if len(set(values)) == 1:
                continue
            if name == OPTIONS:
                raise ValueError(
                    f"options must be the same on all processes of process_group, got {self._shared_options()} here "
                    "and others elsewhere"
                )
            by_rank = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"{name} must be the same on all processes of process_group, got {by_rank}")
        if len(set(fingerprints)) < len(fingerprints) and 0 not in fingerprints:
            raise ValueError(
                "processes of process_group have the same entries of the vocabulary; each must have its own part, in "
                "the order of their ranks"
            )
        if self._known is None and self.group is not None:
            rank, _ = _place_in(self.group)
            self._known = sum(entries[:rank]), sum(entries)

    def check_labels(self) -> None:
        """Labels that have been compared, in the range of the whole vocabulary.

        Raises:
            ValueError: one is not.
        """
        assert self._known is not None
        total = self._known[1]
        for name in ("the least label", "the largest label"):
            label = self.numbers.get(name, 0)
            if not 0 <= label < total:
                raise ValueError(
                    f"labels must be in [0, {total}) or ignore_index={self.options.ignore_index}, got {label}"
                )


def _fingerprint(values: Tensor) -> int:
    """Of the first row or column of a part, as a number by which copies are known; 0 if it says nothing."""
    values = values[:64].double()
    if values.numel() < 2 or not bool(values.isfinite().all()) or bool((values == values[0]).all()):
        return 0
    mixed = (values * torch.arange(1, len(values) + 1, dtype=torch.float64).sqrt()).sum()
    return int(mixed.view(torch.int64)) if math.isfinite(float(mixed)) else 0


def checked_together(
    process_group: Any, like: Any, options: ScoringOptions, statistics: bool
) -> contextlib.AbstractContextManager[Checks]:
    """While this is entered, arguments are checked; errors of one process are errors of all.

    Args:
        process_group: over which the vocabulary is split; None if it is not.
        like: a tensor on the device of the computation.
        options: of scoring.
        statistics: whether they are asked for.
    """
    checks = Checks(process_group, options, statistics)
    if process_group is None or torch.compiler.is_compiling():
        return contextlib.nullcontext(checks)
    _meet(process_group)
    if isinstance(like, Tensor) and not readable(local_part(like)):
        return contextlib.nullcontext(checks)
    return _together(checks, process_group)


@contextlib.contextmanager
def _together(checks: Checks, process_group: Any) -> Iterator[Checks]:
    failure: Exception | None = None
    try:
        yield checks
    except Exception as error:
        failure = error
    processes, name = process_group.size(), process_group.group_name
    header = [int(failure is not None), checks._entries, checks.fingerprint, *checks.numbers.values()]
    header += [0] * (HEADER_NUMBERS - len(header))  # a process that failed has found less than the others
    headers = gathered(torch.tensor(header), processes, name).tolist()
    if any(header[0] for header in headers):
        messages: list[Any] = [None] * processes
        torch.distributed.all_gather_object(messages, None if failure is None else str(failure), process_group)
        if failure is not None:
            raise failure
        rank = next(rank for rank, message in enumerate(messages) if message is not None)
        raise ValueError(f"rank {rank} of process_group: {messages[rank]}")
    checks.compare([header[1:] for header in headers])
    checks.check_labels()


def _meet(group: Any) -> None:
    """At the first use of a group, see that all of its processes use it, and not some another one.

    Raises:
        RuntimeError: some have not come within `FIRST_USE_SECONDS`.
    """
    if group.group_name in _met:
        return
    from torch.distributed import distributed_c10d as c10d

    store, ranks = c10d._get_default_store(), torch.distributed.get_process_group_ranks(group)
    store.set(f"dil_kernels/{group.group_name}/{torch.distributed.get_rank()}", "")
    missing = []
    deadline = datetime.timedelta(seconds=FIRST_USE_SECONDS)
    for rank in ranks:
        try:
            store.wait([f"dil_kernels/{group.group_name}/{rank}"], deadline)
        except RuntimeError:  # torch.distributed.DistStoreError is one
            missing.append(rank)
            deadline = datetime.timedelta(milliseconds=10)
    if missing:
        raise RuntimeError(
            f"process_group: rank(s) {', '.join(map(str, missing))} of {len(ranks)} have not used this group within "
            f"{FIRST_USE_SECONDS:g} s; all of its processes must make the same calls with it"
        )
    _met.add(group.group_name)
