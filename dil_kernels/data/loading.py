"""Preference pairs and single labelled responses: load them and check every one."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import datasets
except ImportError as error:
    raise ImportError(
        f"dil_kernels.data needs the extra [train]: pip install 'dil-kernels[train]' ({error})"
    ) from error

from dil_kernels.data.cache_key import code_key
from dil_kernels.data.columns import (
    COLUMNS,
    RESPONSES,
    choose_columns,
    holds_value,
    media_error,
    say_lost_nulls,
    say_once,
    say_unused,
    unused_columns,
    without_padding,
)
from dil_kernels.data.files import ROWS_PER_CHUNK, Record, kind_of_file, read_csv, read_file, read_json
from dil_kernels.data.messages import (
    EXTRA,
    JSON_COLUMNS,
    MEDIA,
    Messages,
    PreferenceDataError,
    check_json_columns,
    check_messages,
    check_unicode,
    messages_of_text,
    split_conversations,
    split_strings,
)
from dil_kernels.data.pair_storage import (
    GIVEN_REFERENCE,
    concatenate_stored,
    parts_of_columns,
    set_source,
    storable,
    store_pairs,
    stored_features,
)

__all__ = [
    "Pair",
    "PreferenceDataError",
    "check_form",
    "check_pair",
    "is_conversational",
    "is_local_file",
    "load_preference_pairs",
    "open_pairs",
    "response_columns",
]

Pair = dict[str, Any]  # prompt, chosen, rejected: strings, or lists of messages; or prompt, completion, label


def is_local_file(source: str | os.PathLike[str]) -> bool:
    """Whether `load_preference_pairs` reads a source itself: it is a file, or is named as one of pairs."""
    return Path(source).is_file() or kind_of_file(Path(source)) is not None


def load_preference_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    name: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
) -> datasets.Dataset:
    """Load preference pairs and check every one of them.

    A pair is three strings, or three lists of ``{"role", "content"}`` messages, of which a response begins and ends
    with the assistant's. All that follows the prompt is the response, the messages of tools and users within it
    included. Where ``prompt`` is missing, it is what chosen and rejected share at their beginning: messages, or whole
    lines and words of strings. A string for a prompt may stand beside such conversations; with responses of one
    message, it is the user's message.

    Messages may have other keys, such as ``tool_calls``, and pairs of messages the columns ``tools`` (JSON schemas) and
    ``chat_template_kwargs``: the chat template gets them. In the data set they are JSON text, see
    `dil_kernels.data.messages`. ``ref_chosen_logps`` and ``ref_rejected_logps`` (``ref_logps``) are sums over the
    tokens of a response, which `DILTrainer` uses with precomputed references.

    Responses that do not come in pairs have the columns ``prompt``, ``completion`` and ``label`` instead, as TRL's KTO
    has them: a completion is what chosen and rejected are above, its label true where it is to be imitated.

    What is read is what was written; docs/training.md says what is accepted beside this, and what is refused.

    Args:
        source: a local .jsonl or .json (lines, one array, one object, or an object with one array of rows), .csv or
            .parquet file, the former also as .gz; or what `datasets.load_dataset` takes: a name on the hub, or a
            directory.
        split: the split to take from a hub data set or a directory; a local file has only "train".
        name, data_dir, data_files: as of `datasets.load_dataset`: the configuration of a hub data set, and which of
            its files are read; not of a local file.

    Returns:
        A data set with the columns prompt, chosen and rejected (or prompt, completion and label), all strings or all
        lists of messages, in the order of the source, and those named above. Other columns are dropped, and named in a
        warning.

    Raises:
        PreferenceDataError: the source cannot be read, or a pair is broken.
    """
    path = Path(source)
    of_sets = {"name": name, "data_dir": data_dir, "data_files": data_files}
    if is_local_file(path):
        if split != "train":
            raise PreferenceDataError(f"{path}: a local file has only the split 'train', not {split!r}")
        if given := [option for option, value in of_sets.items() if value is not None]:
            raise PreferenceDataError(f"{path}: a local file has no {given[0]}; got {of_sets[given[0]]!r}")
        return _checked_records(read_file(path), str(path))
    try:
        builder = datasets.load_dataset_builder(str(source), **of_sets)
        read = _reader_of(builder)
        if read is not None:
            records = _records_of_split(builder, str(source), split, read)
        else:
            builder.download_and_prepare()
            return _checked_dataset(builder.as_dataset(split=split), str(source))
    except PreferenceDataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PreferenceDataError(
            f"{source}: not a local file, and loading it as a data set failed: {' '.join(str(error).split())}"
        ) from error
    return _checked_records(records, str(source))


def _reader_of(builder: Any) -> Callable[[Path, str], Iterator[Record]] | None:
    """What reads the files of a builder of `datasets` as they were written, where there is such a thing."""
    if builder.info.builder_name == "json" and builder.config.field is None:
        return read_json
    # Left to pandas, texts such as "None" and "NA" would be nulls.
    plain = builder.info.builder_name == "csv" and builder.config == type(builder.config)(
        **{field: getattr(builder.config, field) for field in ("name", "version", "data_dir", "data_files")}
    )
    return read_csv if plain else None


def _records_of_split(
    builder: Any, source: str, split: str, read_one: Callable[[Path, str], Iterator[Record]]
) -> Iterator[Record]:
    """The records of a directory or hub set of JSON or CSV files; `datasets` would give a column one type.

    Args:
        builder: of `datasets`.
        source: its name.
        split: a split of it, or what `datasets.ReadInstruction` makes of several and of parts.
        read_one: reads a file, by its path and its name in messages.
    """
    config = datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    downloads = datasets.DownloadManager(builder.dataset_name, download_config=config, base_path=builder.base_path)

    def read(name: str) -> Iterator[Record]:
        names = builder.config.data_files[name]
        for shown, path in zip(names, downloads.download_and_extract(list(names)), strict=True):
            for file in downloads.iter_files([path]):
                yield from read_one(Path(file), str(shown))

    known = list(map(str, builder.config.data_files))
    parts = [re.split(r"\W", part.strip(), maxsplit=1)[0] for part in split.split("+")]
    if unknown := [name for name in parts if name not in known]:
        raise PreferenceDataError(f"{source}: has no split {unknown[0]!r}; it has {', '.join(known)}")
    # Only a part of a split needs to know how many records it has.
    sizes = {name: sum(1 for _ in read(name)) if "[" in split else sys.maxsize for name in parts}
    instruction = datasets.ReadInstruction.from_spec(split)
    return itertools.chain.from_iterable(
        itertools.islice(read(part.splitname), part.from_, part.to) for part in instruction.to_absolute(sizes)
    )


def _checked_records(records: Iterator[Record], source: str) -> datasets.Dataset:
    """The checked pairs; only one chunk of them exists as Python objects at a time."""
    chunks: list[datasets.Dataset] = []
    first: Pair | None = None
    names: dict[str, None] = {}  # of all columns, in their order
    while chunk := list(itertools.islice(records, ROWS_PER_CHUNK)):
        pairs = []
        for where, record in chunk:
            pairs.append(check_pair(record, where, first))
            if first is None:
                first = pairs[0]
                _say_text(record, first, source)
            names |= dict.fromkeys(name for name, value in record.items() if value is not None)
        chunks.append(store_pairs(pairs))
    if not chunks:
        raise PreferenceDataError(f"{source}: holds no preference pair")
    say_unused(unused_columns(names), source)
    return set_source(concatenate_stored(chunks), source)


def _checked_dataset(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The checked pairs of a data set that `datasets` keeps on disk."""
    dataset, first = open_pairs(dataset, source)
    features = dataset.features
    parts = parts_of_columns(dataset)
    if is_conversational(first) and any(isinstance(features.get(name), datasets.Value) for name in RESPONSES):
        parts |= {EXTRA}  # messages as JSON text may have any key

    def check(record: Pair, index: int, code: str) -> dict[str, Any]:
        pair = check_pair(without_padding(record, features), place(source, index + 1), first)
        return storable(pair, parts)

    checked = dataset.map(
        check,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=stored_features(first, parts),
        fn_kwargs={"code": code_key()},
        desc="Checking preference pairs",
    )
    return set_source(checked, source)


