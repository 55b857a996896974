"""The records of local files, each with its place."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from dil_kernels.pairs.columns import KNOWN_COLUMNS, choose_columns, say_lost_nulls, say_once, without_padding
from dil_kernels.pairs.json_text import parse_json
from dil_kernels.pairs.messages import PreferenceDataError

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
ROWS_PER_CHUNK = 1000
BLANKS = b"\xef\xbb\xbf \t\r\n"

Record = tuple[str, Any]  # its place, and what stands there


def read_file(path: Path) -> Iterator[Record]:
    """Every record of a file of one of FILE_SUFFIXES.

    Raises:
        PreferenceDataError: it is no such file, or broken; names the line or row.
    """
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise PreferenceDataError(f"{path}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}")
    if not path.is_file():
        raise PreferenceDataError(f"{path}: no such file")
    return _read_parquet(path) if suffix == ".parquet" else read_json(path, str(path))


def read_json(path: Path, name: str) -> Iterator[Record]:
    """Every record of a JSON file: one a line, an array of them, one object, or an object with one array of them.

    Args:
        path: the file.
        name: what errors call it.
    """
    with path.open("rb") as file:
        head = list(itertools.islice((line.strip(BLANKS) for line in file if line.strip(BLANKS)), 2))
    if not head or _is_row(head[0]):
        return _read_json_lines(path, name)
    try:
        value = _parse(path.read_bytes(), name, 1)
    except PreferenceDataError:
        # Lines, of which the first is broken: they are named better one by one.
        if not head[0].startswith(b"[") and head[0][-1:] not in b"[{" and (len(head) < 2 or head[1].startswith(b"{")):
            return _read_json_lines(path, name)
        raise
    rows = value if isinstance(value, list) else _rows_within(value, name) or [value]
    return ((f"{name}, row {number}", record) for number, record in enumerate(rows, start=1))


def _is_row(line: bytes) -> bool:
    """Whether a line is an object by itself, and no array of rows within one."""
    try:
        value = parse_json(line)
    except ValueError:
        return False
    return isinstance(value, dict) and _array_of_rows(value) is None


def _array_of_rows(value: dict[str, Any]) -> str | None:
    """The key under which an object that is no row itself has an array of rows."""
    arrays = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return arrays[0] if len(arrays) == 1 and not KNOWN_COLUMNS & value.keys() else None


def _rows_within(value: Any, name: str) -> list[Any] | None:
    key = _array_of_rows(value) if isinstance(value, dict) else None
    if key is None:
        return None
    if others := ", ".join(map(repr, value.keys() - {key})):
        say_once(f"{name}: the rows are those of {key!r}; not used: {others}")
    return value[key]


def _read_json_lines(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name}, line {number}", _parse(line.rstrip(b"\r\n"), name, number)


def _parse(text: bytes, name: str, first_line: int) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        where = f"{name}, line {first_line + error.lineno - 1}"
        raise PreferenceDataError(f"{where}: broken JSON at character {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise PreferenceDataError(f"{name}, line {line}: not UTF-8: {error.reason}") from error
    except ValueError as error:
        where = name if b"\n" in text else f"{name}, line {first_line}"
        raise PreferenceDataError(f"{where}: {error}") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        columns = choose_columns(
            schema.names,
            datasets.Features.from_arrow_schema(schema),
            str(path),
            lambda column: file.iter_batches(batch_size=16, columns=[column]),
        )
        number = itertools.count(1)
        said = False
        for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK, columns=columns):
            table = datasets.Dataset(pa.Table.from_batches([batch]))
            if not said:
                said = say_lost_nulls(table.data, str(path))
            for record in table:
                yield f"{path}, row {next(number)}", without_padding(record, table.features)
    except (pa.ArrowException, OSError) as error:
        raise PreferenceDataError(f"{path}: broken Parquet file: {error}") from error
