"""Preference pairs and single labelled responses: load them and check every one."""

from __future__ import annotations

import itertools
import json
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

COLUMNS = ("prompt", "chosen", "rejected")
RESPONSES = COLUMNS[1:]
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
ROWS_PER_CHUNK = 1000

Messages = list[dict[str, str]]
Pair = dict[str, Any]  # prompt, chosen, rejected: strings, or lists of {role, content}; or prompt, completion, label


class PreferenceDataError(ValueError):
    """Preference data that cannot be trained on; names the file, the line or row (counted from 1) and the column."""


def load_preference_pairs(source: str | os.PathLike[str], *, split: str = "train") -> datasets.Dataset:
    """Load preference pairs and check every one of them.

    A pair is three strings, or three lists of ``{"role", "content"}`` messages, each response one assistant message.
    Where the responses are whole conversations, ``prompt`` may be missing or a string: it is then what both share
    before their last message. A string with responses of one message is the user's message.

    Responses that do not come in pairs have the columns ``prompt``, ``completion`` and ``label`` instead, as TRL's KTO
    has them: a completion is what chosen and rejected are above, its label true where it is to be imitated.

    Args:
        source: a local .jsonl, .json (JSON Lines or one array) or .parquet file; or what `datasets.load_dataset` takes:
            a name on the hub, or a directory.
        split: the split to take from a hub data set or a directory; a local file has only "train".

    Returns:
        A data set with the columns prompt, chosen and rejected (or prompt, completion and label), all strings or all
        lists of messages, in the order of the source. Other columns and other keys of messages are dropped.

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
                yield f"{path}, row {next(number)}", record
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
            first = pairs[-1]
        chunks.append(datasets.Dataset.from_list(pairs, features=_features(pairs[-1])))
    if not chunks:
        raise PreferenceDataError(f"{source}: holds no preference pair")
    return datasets.concatenate_datasets(chunks)


def _checked_dataset(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The checked pairs of a data set that `datasets` keeps on disk."""
    if len(dataset) == 0:
        raise PreferenceDataError(f"{source}: holds no preference pair")
    dataset = dataset.select_columns(_kept_columns(dataset.column_names))
    first = check_pair(dataset[0], f"{source}, row 1")
    return dataset.map(
        lambda record, index: check_pair(record, f"{source}, row {index + 1}", first),
        with_indices=True,
        features=_features(first),
        desc="Checking preference pairs",
    )


def _kept_columns(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in (*COLUMNS, *UNPAIRED_COLUMNS)]


def _features(pair: Pair) -> datasets.Features:
    text = datasets.Value("string")
    kind = [{"role": text, "content": text}] if is_conversational(pair) else text
    return datasets.Features({name: datasets.Value("bool") if name == "label" else kind for name in pair})


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
    if any(isinstance(record[column], str) for column in columns):
        _require(record, "prompt", where)
        pair: Pair = {column: _check_text(record[column], where, column) for column in ("prompt", *columns)}
    else:
        pair = _check_conversation(record, where, columns)
    if columns == ("completion",):
        pair["label"] = _check_label(record, where)
    if like is not None and pair.keys() != like.keys():
        names = (", ".join(form) for form in (pair, like))
        raise PreferenceDataError("{}: this record has {}, but those before it have {}".format(where, *names))
    if like is not None and is_conversational(like) != is_conversational(pair):
        what, strings = ("pair", "three strings") if columns == RESPONSES else ("response", "strings")
        forms = (strings, "lists of messages")
        raise PreferenceDataError(
            f"{where}: this {what} is {forms[is_conversational(pair)]}, but those before it are "
            f"{forms[is_conversational(like)]}"
        )
    return pair


def _check_label(record: Mapping[str, Any], where: str) -> bool:
    _require(record, "label", where)
    if not isinstance(record["label"], bool):
        kind = type(record["label"]).__name__
        raise PreferenceDataError(f"{where}, column 'label': expected true or false, got {kind}")
    return record["label"]


def _require(record: Mapping[str, Any], column: str, where: str) -> None:
    if record.get(column) is None:
        found = ", ".join(name for name, value in record.items() if value is not None) or "none"
        raise PreferenceDataError(f"{where}: column {column!r} is missing (columns with a value: {found})")


def _check_text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise PreferenceDataError(f"{where}, column {column!r}: expected a string, got {type(value).__name__}")
    _check_unicode(value, f"{where}, column {column!r}")
    if column != "prompt":
        _check_filled(value, where, column)
    return value


def _check_filled(response: str, where: str, column: str) -> None:
    if not response.strip():
        raise PreferenceDataError(f"{where}, column {column!r}: the response is empty")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PreferenceDataError(f"{where}: not valid Unicode: {error.reason}") from error


def _check_conversation(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> Pair:
    prompt = record.get("prompt")
    responses = {column: _check_response(record[column], where, column) for column in columns}
    if prompt is None or isinstance(prompt, str):
        prompt = None if prompt is None else _check_text(prompt, where, "prompt")
        return _split_conversations(prompt, responses, where)
    for column, messages in responses.items():
        if len(messages) != 1:
            raise PreferenceDataError(
                f"{where}, column {column!r}: beside a prompt of messages, the response must be one assistant message, "
                f"got {len(messages)}; leave the prompt column out if the responses hold the whole conversation"
            )
    return {"prompt": _check_messages(prompt, where, "prompt"), **responses}


def _check_response(value: Any, where: str, column: str) -> Messages:
    messages = _check_messages(value, where, column)
    role = messages[-1]["role"]
    if role != "assistant":
        raise PreferenceDataError(f"{where}, column {column!r}: the last message is not the assistant's, but {role!r}")
    _check_filled(messages[-1]["content"], where, column)
    return messages


def _split_conversations(prompt: str | None, responses: dict[str, Messages], where: str) -> Pair:
    """The prompt and the answers of conversations that share everything before their last message."""
    shared, *others = (conversation[:-1] for conversation in responses.values())
    if any(other != shared for other in others):
        raise PreferenceDataError(f"{where}: chosen and rejected differ before their last message")
    if not shared and prompt is None:
        raise PreferenceDataError(f"{where}: column 'prompt' is missing, and the responses hold only the answer")
    if prompt is not None and not shared:
        shared = [{"role": "user", "content": prompt}]
    if prompt is not None and prompt.strip() not in [message["content"].strip() for message in shared]:
        raise PreferenceDataError(
            f"{where}, column 'prompt': not a message of the conversation in {' and '.join(responses)}"
        )
    return {"prompt": shared, **{column: conversation[-1:] for column, conversation in responses.items()}}


def _check_messages(value: Any, where: str, column: str) -> Messages:
    where = f"{where}, column {column!r}"
    if not isinstance(value, Sequence):
        kind = type(value).__name__
        raise PreferenceDataError(f"{where}: expected a string or a list of {{role, content}} messages, got {kind}")
    if not value:
        raise PreferenceDataError(f"{where}: the list of messages is empty")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise PreferenceDataError(f"{where}, message {number}: expected {{role, content}}, got {message!r:.40}")
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str):
                kind = type(text).__name__
                raise PreferenceDataError(f"{where}, message {number}: {key} must be a string, got {kind}")
            _check_unicode(text, f"{where}, message {number}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