def open_pairs(dataset: datasets.Dataset, source: str) -> tuple[datasets.Dataset, Pair]:
    """The columns that are used of a data set in any format, as Python objects, and its first pair, checked.

    What is left out is said in a line. A data set with a transform of the user's stays as it is.

    Args:
        dataset: pairs in any form that `load_preference_pairs` accepts.
        source: where it comes from, for messages; empty if that is not known.

    Raises:
        PreferenceDataError: it is empty, has not the columns, or columns of images, or its first pair is broken.
    """
    if len(dataset) == 0:
        raise PreferenceDataError(f"{source or 'the data'}: holds no preference pair")
    if dataset.format["type"] != "custom":
        dataset = dataset.with_format(None)
        arrow = dataset.with_format("arrow")
        columns = choose_columns(
            dataset.column_names,
            dataset.features,
            source,
            lambda name: arrow.select_columns(name).iter(batch_size=16),
        )
        dataset = dataset.select_columns(columns)
        say_lost_nulls(dataset.data, source)
    record = without_padding(dataset[0], dataset.features)
    first = check_pair(record, place(source, 1))
    _say_text(record, first, source)
    return dataset, first


def place(source: str, row: int) -> str:
    """How messages name a row, counted from 1."""
    return f"{source}, row {row}" if source else f"row {row}"


