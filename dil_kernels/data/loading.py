"""Preference pairs and single labelled responses: load them and check every one."""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dil_kernels.wording import needs_extra

try:
    import datasets
except ImportError as error:
    raise ImportError(needs_extra("dil_kernels.data", "train", error)) from error

from dil_kernels.data.cache_key import code_key
from dil_kernels.data.columns import (
    RESPONSES,
    choose_columns,
    response_columns,
    say_lost_nulls,
    say_once,
    say_unused,
    unused_columns,
    without_padding,
)
from dil_kernels.data.files import (
    FILE_SUFFIXES,
    ROWS_PER_CHUNK,
    Record,
    check_file,
    kind_of_file,
    read_csv,
    read_file,
    read_json,
    read_parquet,
)
from dil_kernels.data.kept_pairs import kept_pairs
from dil_kernels.data.kept_rows import kept_rows
from dil_kernels.data.messages import EXTRA, PreferenceDataError
from dil_kernels.data.pair_storage import parts_of_columns, set_source, storable, stored_features
from dil_kernels.data.pairs import Like, Pair, check_pair, is_conversational

CHARACTERS_PER_CHUNK = 2**24
# Which `datasets` and models have beside data.
NO_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "metadata.json", "state.json")


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
        warning. The rows are mapped from the cache of `datasets`, where they are kept for the next time.

    Raises:
        PreferenceDataError: the source cannot be read, or a pair is broken.
    """
    if not os.fspath(source):
        raise PreferenceDataError("the name of the data is empty")
    path = Path(source)
    of_sets = {"name": name, "data_dir": data_dir, "data_files": data_files}
    if is_local_file(path):
        if split != "train":
            raise PreferenceDataError(f"{path}: a local file has only the split 'train', not {split!r}")
        if given := [option for option, value in of_sets.items() if value is not None]:
            raise PreferenceDataError(f"{path}: a local file has no {given[0]}; got {of_sets[given[0]]!r}")
        kind = check_file(path)
        return kept_pairs([path], str(path), [kind], lambda: _checked_chunks(read_file(path), str(path)))
    try:
        builder = datasets.load_dataset_builder(str(source), **of_sets)
        if path.is_dir() and not any(of_sets.values()):
            _say_unread(path, builder)
        read = _reader_of(builder, str(source))
        if read is None and builder.info.builder_name == "csv":  # pandas would take texts such as NA for nulls
            builder = datasets.load_dataset_builder(str(source), **of_sets, keep_default_na=False)
        if read is not None:
            files, records = _records_of_split(builder, str(source), split, read)
        else:
            builder.download_and_prepare()
            return _checked_dataset(builder.as_dataset(split=split), str(source))
    except PreferenceDataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PreferenceDataError(
            f"{source}: not a local file, and loading it as a data set failed: {' '.join(str(error).split())}"
        ) from error
    how = [split, str(builder.info.builder_name), str(getattr(builder.config, "sep", "")), *map(str, files)]
    return kept_pairs(files, str(source), how, lambda: _checked_chunks(records(), str(source)))


def _say_unread(directory: Path, builder: Any) -> None:
    """Say which files of a directory look like data and are of no split: `datasets` takes those of one kind or name."""
    read = {Path(file).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    kinds = {*FILE_SUFFIXES, ".tsv"} - ({".json"} if builder.info.builder_name != "json" else set())
    unread = [
        str(file.relative_to(directory))
        for file in sorted(directory.rglob("*"))
        if (kind_of_file(file) or file.suffix) in kinds
        and not (file.name in NO_DATA or any(part[0] in "._" for part in file.relative_to(directory).parts))
        and file.is_file()
        and file.resolve() not in read
    ]
    if unread:
        more = ", ..." * (len(unread) > 8)
        say_once(f"{directory}: not read, since `datasets` takes others for the data: {', '.join(unread[:8])}{more}")


def _reader_of(builder: Any, source: str) -> Callable[[Path, str], Iterator[Record]] | None:
    """What reads the files of a builder of `datasets` as they were written, where there is such a thing."""
    if builder.info.builder_name == "json" and builder.config.field is None:
        return read_json
    # Left to pandas, texts would be numbers; and a Parquet file that is written anew within a tick of the clock, or
    # with its old time, would be taken for the old one.
    config = builder.config
    read: Callable[[Path, str], Iterator[Record]] | None = None
    known = ["name", "version", "data_dir", "data_files"]
    if builder.info.builder_name == "parquet":
        read = functools.partial(read_parquet, source=source)
    elif builder.info.builder_name == "csv" and isinstance(config.sep, str) and len(config.sep) == 1:
        read = functools.partial(read_csv, delimiter=config.sep)
        known += ["sep", "delimiter"]
    plain = read is not None and config == type(config)(**{field: getattr(config, field) for field in known})
    return read if plain else None


def _records_of_split(
    builder: Any, source: str, split: str, read_one: Callable[[Path, str], Iterator[Record]]
) -> tuple[list[Path], Callable[[], Iterator[Record]]]:
    """The files of a split of a directory or hub set of JSON, CSV or Parquet files, and what reads their records.

    `datasets` would give a column one type.

    Args:
        builder: of `datasets`.
        source: its name.
        split: a split of it, or what `datasets.ReadInstruction` makes of several and of parts.
        read_one: reads a file, by its path and its name in messages.
    """
    config = datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    config.force_extract = True  # what was extracted before is found by its path, whatever the file has by now
    downloads = datasets.DownloadManager(builder.dataset_name, download_config=config, base_path=builder.base_path)
    known = list(map(str, builder.config.data_files))
    parts = [re.split(r"\W", part.strip(), maxsplit=1)[0] for part in split.split("+")]
    if unknown := [name for name in parts if name not in known]:
        raise PreferenceDataError(f"{source}: has no split {unknown[0]!r}; it has {', '.join(known)}")
    files: dict[str, list[tuple[Path, str]]] = {}
    for part in dict.fromkeys(parts):
        names = builder.config.data_files[part]
        paths = downloads.download_and_extract(list(names))
        files[part] = [
            (Path(file), str(name))
            for name, path in zip(names, paths, strict=True)
            for file in downloads.iter_files([path])
        ]

    def read(part: str) -> Iterator[Record]:
        return itertools.chain.from_iterable(read_one(*file) for file in files[part])

    # Only a part of a split needs to know how many records it has.
    sizes = {part: sum(1 for _ in read(part)) if "[" in split else sys.maxsize for part in files}
    instructions = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)

    def records() -> Iterator[Record]:
        return itertools.chain.from_iterable(
            itertools.islice(read(part.splitname), part.from_, part.to) for part in instructions
        )

    return [path for group in files.values() for path, _ in group], records


def _checked_chunks(records: Iterator[Record], source: str) -> Iterator[list[Pair]]:
    """The checked pairs, some at a time; only these exist as Python objects."""
    first: Like | None = None
    names: dict[str, None] = {}  # of the columns with a value, in their order
    pairs: list[Pair] = []
    size = 0
    for where, record in records:
        if first is None:
            first = Like.of(record, where)
            _say_text(record, first.pair, source)
        pair = check_pair(record, where, first)
        if record.keys() - names:
            names |= dict.fromkeys(name for name, value in record.items() if value is not None)
        pairs.append(pair)
        size += _characters(pair)
        if len(pairs) == ROWS_PER_CHUNK or size > CHARACTERS_PER_CHUNK:
            yield pairs
            pairs, size = [], 0
    if first is None:
        raise PreferenceDataError(f"{source}: holds no preference pair")
    if pairs:
        yield pairs
    say_unused(unused_columns(names), source)


def _characters(pair: Pair) -> int:
    """About how many a pair has."""
    count = 0
    for value in pair.values():
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list):
            for message in value:
                count += len(message.get("content") or "")
    return count


def _checked_dataset(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The checked pairs of a data set that `datasets` keeps on disk."""
    dataset, first = open_pairs(dataset, source)
    features = dataset.features
    parts = parts_of_columns(dataset)
    if is_conversational(first.pair) and any(isinstance(features.get(name), datasets.Value) for name in RESPONSES):
        parts |= {EXTRA}  # messages as JSON text may have any key

    def check(record: Pair, index: int, code: str) -> dict[str, Any]:
        pair = check_pair(without_padding(record, features), place(source, index + 1), first)
        return storable(pair, parts)

    checked = kept_rows(
        lambda **keeping: dataset.map(
            check,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=stored_features(first.pair, parts),
            fn_kwargs={"code": code_key()},
            desc="Checking preference pairs",
            **keeping,
        ),
        source,
    )
    return set_source(checked, source)


def open_pairs(dataset: datasets.Dataset, source: str) -> tuple[datasets.Dataset, Like]:
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
    first = Like.of(record, place(source, 1))
    _say_text(record, first.pair, source)
    return dataset, first


def place(source: str, row: int) -> str:
    """How messages name a row, counted from 1."""
    return f"{source}, row {row}" if source else f"row {row}"


def _say_text(record: Mapping[str, Any], pair: Pair, source: str) -> None:
    columns = [name for name in response_columns(pair) if isinstance(record[name], str)]
    if columns and is_conversational(pair):
        say_once(f"{source or 'the data'}: read as messages, since it is JSON text of such: {', '.join(columns)}")
