"""Rows that `datasets` keeps on disk: used again only as they were written, of which it does not look itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from dil_kernels.data.cache_key import file_digest

logger = logging.getLogger(__name__)


def kept_rows(make: Callable[[bool], datasets.Dataset]) -> datasets.Dataset:
    """The rows of a `datasets.Dataset.map`, made again, with a warning, where a file that is kept of them is damaged.

    Args:
        make: maps; takes `load_from_cache_file`.
    """
    problem: object = None
    try:
        rows = make(datasets.is_caching_enabled())
        problem = next((path for path in _files(rows) if _is_damaged(path)), None)
    except (pa.ArrowException, OSError) as error:
        problem = error
    if problem is not None:
        logger.warning("rows that were kept cannot be used (%s): they are made again", problem)
        rows = make(False)
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
