"""Preference pairs and single labelled responses: load them and check every one."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        f"dil_kernels.data needs the extra [train]: pip install 'dil-kernels[train]' ({error})"
    ) from error

from dil_kernels.pairs.messages import (
    JSON_COLUMNS,
    Messages,
    PreferenceDataError,
    check_json_columns,
    check_messages,
    check_unicode,
    split_conversations,
    split_strings,
    without_nulls,
)
from dil_kernels.pairs.pair_storage import (
    GIVEN_REFERENCE,
    concatenate_stored,
    parts_of_columns,
    storable,
    store_pairs,
    stored_features,
)

COLUMNS = ("prompt", "chosen", "rejected")
RESPONSES = COLUMNS[1:]
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
ROWS_PER_CHUNK = 1000

Pair = dict[str, Any]  # prompt, chosen, rejected: strings, or lists of messages; or prompt, completion, label


def load_preference_pairs(source: str | os.PathLike[str], *, split: str = "train") -> datasets.Dataset:
    """Load preference pairs and check every one of them.

    A pair is three strings, or three lists of ``{"role", "content"}`` messages, of which a response begins and ends
    with the assistant's. All that follows the prompt is the response, the messages of tools and users within it
    included. Where ``prompt`` is missing, it is what chosen and rejected share at their beginning: messages, or whole
    lines and words of strings. A string for a prompt may stand beside such conversations; with responses of one
    message, it is the user's message.

    Messages may have other keys, such as ``tool_calls``, and pairs of messages the columns ``tools`` (JSON schemas) and
    ``chat_template_kwargs``: the chat template gets them. In the data set they are JSON text, see
    `dil_kernels.pairs.messages`. ``ref_chosen_logps`` and ``ref_rejected_logps`` (``ref_logps``) are sums over the
    tokens of a response, which `DILTrainer` uses with precomputed references.

    Responses that do not come in pairs have the columns ``prompt``, ``completion`` and ``label`` instead, as TRL's KTO
    has them: a completion is what chosen and rejected are above, its label true where it is to be imitated.

    Args:
        source: a local .jsonl, .json (JSON Lines or one array) or .parquet file; or what `datasets.load_dataset` takes:
            a name on the hub, or a directory.
        split: the split to take from a hub data set or a directory; a local file has only "train".

    Returns:
        A data set with the columns prompt, chosen and rejected (or prompt, completion and label), all strings or all
        lists of messages, in the order of the source, and those named above. Other columns are dropped.

    Raises:
        PreferenceDataError: the source cannot be read, or a pair is broken.
    """
    path = Path(source)
    if path.is_file() or path.suffix.lower() in FILE_SUFFIXES:
        if split != "train":
            raise PreferenceDataError(f"{path}: a local file has only the split 'train', not {split!r}")
        return _checked_records(_read_file(path), str(path))
    try:
        dataset = datasets.load_dataset(str(source), split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PreferenceDataError(
            f"{source}: not a local file, and loading it as a data set failed: {error}"
        ) from error
    return _checked_dataset(dataset, str(source))


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record of a local file, with its place."""
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise PreferenceDataError(f"{path}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}")
    if not path.is_file():
        raise PreferenceDataError(f"{path}: no such file")
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".json" and _starts_with_array(path):
        return _read_json_array(path)
    return _read_json_lines(path)


def _starts_with_array(path: Path) -> bool:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return first.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse_json(line.rstrip(b"\r\n"), path, number)


def _read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(_parse_json(path.read_bytes(), path, 1), start=1):
        yield f"{path}, row {number}", record


