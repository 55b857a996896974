"""Rows that `datasets` keeps on disk: used again only as they were written, of which it does not look itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from dil_kernels.data.cache_key import file_digest
from dil_kernels.data.columns import say_once
from dil_kernels.wording import describe_error

logger = logging.getLogger(__name__)


def kept_rows(make: Callable[..., datasets.Dataset], source: str) -> datasets.Dataset:
    """The rows of a `datasets.Dataset.map`, made again, with a warning, where a file that is kept of them is damaged.

    Where they cannot be kept, which is said, they are held in memory.

    Args:
        make: maps; takes `load_from_cache_file` and `keep_in_memory` of `datasets.Dataset.map`.
        source: what messages call the data; empty if that is not known.
    """
    try:
        return _whole(make)
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        say_once(
            f"{source or 'the data'}: rows are held in memory, since they cannot be kept on disk: "
            f"{describe_error(error)}"
        )
    return make(load_from_cache_file=False, keep_in_memory=True)


def _whole(make: Callable[..., datasets.Dataset]) -> datasets.Dataset:
    problem: object = None
    try:
        rows = make(load_from_cache_file=datasets.is_caching_enabled())
        problem = next((path for path in _files(rows) if _is_damaged(path)), None)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        problem = error
    if problem is not None:
        logger.warning("rows that were kept cannot be used (%s): they are made again", problem)
        rows = make(load_from_cache_file=False)
    for path in _files(rows):
        if problem is not None or not _digest_of(path).exists():
            with contextlib.suppress(OSError):  # on a full disk they are not checked next time
                _digest_of(path).write_text(file_digest(path))
    return rows


def _files(rows: datasets.Dataset) -> list[Path]:
    return [Path(file["filename"]) for file in rows.cache_files]


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.digest")


def _is_damaged(path: Path) -> bool:
    try:
        return _digest_of(path).read_text() != file_digest(path)
    except FileNotFoundError:
        return False  # just made
