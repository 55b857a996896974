"""The columns of preference data: which are used, which are refused, and what Arrow has put into them."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from dil_kernels.data.messages import JSON_COLUMNS, MEDIA, PreferenceDataError
from dil_kernels.data.token_columns import GIVEN_REFERENCE, REF_COLUMNS, UNPAIRED_REF_COLUMNS

COLUMNS = ("prompt", "chosen", "rejected")
RESPONSES = COLUMNS[1:]
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
KNOWN_COLUMNS = frozenset({*COLUMNS, *UNPAIRED_COLUMNS, *JSON_COLUMNS, *GIVEN_REFERENCE})
MEDIA_FEATURES = frozenset({"Image", "Video", "Audio"})

_heard: contextvars.ContextVar[dict[str, None] | None] = contextvars.ContextVar("heard", default=None)

logger = logging.getLogger(__name__)


def response_columns(names: Container[str]) -> tuple[str, ...]:
    """Of the columns of pairs or of responses that come without one, those that hold the responses."""
    return ("completion",) if "completion" in names and "chosen" not in names else RESPONSES


def choose_columns(
    names: Sequence[str],
    features: Mapping[str, Any],
    source: str,
    batches: Callable[[str], Iterable[Any]],
    said_of: str | None = None,
) -> list[str]:
    """The columns of a table that are used; says in one line which are not.

    Args:
        names: of all columns.
        features: of `datasets`, by column.
        source: of the table, for messages; empty if it is not known.
        batches: gives the rows of a column, as Arrow tables or record batches.
        said_of: what is said to have the columns that are not used, where it is not `source`.

    Raises:
        PreferenceDataError: a column that is needed is missing, stands twice, or holds images or sound.
    """
    prefix = f"{source}: " if source else ""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PreferenceDataError(f"{prefix}columns of the same name: {', '.join(twice)}")
    for name in names:
        if (name in MEDIA or _is_media(features[name])) and any(
            map(holds_value, (row for batch in batches(name) for row in batch.column(name).to_pylist()))
        ):
            raise media_error(name, prefix)
    if {"completion", "chosen"} <= {*names} and all(
        batch.column("chosen").null_count == batch.num_rows for batch in batches("chosen")
    ):  # of a table with room for both forms
        names = [name for name in names if name != "chosen"]
    for name in response_columns(names):
        if name not in names:
            raise PreferenceDataError(f"{prefix}column {name!r} is missing (columns: {', '.join(names)})")
    unused = unused_columns(names)
    say_unused(unused, source if said_of is None else said_of)
    return [name for name in names if name not in unused]


def unused_columns(names: Iterable[str]) -> list[str]:
    """Those of some columns that nothing is made of, in their order."""
    names = list(names)
    of_pairs = response_columns(names) == RESPONSES
    form = (*COLUMNS, *REF_COLUMNS) if of_pairs else (*UNPAIRED_COLUMNS, *UNPAIRED_REF_COLUMNS)
    return [name for name in names if name not in (*form, *JSON_COLUMNS)]


def say_unused(names: Sequence[str], source: str) -> None:
    """Say which columns are not used, if any."""
    if names:
        say_once(f"{source or 'the data'}: not used: column{'s' * (len(names) > 1)} {', '.join(map(repr, names))}")


def say_once(message: str) -> None:
    """Warn of something in the data, on the first of several processes."""
    if (heard := _heard.get()) is not None:
        if message in heard:
            return
        heard[message] = None
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


@contextlib.contextmanager
def listening() -> Iterator[dict[str, None]]:
    """What `say_once` is given, in its order; within, it says nothing twice."""
    heard: dict[str, None] = {}
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def media_error(name: str, prefix: str) -> PreferenceDataError:
    """What is said of a column that the training would be blind to."""
    return PreferenceDataError(
        f"{prefix}column {name!r} has images, video or sound, of which training sees nothing: it is of text alone; "
        "remove the column if the text is meant to stand by itself"
    )


def holds_value(value: Any) -> bool:
    """Whether there is anything in a value: not None, an empty text, or a list or an object of such."""
    if isinstance(value, Mapping):
        return any(map(holds_value, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_value, value))
    return value is not None and value not in ("", b"")


def _is_media(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)  # of a list
    return type(feature).__name__ in MEDIA_FEATURES or (inner is not None and _is_media(inner))


def without_padding(value: Any, feature: Any) -> Any:
    """A value read from a table, without the keys that Arrow adds as null where another row has them.

    Only objects that Arrow keeps as structs have such keys; a null in a `datasets.Json` column is the user's.

    Args:
        value: as `datasets` decodes it.
        feature: its type; a mapping of types for an object.
    """
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {key: without_padding(item, feature.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_padding(item, inner) for item in value]
    return value


def say_lost_nulls(table: Any, source: str) -> bool:
    """Say where nulls stand in tools or tool calls, which may have been the user's; whether there are any."""
    for name in table.column_names:
        if name in KNOWN_COLUMNS:
            path = _null_in_object(table.column(name), name, inside=name in JSON_COLUMNS)
            if path is not None:
                say_once(
                    f"{source or 'the data'}: nulls at {path} are left out: Arrow gives every object the keys of all "
                    "rows, and does not tell a null that was written from a key that was not; JSON text and Json() "
                    "columns keep them"
                )
                return True
    return False


def _null_in_object(values: Any, path: str, *, inside: bool) -> str | None:
    """The first key that is null in an object within a message (`inside`), or within tools."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _null_in_object(pc.list_flatten(values), path, inside=inside)
    if not pa.types.is_struct(values.type):
        return None
    for field in values.type:
        held = pc.struct_field(values, field.name)
        if inside and held.null_count > values.null_count:
            return f"{path}.{field.name}"
        if (inside or field.name != "content") and (
            found := _null_in_object(held, f"{path}.{field.name}", inside=True)
        ):
            return found
    return None
