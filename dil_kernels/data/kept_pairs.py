"""Checked pairs in Arrow files: written while the pairs are read, and kept for the next time the same files are.

What is kept is found by the content of the files that were read, how they were read, and the code that checks them. It
is a directory with the pairs and with what was said of them, which appears in one step when it is complete, and stands
in the cache of `datasets` (HF_DATASETS_CACHE), where also the rows are kept that `datasets` makes of the pairs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import xxhash
from datasets.fingerprint import get_temporary_cache_files_directory
from datasets.table import MemoryMappedTable
from datasets.utils import tqdm
from filelock import FileLock

from dil_kernels.data.cache_key import code_key, file_digest
from dil_kernels.data.columns import listening, say_once
from dil_kernels.data.files import ROWS_PER_CHUNK
from dil_kernels.data.json_text import parse_json
from dil_kernels.data.messages import PreferenceDataError
from dil_kernels.data.pair_storage import concatenate_stored, pairs_table, parts_of_pairs, set_source
from dil_kernels.data.pairs import Pair
from dil_kernels.user_cache import make_private, remove_abandoned, scratch_beside
from dil_kernels.wording import describe_error

FORMAT = 1
PAIRS_NAME, ABOUT_NAME = "pairs.arrow", "about.json"
SCRATCH_OF_DATASETS = re.compile(r"tmp\w{8}")

Chunks = Callable[[], Iterator[list[Pair]]]

logger = logging.getLogger(__name__)


class _CannotKeepError(Exception):
    """The directory for what is kept cannot be written."""


def kept_pairs(files: Sequence[Path], source: str, how: Sequence[str], chunks: Chunks) -> datasets.Dataset:
    """The checked pairs of some files, from what was kept of them, or read now and kept.

    They are mapped from the disk: memory does not grow with them. Where they cannot be written, which is said, they
    are held in memory.

    Args:
        files: all that is read.
        source: what messages call them.
        how: what the pairs depend on beside the content of the files.
        chunks: reads and checks them, some at a time.

    Raises:
        PreferenceDataError: as of `chunks`, or a file changed while it was read.
    """
    before = [_stamp(path) for path in files]
    digests = [file_digest(path) for path in files]
    found = [FORMAT, code_key(), source, *how, *digests]
    directory = _directory() / xxhash.xxh3_128_hexdigest(json.dumps(found).encode())

    def check() -> None:
        for path, stamp, digest in zip(files, before, digests, strict=True):
            if not path.exists() or (_stamp(path) != stamp and file_digest(path) != digest):
                raise PreferenceDataError(f"{path}: it changed while it was read; read it again when it is complete")

    with listening() as said, _no_garbage_collection():
        dataset = _load(directory)
        try:
            if dataset is None:
                with _locked(directory):
                    dataset = _load(directory, warn=False)  # which another process may have written meanwhile
                    if dataset is None:
                        _write(directory, chunks, said, check)
                        dataset = _mapped(directory)
        except _CannotKeepError as error:
            say_once(f"{source}: held in memory, since it cannot be kept in {directory.parent}: {error}")
        if dataset is None:
            tables = (pairs_table(pairs, parts_of_pairs(pairs)) for pairs in chunks())
            dataset = concatenate_stored([datasets.Dataset(table) for table in tables])
            check()
    return set_source(dataset, source)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows are trees and leave no cycles; looking for some takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _directory() -> Path:
    if datasets.is_caching_enabled():
        return Path(datasets.config.HF_DATASETS_CACHE) / "dil_kernels"
    return Path(get_temporary_cache_files_directory()) / "dil_kernels"


def _stamp(path: Path) -> tuple[int, ...]:
    """What differs once a file was written to or replaced; it may differ without that, as by a hard link."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


@contextlib.contextmanager
def _keeping() -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
        raise _CannotKeepError(str(error)) from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time."""
    lock = FileLock(directory.with_suffix(".lock"))
    with _keeping():
        make_private(directory.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _load(directory: Path, *, warn: bool = True) -> datasets.Dataset | None:
    """The pairs in a directory, with what was said of them; None where there are none, or, with a warning, broken."""
    try:
        about = parse_json((directory / ABOUT_NAME).read_text())
        digest, notes = about["digest"], [*map(str, about["said"])]
        if file_digest(directory / PAIRS_NAME) != digest:
            raise ValueError("its checksum does not fit")
        dataset = _mapped(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:  # those of Arrow are ValueErrors
        if warn:
            logger.warning("%s cannot be used (%s): the pairs are read again", directory, describe_error(error))
        return None
    for note in notes:
        say_once(note)
    return dataset


def _mapped(directory: Path) -> datasets.Dataset:
    return datasets.Dataset(MemoryMappedTable.from_file(str(directory / PAIRS_NAME)), fingerprint=directory.name)


def _write(directory: Path, chunks: Chunks, said: Mapping[str, None], check: Callable[[], None]) -> None:
    """Write pairs, and what was said of them, into a directory.

    Args:
        directory: what stands there is replaced.
        chunks: of pairs.
        said: gets what is said of them while they are read.
        check: is called when all are read, and may raise.
    """
    scratch = scratch_beside(directory)
    with _keeping():
        _remove_abandoned(directory.parent)
        scratch.mkdir()
    try:
        writer = _PairWriter(scratch / PAIRS_NAME)
        try:
            for pairs in tqdm(chunks(), desc="Reading preference pairs", unit=f" x {ROWS_PER_CHUNK} rows", delay=1):
                with _keeping():
                    writer.write(pairs)
        finally:
            with _keeping():
                writer.close()
        check()
        with _keeping():
            about = {"digest": file_digest(scratch / PAIRS_NAME), "said": list(said)}
            (scratch / ABOUT_NAME).write_text(json.dumps(about))
            shutil.rmtree(directory, ignore_errors=True)
            scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes have left: of this module, and of `datasets` beside pairs that are kept."""
    remove_abandoned(cache)
    for kept in cache.glob("[0-9a-f]*"):
        remove_abandoned(kept, SCRATCH_OF_DATASETS)


class _PairWriter:
    """An Arrow file of pairs, as `datasets` has them.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: frozenset[str] = frozenset()
        self._schema: pa.Schema | None = None
        self._writer: Any = None

    def write(self, pairs: list[Pair]) -> None:
        """Write pairs, at least one, behind those that are there."""
        self._parts |= parts_of_pairs(pairs)
        table = pairs_table(pairs, self._parts)
        if self._schema != table.schema:
            self._widen(table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file, if it has been begun."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._sink:
                writer.close()

    def _widen(self, schema: pa.Schema) -> None:
        """Begin the file, or begin it anew with room for what only later pairs have."""
        self.close()
        earlier = self._path.with_suffix(".earlier")
        if self._schema is not None:
            self._path.rename(earlier)
        self._schema, self._sink = schema, pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)
        if earlier.is_file():
            with pa.OSFile(str(earlier)) as file:
                for batch in pa.ipc.open_stream(file):
                    self._writer.write_table(pa.Table.from_pylist(batch.to_pylist(), schema=schema))
            earlier.unlink()