def _parse_json(text: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {first_line + error.lineno - 1}"
        raise PreferenceDataError(f"{where}: broken JSON at character {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise PreferenceDataError(f"{path}, line {line}: not UTF-8: {error.reason}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        columns = _kept_columns(file.schema_arrow.names)
        number = itertools.count(1)
        for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK, columns=columns):
            for record in batch.to_pylist():
                yield f"{path}, row {next(number)}", without_nulls(record)
    except (pa.ArrowException, OSError) as error:
        raise PreferenceDataError(f"{path}: broken Parquet file: {error}") from error


def _checked_records(records: Iterator[tuple[str, Any]], source: str) -> datasets.Dataset:
    """The checked pairs; only one chunk of them exists as Python objects at a time."""
    chunks: list[datasets.Dataset] = []
    first: Pair | None = None
    while chunk := list(itertools.islice(records, ROWS_PER_CHUNK)):
        pairs = []
        for where, record in chunk:
            pairs.append(check_pair(record, where, first))
            first = first or pairs[0]
        chunks.append(store_pairs(pairs))
    if not chunks:
        raise PreferenceDataError(f"{source}: holds no preference pair")
    return concatenate_stored(chunks)


def _checked_dataset(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The checked pairs of a data set that `datasets` keeps on disk."""
    if len(dataset) == 0:
        raise PreferenceDataError(f"{source}: holds no preference pair")
    dataset = dataset.select_columns(_kept_columns(dataset.column_names))
    first = check_pair(without_nulls(dataset[0]), f"{source}, row 1")
    parts = parts_of_columns(dataset)
    return dataset.map(
        lambda record, index: storable(check_pair(without_nulls(record), f"{source}, row {index + 1}", first), parts),
        with_indices=True,
        features=stored_features(first, parts),
        desc="Checking preference pairs",
    )


def _kept_columns(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in (*COLUMNS, *UNPAIRED_COLUMNS, *JSON_COLUMNS, *GIVEN_REFERENCE)]


def response_columns(pair: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that hold the responses: chosen and rejected, or completion alone."""
    return ("completion",) if "completion" in pair and "chosen" not in pair else RESPONSES


def is_conversational(pair: Pair) -> bool:
    """Whether a checked pair is lists of messages rather than strings."""
    return not isinstance(pair["prompt"], str)


def check_pair(record: Any, where: str, like: Pair | None = None) -> Pair:
    """Check one pair, or one labelled response, and bring it into one of the two forms.

    Args:
        record: what stood in the data.
        where: its place, for the message.
        like: a checked one of the same data, whose form this one must have.

    Returns:
        prompt, chosen and rejected, or prompt, completion and label: strings, or lists of messages.

    Raises:
        PreferenceDataError: the record is broken.
    """
    if not isinstance(record, Mapping):
        raise PreferenceDataError(f"{where}: expected an object with {', '.join(COLUMNS)}, got {type(record).__name__}")
    columns = response_columns({name: value for name, value in record.items() if value is not None})
    for column in columns:
        _require(record, column, where)
    is_text = any(isinstance(record[column], str) for column in columns)
    pair = (_check_strings if is_text else _check_conversation)(record, where, columns)
    if columns == ("completion",):
        pair["label"] = _check_label(record, where)
    pair |= {name: _check_number(record[name], where, name) for name in GIVEN_REFERENCE if record.get(name) is not None}
    if like is not None:
        _check_form(pair, like, where)
    options = check_json_columns(record, where)
    if is_text and options:
        raise PreferenceDataError(
            f"{where}, column {next(iter(options))!r}: only conversations go through a chat template, but these are "
            "strings"
        )
    return pair | options


def _check_form(pair: Pair, like: Pair, where: str) -> None:
    """Refuse a pair that has other columns, or another kind of columns, than one before it."""
    forms = [[name for name in form if name not in JSON_COLUMNS] for form in (pair, like)]
    if {*forms[0]} != {*forms[1]}:
        names = (", ".join(form) for form in forms)
        raise PreferenceDataError("{}: this record has {}, but those before it have {}".format(where, *names))
    if is_conversational(like) != is_conversational(pair):
        what, strings = ("response", "strings") if "completion" in pair else ("pair", "three strings")
        kinds = (strings, "lists of messages")
        raise PreferenceDataError(
            f"{where}: this {what} is {kinds[is_conversational(pair)]}, but those before it are "
            f"{kinds[is_conversational(like)]}"
        )


def _check_label(record: Mapping[str, Any], where: str) -> bool:
    _require(record, "label", where)
    if not isinstance(record["label"], bool):
        kind = type(record["label"]).__name__
        raise PreferenceDataError(f"{where}, column 'label': expected true or false, got {kind}")
    return record["label"]


def _check_number(value: Any, where: str, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PreferenceDataError(
            f"{where}, column {column!r}: expected a number, the sum of log-probs, got {value!r:.40}"
        )
    return float(value)


def _require(record: Mapping[str, Any], column: str, where: str) -> None:
    if record.get(column) is None:
        found = ", ".join(name for name, value in record.items() if value is not None) or "none"
        raise PreferenceDataError(f"{where}: column {column!r} is missing (columns with a value: {found})")


def _check_text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise PreferenceDataError(f"{where}, column {column!r}: expected a string, got {type(value).__name__}")
    check_unicode(value, f"{where}, column {column!r}")
    if column != "prompt":
        _check_filled(value, where, column)
    return value


def _check_filled(response: str, where: str, column: str) -> None:
    if not response.strip():
        raise PreferenceDataError(f"{where}, column {column!r}: the response is empty")


def _check_strings(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> Pair:
    texts = {column: _check_text(record[column], where, column) for column in columns}
    if record.get("prompt") is None and columns == RESPONSES:
        return dict(zip(COLUMNS, split_strings(texts["chosen"], texts["rejected"], where), strict=True))
    _require(record, "prompt", where)
    return {"prompt": _check_text(record["prompt"], where, "prompt"), **texts}


def _check_conversation(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> Pair:
    prompt = record.get("prompt")
    responses = {column: _check_response(record[column], where, column) for column in columns}
    if prompt is None or isinstance(prompt, str):
        prompt = None if prompt is None else _check_text(prompt, where, "prompt")
        return split_conversations(prompt, responses, where)
    for column, messages in responses.items():
        if messages[0]["role"] != "assistant":
            raise PreferenceDataError(
                f"{where}, column {column!r}: beside a prompt of messages, the response must begin with the "
                f"assistant's message, not {messages[0]['role']!r}; leave the prompt column out if the responses hold "
                "the whole conversation"
            )
    return {"prompt": check_messages(prompt, where, "prompt"), **responses}


def _check_response(value: Any, where: str, column: str) -> Messages:
    messages = check_messages(value, where, column)
    last = messages[-1]
    if last["role"] != "assistant":
        raise PreferenceDataError(
            f"{where}, column {column!r}: the last message is not the assistant's, but {last['role']!r}"
        )
    if not last.get("tool_calls"):
        _check_filled(last["content"], where, column)
    return messages
