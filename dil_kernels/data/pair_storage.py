"""Checked pairs as rows of a data set: one type a column, and JSON text for what has no one type."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from dil_kernels.data.messages import EXTRA, JSON_COLUMNS, has_extra, storable_messages, stored_extra
from dil_kernels.data.token_columns import GIVEN_REFERENCE

_SOURCE = "_dil_kernels_source"  # an attribute, which `datasets` keeps only where the rows stay the same
OPTIONAL = frozenset({*JSON_COLUMNS, EXTRA})  # what only some pairs of a data set may have


def pairs_table(pairs: list[dict[str, Any]], parts: frozenset[str]) -> pa.Table:
    """A table, with these optional parts, of pairs that `check_pair` has brought into one form."""
    schema = stored_features(pairs[0], parts).arrow_schema
    return pa.Table.from_arrays([_column(pairs, field) for field in schema], schema=schema)


def _column(pairs: list[dict[str, Any]], field: pa.Field) -> pa.Array:
    if field.name in JSON_COLUMNS:
        return pa.array([stored_json(pair, field.name) for pair in pairs], field.type)
    if not pa.types.is_list(field.type):
        return pa.array([pair[field.name] for pair in pairs], field.type)
    lists = [pair[field.name] for pair in pairs]
    messages = [message for each in lists for message in each]
    texts = {
        "role": [message["role"] for message in messages],
        "content": [message["content"] for message in messages],
    }
    struct = field.type.value_type
    if struct.get_field_index(EXTRA) >= 0:
        texts[EXTRA] = [stored_extra(message) for message in messages]
    values = pa.StructArray.from_arrays([pa.array(texts[part.name], part.type) for part in struct], fields=list(struct))
    ends = itertools.accumulate(map(len, lists), initial=0)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, type=field.type)


def concatenate_stored(chunks: list[datasets.Dataset]) -> datasets.Dataset:
    """Data sets of checked pairs as one, of which some may lack what is optional."""
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


def parts_of_pairs(pairs: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Which optional parts checked pairs of one form have."""
    found = {name for name in JSON_COLUMNS if any(name in pair for pair in pairs)}
    columns = [name for name, value in pairs[0].items() if isinstance(value, list) and name not in JSON_COLUMNS]
    if any(has_extra(itertools.chain.from_iterable([pair[name] for pair in pairs])) for name in columns):
        found.add(EXTRA)
    return frozenset(found)


def storable(pair: Mapping[str, Any], parts: frozenset[str]) -> dict[str, Any]:
    """A checked pair as a row of a data set that has these optional parts."""
    row = {
        name: storable_messages(value, extra=EXTRA in parts) if isinstance(value, list) else value
        for name, value in pair.items()
        if name not in JSON_COLUMNS
    }
    return row | {name: stored_json(pair, name) for name in JSON_COLUMNS if name in parts}


def stored_json(pair: Mapping[str, Any], name: str) -> str | None:
    """Tools or template options of a checked pair as a column holds them."""
    return json.dumps(pair[name], default=str) if name in pair else None


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
