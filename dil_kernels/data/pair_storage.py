"""Checked pairs as rows of a data set: one type a column, and JSON text for what has no one type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import datasets

from dil_kernels.data.messages import EXTRA, JSON_COLUMNS, has_extra, storable_messages
from dil_kernels.data.token_columns import GIVEN_REFERENCE

_SOURCE = "_dil_kernels_source"  # an attribute, which `datasets` keeps only where the rows stay the same
OPTIONAL = frozenset({*JSON_COLUMNS, EXTRA})  # what only some pairs of a data set may have


def store_pairs(pairs: list[dict[str, Any]]) -> datasets.Dataset:
    """A data set of pairs that `check_pair` has brought into one form."""
    parts = frozenset().union(*map(_parts_of_pair, pairs))
    rows = [storable(pair, parts) for pair in pairs]
    return datasets.Dataset.from_list(rows, features=stored_features(pairs[0], parts))


def concatenate_stored(chunks: list[datasets.Dataset]) -> datasets.Dataset:
    """Data sets of `store_pairs` as one, of which some may lack what is optional."""
    parts = frozenset().union(*map(parts_of_columns, chunks))
    features = stored_features(chunks[0][0], parts)
    return datasets.concatenate_datasets(
        [
            chunk
            if parts_of_columns(chunk) == parts
            else datasets.Dataset.from_list(
                [{name: row.get(name) for name in features} for row in chunk.to_list()], features=features
            )
            for chunk in chunks
        ]
    )


def set_source(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The data set, which from now on says where its rows come from."""
    setattr(dataset, _SOURCE, source)
    return dataset


def source_of(dataset: datasets.Dataset) -> str:
    """Where the rows of a data set come from, in their order; empty if they were reordered, or it is not known."""
    return str(getattr(dataset, _SOURCE, ""))


def parts_of_columns(dataset: datasets.Dataset) -> frozenset[str]:
    """Which optional parts the columns of a data set have room for."""
    found = OPTIONAL & {*dataset.column_names}
    for name, feature in dataset.features.items():
        message = getattr(feature, "feature", None)
        of_messages = name not in JSON_COLUMNS and not isinstance(feature, datasets.Value)
        if of_messages and not (isinstance(message, dict) and message.keys() <= {"role", "content"}):
            found |= {EXTRA}
    return found


def _parts_of_pair(pair: Mapping[str, Any]) -> frozenset[str]:
    messages = [value for name, value in pair.items() if isinstance(value, list) and name not in JSON_COLUMNS]
    return frozenset(pair.keys() & {*JSON_COLUMNS} | ({EXTRA} if any(map(has_extra, messages)) else set()))


def storable(pair: Mapping[str, Any], parts: frozenset[str]) -> dict[str, Any]:
    """A checked pair as a row of a data set that has these optional parts."""
    row = {
        name: storable_messages(value, extra=EXTRA in parts) if isinstance(value, list) else value
        for name, value in pair.items()
        if name not in JSON_COLUMNS
    }
    return row | {
        name: json.dumps(pair[name], default=str) if name in pair else None for name in JSON_COLUMNS if name in parts
    }


def stored_features(pair: Mapping[str, Any], parts: frozenset[str]) -> datasets.Features:
    """The columns of a data set of pairs like this one, with these optional parts."""
    text = datasets.Value("string")
    messages = [{"role": text, "content": text, **({EXTRA: text} if EXTRA in parts else {})}]
    numbers = {"label": datasets.Value("bool"), **dict.fromkeys(GIVEN_REFERENCE, datasets.Value("float32"))}
    columns = {
        name: numbers.get(name, messages if isinstance(value, list) else text)
        for name, value in pair.items()
        if name not in JSON_COLUMNS
    }
    return datasets.Features({**columns, **{name: text for name in JSON_COLUMNS if name in parts}})