def _say_text(record: Mapping[str, Any], pair: Pair, source: str) -> None:
    columns = [name for name in response_columns(pair) if isinstance(record[name], str)]
    if columns and is_conversational(pair):
        say_once(f"{source or 'the data'}: read as messages, since it is JSON text of such: {', '.join(columns)}")


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
    for name in MEDIA & record.keys():
        if holds_value(record[name]):
            raise media_error(name, f"{where}, ")
    columns = response_columns({name: value for name, value in record.items() if value is not None})
    for column in columns:
        _require(record, column, where)
    record = {**record, **messages_of_text({name: record.get(name) for name in ("prompt", *columns)}, where)}
    is_text = any(isinstance(record[column], str) for column in columns)
    _check_kinds(record, where, columns)
    try:
        pair = (_check_strings if is_text else _check_conversation)(record, where, columns)
        options = check_json_columns(record, where)
    except RecursionError:
        raise PreferenceDataError(f"{where}: objects or lists are nested too deeply") from None
    if columns == ("completion",):
        pair["label"] = _check_label(record, where)
    pair |= {name: _check_number(record[name], where, name) for name in GIVEN_REFERENCE if record.get(name) is not None}
    if like is not None:
        check_form(pair, like, where)
    if is_text and options:
        raise PreferenceDataError(
            f"{where}, column {next(iter(options))!r}: only conversations go through a chat template, but these are "
            "strings"
        )
    return pair | options


def _check_kinds(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> None:
    """Refuse a list beside a string, and name the one that differs from the others."""
    given = {name: type(record[name]) for name in ("prompt", *columns) if isinstance(record.get(name), (str, list))}
    lists = [name for name, kind in given.items() if kind is list]
    strings = [name for name in given if name not in lists]
    if not lists or not strings or strings == ["prompt"]:
        return
    if len(lists) >= len(strings):
        raise PreferenceDataError(
            f"{where}, column {strings[-1]!r}: expected a list of messages, as in {lists[0]!r}, got str"
        )
    raise PreferenceDataError(f"{where}, column {lists[0]!r}: expected a string, got list")


def check_form(pair: Pair, like: Pair, where: str) -> None:
    """Refuse a pair that has other columns, or another kind of columns, than one before it.

    Args:
        pair: checked; it may be a row of a data set of such.
        like: likewise.
        where: the place of `pair`.

    Raises:
        PreferenceDataError: names both kinds.
    """
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
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an integer
        number = math.inf
    if not math.isfinite(number):
        raise PreferenceDataError(
            f"{where}, column {column!r}: expected a number, the sum of log-probs, got {value!r:.40}"
        )
    return number


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
