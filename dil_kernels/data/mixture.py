"""Several data sets of preference pairs as one, and a part of them held out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from dil_kernels.data.files import ROWS_PER_CHUNK
from dil_kernels.data.loading import load_preference_pairs
from dil_kernels.data.messages import PreferenceDataError
from dil_kernels.data.pair_storage import concatenate_stored, parts_of_columns, set_source, source_of
from dil_kernels.data.pairs import check_form
from dil_kernels.wording import did_you_mean

TEXT_KEYS = ("path", "name", "data_dir", "split")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One data set of a mixture.

    Attributes:
        path: a file, a directory or a name on the hub, as `load_preference_pairs` takes it.
        name, data_dir, data_files, split: likewise.
        fraction: the share of the mixture that it is to be; of all of its data sets or of none.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    split: str = "train"
    fraction: float | None = None


def data_sources(entries: Sequence[Mapping[str, Any]]) -> list[DataSource]:
    """The data sets of a mixture, checked as far as that goes without reading them.

    Args:
        entries: the fields of a `DataSource` by name, of each.

    Raises:
        ValueError: names the entry and the key.
    """
    fields = [field.name for field in dataclasses.fields(DataSource)]
    if not entries:
        raise ValueError("datasets must be a list of at least one data set")
    sources = []
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number} of datasets"
        for key, value in entry.items():
            if key == "columns":
                raise ValueError(f"{where}: columns cannot be chosen; those that are not used are left out")
            if key not in fields:
                nearest = did_you_mean(str(key), fields)
                hint = f"did you mean {nearest!r}?" if nearest in fields else f"it may have {', '.join(fields)}"
                raise ValueError(f"{where}: unknown key {key!r}; {hint}")
            if value is None:
                continue
            if key in TEXT_KEYS and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"{where}: {key} must be text, got {value!r}")
            if key == "fraction" and not _is_positive(value):
                raise ValueError(f"{where}: fraction must be a number above 0, got {value!r}")
        if entry.get("path") is None:
            raise ValueError(f"{where}: path is missing: a file, a directory or a name on the hub")
        sources.append(DataSource(**{key: value for key, value in entry.items() if value is not None}))
    given = [source.fraction is not None for source in sources]
    if any(given) and not all(given):
        raise ValueError(f"entry {given.index(False) + 1} of datasets has no fraction; give it for all of them or none")
    return sources


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def load_mixture(sources: Sequence[DataSource]) -> datasets.Dataset:
    """The pairs of several data sets, one after another.

    Fractions are made to sum to 1. The mixture is the largest in which no data set stands twice: of each, the first
    rows are taken, and of one of them all.

    Raises:
        PreferenceDataError: a data set cannot be read, or their pairs have not one form.
    """
    parts = [
        load_preference_pairs(
            source.path,
            split=source.split,
            name=source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
        )
        for source in sources
    ]
    for source, part in zip(sources[1:], parts[1:], strict=True):
        check_form(part[0], parts[0][0], source.path)
    if sources[0].fraction is not None:
        parts = _in_shares(parts, [source.fraction or 0 for source in sources])
    ends = list(itertools.accumulate(map(len, parts)))
    names = [
        f"{source.path} (rows {end - len(part) + 1} to {end})"
        for source, part, end in zip(sources, parts, ends, strict=True)
    ]
    if len(set(map(parts_of_columns, parts))) > 1:  # rows are made anew, a few at a time
        parts = [
            part.select(range(start, min(start + ROWS_PER_CHUNK, len(part))))
            for part in parts
            for start in range(0, len(part), ROWS_PER_CHUNK)
        ]
    return set_source(concatenate_stored(parts), " + ".join(names))


def _in_shares(parts: list[datasets.Dataset], fractions: list[float]) -> list[datasets.Dataset]:
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    counts = [min(round(weight * total), len(part)) for part, weight in zip(parts, weights, strict=True)]
    if 0 in counts:
        raise PreferenceDataError(
            f"entry {counts.index(0) + 1} of datasets: no row is left by its fraction in a mixture of {total:.0f} rows"
        )
    return [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]


def split_off_test(dataset: datasets.Dataset, size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows, drawn at random.

    Args:
        dataset: checked pairs.
        size: below 1 the share that is held out, else how many rows.
        seed: of the draw.

    Raises:
        PreferenceDataError: none would be left on one of the sides.
    """
    source = source_of(dataset)
    # Of the rows, `datasets` would keep the draw on disk, beside them, and use it again however damaged.
    numbers = datasets.Dataset.from_dict({"row": np.arange(len(dataset))}).with_format("numpy")
    try:
        drawn = numbers.train_test_split(size if size < 1 else int(size), seed=seed)
    except ValueError as error:
        held_out = f"{source}: test_split_size={size:g} of {len(dataset)} rows"
        raise PreferenceDataError(f"{held_out} leaves none to train on") from error
    train, test = (dataset.select(drawn[part]["row"][:]) for part in ("train", "test"))
    return set_source(train, f"the training part of {source}"), set_source(test, f"the held-out part of {source}")
