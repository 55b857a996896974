"""The records of local files, each with its place."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from dil_kernels.data.columns import (
    COLUMNS,
    KNOWN_COLUMNS,
    UNPAIRED_COLUMNS,
    choose_columns,
    say_lost_nulls,
    say_once,
    without_padding,
)
from dil_kernels.data.json_text import parse_json
from dil_kernels.data.messages import PreferenceDataError
from dil_kernels.data.token_columns import GIVEN_REFERENCE

PLAIN_SUFFIXES = (".json", ".jsonl", ".csv")
FILE_SUFFIXES = (*PLAIN_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in PLAIN_SUFFIXES))
ROWS_PER_CHUNK = 1000
LONGEST_LINE = 2**26  # of JSON, in bytes; of a cell of CSV, in characters
BLANKS = b"\xef\xbb\xbf \t\r\n"

Record = tuple[str, Any]  # its place, and what stands there


def kind_of_file(path: Path) -> str | None:
    """Which of FILE_SUFFIXES a path ends with, in small letters; None if with none of them."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((kind for kind in ("".join(suffixes[-2:]), *suffixes[-1:]) if kind in FILE_SUFFIXES), None)


def check_file(path: Path) -> str:
    """Which of FILE_SUFFIXES a file has.

    Raises:
        PreferenceDataError: none of them, or there is no such file.
    """
    kind = kind_of_file(path)
    if kind is None:
        raise PreferenceDataError(f"{path}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}")
    if not path.is_file():
        raise PreferenceDataError(f"{path}: no such file")
    return kind


def read_file(path: Path) -> Iterator[Record]:
    """Every record of a file of one of FILE_SUFFIXES.

    Raises:
        PreferenceDataError: it is no such file, or broken; names the line or row.
    """
    kind = check_file(path)
    if kind == ".parquet":
        return read_parquet(path, str(path), str(path))
    return read_csv(path, str(path)) if kind.startswith(".csv") else read_json(path, str(path))


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is a .gz.

    Raises:
        PreferenceDataError: it cannot be unpacked.
    """
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as unpacked:
            yield unpacked  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PreferenceDataError(f"{name}: broken gzip file: {error}") from error


def read_json(path: Path, name: str) -> Iterator[Record]:
    """Every record of a JSON file: one a line, an array of them, one object, or an object with one array of them.

    Args:
        path: the file.
        name: what errors call it.
    """
    with _opened(path, name) as file:
        lines = ((line.strip(BLANKS), size) for line, size in _lines(file))
        sized = list(itertools.islice((each for each in lines if each[0]), 2))
    head = [line for line, _ in sized]
    if not head or _is_row(head[0]):
        return _read_json_lines(path, name)
    if sized[0][1] > LONGEST_LINE and [line[:1] for line in head] == [b"{", b"{"]:
        return _read_json_lines(path, name)  # which names the first
    with _opened(path, name) as file:
        text = file.read()
    try:
        value = _parse(text, name, 1)
    except PreferenceDataError:
        # Lines, of which the first is broken: they are named better one by one.
        if not head[0].startswith(b"[") and head[0][-1:] not in b"[{" and (len(head) < 2 or head[1].startswith(b"{")):
            return _read_json_lines(path, name)
        raise
    rows = value if isinstance(value, list) else _rows_within(value, name)
    if rows is None and len(text) > LONGEST_LINE:
        raise _too_long(name, 1, len(text))
    rows = [value] if rows is None else rows
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


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, each with its size; of one that is too long, only its beginning."""
    while line := file.readline(LONGEST_LINE + 1):
        part, size = line, len(line)
        while size > LONGEST_LINE and part[-1:] != b"\n" and (part := file.readline(LONGEST_LINE)):
            size += len(part)
        yield line, size


def _too_long(name: str, line: int, size: int) -> PreferenceDataError:
    return PreferenceDataError(
        f"{name}, line {line}: {size:,} bytes, but a row may have at most {LONGEST_LINE:,}; is a line break missing?"
    )


def _read_json_lines(path: Path, name: str) -> Iterator[Record]:
    with _opened(path, name) as file:
        for number, (line, size) in enumerate(_lines(file), start=1):
            if size > LONGEST_LINE:
                raise _too_long(name, number, size)
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


def read_csv(path: Path, name: str, delimiter: str = ",") -> Iterator[Record]:
    """Every record of a CSV file in UTF-8, whose first line names the columns; every cell is text, as it was written.

    But for `label` and the columns of reference log-probs, which are read as true or false (or 1 or 0) and as numbers.
    An empty cell of a column other than prompt and responses is one without a value.

    Args:
        path: the file.
        name: what errors call it.
        delimiter: between cells.
    """
    csv.field_size_limit(LONGEST_LINE)  # the module's own is 128 KiB
    with _opened(path, name) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True, delimiter=delimiter)
        line = 1
        try:
            columns = next(reader, [])
            if twice := sorted({column for column in columns if columns.count(column) > 1}):
                raise PreferenceDataError(f"{name}: columns of the same name: {', '.join(twice)}")
            line = reader.line_num + 1
            for cells in reader:
                where = f"{name}, line {line}"
                line = reader.line_num + 1
                if not cells:
                    continue  # an empty line
                if len(cells) != len(columns):
                    raise PreferenceDataError(f"{where}: {len(cells)} cells, but the first line has {len(columns)}")
                yield where, {column: _cell(column, text) for column, text in zip(columns, cells, strict=True)}
        except csv.Error as error:
            raise PreferenceDataError(f"{name}, line {line}: broken CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise PreferenceDataError(f"{name}: after line {reader.line_num}: not UTF-8: {error.reason}") from error


def _cell(column: str, text: str) -> Any:
    """The value of a cell; what is not of the kind of its column stays text, for the check of the pair to name."""
    if column in (*COLUMNS, *UNPAIRED_COLUMNS[:-1]):
        return text
    if column == UNPAIRED_COLUMNS[-1]:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text or None)
    if column in GIVEN_REFERENCE and "_" not in text:  # Python's 1_0 is 10
        with contextlib.suppress(ValueError):
            return float(text)
    return text or None


def read_parquet(path: Path, name: str, source: str) -> Iterator[Record]:
    """Every record of a Parquet file, of the columns that are used.

    Args:
        path: the file.
        name: what errors call it.
        source: the set that it is of, which is said to have columns that are not used.
    """
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        columns = choose_columns(
            schema.names,
            _features(schema, name),
            name,
            lambda column: file.iter_batches(batch_size=16, columns=[column]),
            said_of=source,
        )
        number = itertools.count(1)
        said = False
        for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK, columns=columns):
            table = datasets.Dataset(pa.Table.from_batches([batch]))
            if not said:
                said = say_lost_nulls(table.data, source)
            for record in table:
                yield f"{name}, row {next(number)}", without_padding(record, table.features)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PreferenceDataError(f"{name}: broken Parquet file: {error}") from error


def _features(schema: pa.Schema, name: str) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except ValueError as error:  # of maps, say
        raise PreferenceDataError(f"{name}: a column has a type that `datasets` does not know: {error}") from error
