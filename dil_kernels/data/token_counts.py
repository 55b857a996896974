"""How many token ids the rows of a tokenised data set have, read from its columns without making Python objects."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash
from numpy.typing import NDArray

from dil_kernels.data.token_columns import TOKEN_COLUMNS, UNPAIRED_TOKEN_COLUMNS, is_unpaired

ROWS_PER_BATCH = 10_000


def response_id_columns(dataset: datasets.Dataset) -> tuple[str, ...]:
    """The columns of a tokenised data set that hold the responses."""
    return UNPAIRED_TOKEN_COLUMNS[1:2] if is_unpaired(dataset.column_names) else TOKEN_COLUMNS[1:]


def token_counts(dataset: datasets.Dataset, name: str) -> NDArray[np.int64]:
    """Tokens of every row of a column, [rows]."""
    counts = [lengths for lengths, _ in token_ids(dataset, name)]
    return np.concatenate([np.zeros(0, np.int64), *counts])


def prompt_numbers(dataset: datasets.Dataset) -> NDArray[np.int64]:
    """Which prompt every row has, [rows]: the same number for the same token ids, from 0."""
    numbers: dict[bytes, int] = {}
    found = [
        numbers.setdefault(xxhash.xxh3_128_digest(prompt.tobytes()), len(numbers))
        for lengths, ids in token_ids(dataset, "prompt_ids")
        for prompt in np.split(ids, np.cumsum(lengths)[:-1])
    ]
    return np.array(found, np.int64)


def token_ids(dataset: datasets.Dataset, name: str) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of some rows of a column after others, how many token ids each has, and the token ids one after another."""
    for batch in dataset.select_columns([name]).with_format("arrow").iter(ROWS_PER_BATCH):
        column = batch[name].combine_chunks()
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        yield _int64(pc.list_value_length(column)), _int64(pc.list_flatten(column))


def _int64(values: pa.Array) -> NDArray[np.int64]:
    if values.null_count:
        raise ValueError("a tokenised data set must not have missing token ids")
    array: NDArray[np.int64] = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return array
